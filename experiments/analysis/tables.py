"""Tables of means and standard deviations, for a terminal of 80 columns and in Markdown, from the same cells.

They are made of rows of the table of runs (`experiments.analysis.tidy`): a value of each run, with its network and the
label of its column.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from hero_jax.evaluate import Spread

SEPARATOR = " \u00b1 "
NOTHING = "\u2014"
FIXED = (".2f", ".2f")
# Formats of a mean and of its error by label of a column, where they are not fixed: where sizes differ by orders.
_WIDE = ("train loss", "seconds", "ms per step", "top eigenvalue", "top eig.", "norm")
FORMATS: dict[str, tuple[str, str]] = dict.fromkeys((*_WIDE, "least", "median", "most", "last"), (".3g", ".2g"))
# Texts by network and label of a column.
Texts = dict[tuple[str, str], str]
# A pandas.DataFrame. In the types of pandas itself a checker sees a union of all that an index may give.
Frame = Any


def spreads(frame: Frame, by: Sequence[str] = ("network", "label")) -> Frame:
    """Mean, sample deviation (`error`) and number `n` of the values of each group, one of each run."""
    return frame.groupby(list(by), sort=False)["value"].agg(
        mean=lambda values: Spread.of(list(values)).mean, error=lambda values: Spread.of(list(values)).std, n="size"
    )


def differences(frame: Frame, base: str) -> Frame:
    """Mean difference to the network `base` over the seeds that both have, standard error (`error`) and their number.

    The error is that of paired differences: their sample deviation / sqrt(n).
    """
    theirs = frame.loc[frame["network"] == base, ["label", "seed", "value"]]
    paired = frame[frame["network"] != base].merge(theirs, on=["label", "seed"], suffixes=("", "_of_base"))
    found = spreads(paired.assign(value=paired["value"] - paired["value_of_base"]))
    return found.assign(error=found["error"] / np.sqrt(found["n"]))


def cell(mean: float, error: float, formats: tuple[str, str] = FIXED) -> str:
    """Mean and its deviation or error; the mean alone where one run has none."""
    return f"{mean:{formats[0]}}" + ("" if math.isnan(error) else f"{SEPARATOR}{error:{formats[1]}}")


def texts(
    found: Frame,
    counts: Mapping[str, int] | None = None,
    formats: Mapping[str, tuple[str, str]] = FORMATS,
    sign: str = "",
) -> Texts:
    """Cells of `spreads` or `differences`, with their n unless it is that of the network in `counts`: the column n."""
    made = {(network, "n"): str(n) for network, n in (counts or {}).items()}
    for (network, label), mean, error, n in found.itertuples():
        first, second = formats.get(label, FIXED)
        told = "" if (counts or {}).get(network) == n else f" (n\u00a0{n})"
        made[network, label] = cell(mean, error, (sign + first, second)) + told
    return made


def means(frame: Frame) -> Texts:
    """Cells of the `spreads` of rows; the n of a network is that of the column with the most of its runs."""
    found = spreads(frame)
    return texts(found, found["n"].groupby("network").max().to_dict())


def starred(made: Texts, label: str, frame: Frame) -> Texts:
    """With a star in this column at each network of which some run did not reach the residual of its eigenvalue."""
    missed = set(frame["network"][(frame["metric"] == "eigenvalue_converged") & (frame["value"] == 0)])
    return {key: text + "*" * (key[1] == label and key[0] in missed) for key, text in made.items()}


def lines(made: Texts, networks: Iterable[str], labels: Sequence[str]) -> list[list[str]]:
    """A line of texts for each network, its name first."""
    return [[name, *(made.get((name, label), NOTHING) for label in labels)] for name in networks]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table in Markdown, its first `left` columns of text and the others of numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    rows = [[plain(text) for text in line] for line in (header, rule, *lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def plain(text: str) -> str:
    """Text on one line of Markdown that opens no HTML tag and ends no cell of a table."""
    return html.escape(" ".join(text.split("\n")), quote=False).replace("|", "\\|")


def terminal(header: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """The table for a terminal, its first column of text and the others of numbers, deviations under the means."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(text.replace(SEPARATOR, "\n\u00b1") for text in line))
    return table

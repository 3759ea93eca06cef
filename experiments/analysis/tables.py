"""Tables of means and standard deviations, for a terminal of 80 columns and in Markdown, from the same cells."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from hero_jax.evaluate import Spread

SEPARATOR = " \u00b1 "
NOTHING = "\u2014"


def cell(mean: float, std: float, formats: tuple[str, str] = (".2f", ".2f")) -> str:
    """Mean and deviation; the mean alone where one run has no deviation."""
    return f"{mean:{formats[0]}}" + ("" if math.isnan(std) else f"{SEPARATOR}{std:{formats[1]}}")


def spread(values: Sequence[float], n: int | None = None, formats: tuple[str, str] = (".2f", ".2f")) -> str:
    """Mean and sample deviation of one number a run, with how many there are unless it is the `n` of the row."""
    if not values:
        return NOTHING
    found = Spread.of(values)
    return cell(found.mean, found.std, formats) + ("" if found.n == n else f" (n\u00a0{found.n})")


def difference(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    n: int | None = None,
    formats: tuple[str, str] = (".2f", ".2f"),
) -> str:
    """Mean difference over the seeds that both have and its standard error, with how many unless it is the `n` given.

    The error is that of paired differences: their sample deviation / sqrt(n).
    """
    paired = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not paired:
        return NOTHING
    found = Spread.of(paired)
    text = cell(found.mean, found.std / math.sqrt(found.n), (f"+{formats[0]}", formats[1]))
    return text + ("" if found.n == n else f" (n\u00a0{found.n})")


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

"""Tables of means and standard deviations, for a terminal of 80 columns and in Markdown, from the same cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

SEPARATOR = " \u00b1 "


def cell(mean: float, std: float, formats: tuple[str, str] = (".2f", ".2f")) -> str:
    """Mean and deviation; the mean alone where one run has no deviation."""
    return f"{mean:{formats[0]}}" + ("" if math.isnan(std) else f"{SEPARATOR}{std:{formats[1]}}")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table in Markdown, its first `left` columns of text and the others of numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def terminal(header: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """The table for a terminal, its first column of text and the others of numbers, deviations under the means."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(text.replace(SEPARATOR, "\n\u00b1") for text in line))
    return table

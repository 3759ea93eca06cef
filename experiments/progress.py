"""Progress bars for long work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from rich import progress as rich_progress

from experiments import cli

_FIGURES = {"train_loss": "loss {:.4f}", "accuracy": "accuracy {:.2%}", "images_per_second": "{:,.0f} images/s"}


def bar() -> rich_progress.Progress:
    """A progress display with the time left and a line of figures; it clears itself when the work is done."""
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description:<24}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(compact=True),
        rich_progress.TextColumn("{task.fields[figures]}"),
        console=cli.console,
        transient=True,
    )


def steps(display: rich_progress.Progress) -> Callable[[str, int, int], None]:
    """A reporter `(what, done, total)` with a line for every `what`, which goes away when it is done."""
    lines: dict[str, rich_progress.TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in lines:
            lines[what] = display.add_task(what, total=total, figures="")
        display.update(lines[what], completed=done, visible=done < total)

    return report


def decoding(display: rich_progress.Progress, dataset: str) -> Callable[[int, int], None]:
    """A reporter `(done, total)` of the images of a data set that are decoded."""
    return functools.partial(steps(display), f"decoding {dataset}")


def lines(display: rich_progress.Progress) -> Callable[[str, int], Callable[[int, Mapping[str, float]], None]]:
    """A maker, by description and total, of reporters `(done, metrics)`: loss, last accuracy, images a second."""

    def begin(description: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
        line = display.add_task(description, total=total, figures="")
        last = {}

        def report(done: int, row: Mapping[str, float]) -> None:
            last.update(row)
            figures = [text.format(last[name]) for name, text in _FIGURES.items() if name in last]
            display.update(line, completed=done, figures="  ".join(figures))

        return report

    return begin

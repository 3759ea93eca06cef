"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich import progress as rich_progress

from experiments import cli


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


def task(display: rich_progress.Progress, description: str) -> Callable[[int, int], None]:
    """A reporter `(done, total)` whose line appears at its first call and goes away when it is done."""
    tasks = []

    def report(done: int, total: int) -> None:
        if not tasks:
            tasks.append(display.add_task(description, total=total, figures=""))
        display.update(tasks[0], completed=done, visible=done < total)

    return report


def epochs(display: rich_progress.Progress, description: str, total: int) -> Callable[[Mapping[str, float]], None]:
    """A reporter of the metrics of each epoch: loss, last accuracy, images a second."""
    line = display.add_task(description, total=total, figures="")
    last = {}

    def report(row: Mapping[str, float]) -> None:
        last.update(row)
        accuracy = f"  accuracy {last['accuracy']:.2%}" if "accuracy" in last else ""
        figures = f"loss {last['train_loss']:.4f}{accuracy}  {last['images_per_second']:,.0f} images/s"
        display.update(line, completed=row["epoch"], figures=figures)

    return report


def steps(display: rich_progress.Progress) -> Callable[[str, int, int], None]:
    """A reporter `(what, done, total)` with a line for every `what`, which goes away when it is done."""
    reporters: dict[str, Callable[[int, int], None]] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in reporters:
            reporters[what] = task(display, what)
        reporters[what](done, total)

    return report

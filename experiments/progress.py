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


def decoding(display: rich_progress.Progress, dataset: str) -> Callable[[int, int], None]:
    """A reporter of the images of a data set that are decoded."""
    return task(display, f"decoding {dataset}")


def lines(display: rich_progress.Progress) -> Callable[[str, int], Callable[[int, Mapping[str, float]], None]]:
    """A maker, by description and total, of reporters `(done, metrics)`: loss, last accuracy, images a second."""

    def begin(description: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
        line = display.add_task(description, total=total, figures="")
        last = {}

        def report(done: int, row: Mapping[str, float]) -> None:
            last.update(row)
            accuracy = f"  accuracy {last['accuracy']:.2%}" if "accuracy" in last else ""
            speed = f"  {last['images_per_second']:,.0f} images/s" if last else ""
            figures = f"loss {last['train_loss']:.4f}{accuracy}{speed}" if last else ""
            display.update(line, completed=done, figures=figures)

        return report

    return begin


def steps(display: rich_progress.Progress) -> Callable[[str, int, int], None]:
    """A reporter `(what, done, total)` with a line for every `what`, which goes away when it is done."""
    reporters: dict[str, Callable[[int, int], None]] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in reporters:
            reporters[what] = task(display, what)
        reporters[what](done, total)

    return report

"""What a network costs, in gradients and in time, and what each method reaches when all may spend the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.analysis import page, sections, tables
from experiments.analysis.saved import Run
from experiments.training import methods

HEADER = ("gradients per step", "ms per step", "epochs", "gradients in all")
COUNTED = (
    "Gradients per step are counted from the formulas, a gradient of the whole batch being one; milliseconds per step"
    " are measured in training, and comparable between runs of one machine alone; where a method changes along training"
    " the compilation of what comes later is in them."
)


def cost(runs: Sequence[Run], at_equal_cost: Sequence[Run]) -> list[Any]:
    """For each task the cost of every network on clean labels; then accuracies at equal cost, by noise."""
    runs = [run for run in runs if run.config.batch_size is not None]  # older ones have not
    content, named = [], sections.names(runs)
    for setup, of_setup in sections.by_clean_setup(runs).items():
        rows = sections.by_noise(of_setup, named, lambda run: run.config.label_noise)
        clean = {name: row[0.0] for name, row in rows.items() if 0.0 in row}
        lines = [[name, str(len(of)), *_cells(of), _accuracy(of, _last, len(of))] for name, of in clean.items()]
        if lines:
            header = ["network", "n", *HEADER, "last epoch"]
            text = f"Accuracy in percent on the {setup.split} images, clean labels. {COUNTED}"
            text += f" {sections.SPREAD} {sections.origin(of_setup)}"
            content += [page.Heading(f"Cost: {setup}"), page.Table(header, lines, text)]
    content += _equal(at_equal_cost)
    return content


def gradients(run: Run) -> float:
    """Those of the whole run."""
    return methods.gradients(run.config) * run.rows[-1]["step"]


def _equal(runs: Sequence[Run]) -> list[Any]:
    """Accuracies after the last epoch and at the best epoch on held-out images, a column for each noise."""
    content, named = [], sections.names(runs)
    shown: dict[str, Callable[[Run], float | None]] = {
        "last epoch": _last,
        "at best validation": lambda run: run.accuracy_at_best_validation,
    }
    for setup, of_setup in sections.by_clean_setup(runs).items():
        rows = sections.by_noise(of_setup, named, lambda run: (run.config.label_noise_kind, run.config.label_noise))
        noises = sorted({noise for row in rows.values() for noise in row}, key=lambda noise: (noise[1], noise[0]))
        labels = [f"{100 * rate:g} % {kind} noise" if rate else "clean labels" for kind, rate in noises]
        for what, value in shown.items():
            lines = []
            for name, row in rows.items():
                first, n = next(iter(row.values())), max(map(len, row.values()))
                accuracies = [_accuracy(row.get(noise, ()), value, n) for noise in noises]
                lines.append([name, str(n), *_cells(first), *accuracies])
            if all(set(line[2 + len(HEADER) :]) == {tables.NOTHING} for line in lines):
                continue
            text = (
                f"Accuracy in percent on the {setup.split} images, {what}: every network has spent the same number of"
                " gradients, to a whole epoch; a method that was searched on noisy labels too has a row for each of its"
                f" settings. {COUNTED} {sections.SPREAD} {sections.origin(of_setup)}"
            )
            content.append(page.Heading(f"At equal cost, {what}: {setup}"))
            content.append(page.Table(["network", "n", *HEADER, *labels], lines, text))
    return content


def _cells(runs: Sequence[Run]) -> list[str]:
    config = runs[0].config
    times = [1000 * run.seconds / run.rows[-1]["step"] for run in runs if run.seconds is not None]
    return [
        f"{methods.gradients(config):.4g}",
        tables.spread(times, len(runs), sections.SCIENTIFIC),
        str(config.epochs),
        f"{gradients(runs[0]):,.0f}",
    ]


def _accuracy(runs: Sequence[Run], value: Callable[[Run], float | None], n: int) -> str:
    return tables.spread([x for run in runs if (x := value(run)) is not None], n)


def _last(run: Run) -> float:
    return run.accuracy

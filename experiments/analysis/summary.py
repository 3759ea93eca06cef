"""The summary: for each task a table with a row a network and a column a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.analysis import page, sections, tables
from experiments.analysis.saved import Run

# Rounding to more bits than this costs next to nothing, and has its place in the section on quantization.
MOST_BITS = 3
EIGENVALUE = "top eigenvalue"


def summary(runs: Sequence[Run]) -> list[Any]:
    """For each task, accuracy on clean labels, at low bits and after label noise, curvature and time of each network.

    Low bits, curvature and time are those of the runs on clean labels. A task of which accuracy alone is known is left
    out, since it has no more to tell than the section on accuracy.
    """
    content, named = [], sections.names(runs)
    for setup, of_setup in sections.by_clean_setup(runs).items():
        rows = sections.by_noise(of_setup, named, lambda run: (run.config.label_noise_kind, run.config.label_noise))
        clean = {name: next((found for (_, rate), found in row.items() if not rate), []) for name, row in rows.items()}
        columns = {"clean labels": {name: [run.accuracy for run in found] for name, found in clean.items()}}
        columns |= {label: _values(clean, value) for label, value in low_bits(of_setup).items()}
        for kind, rate in sorted({key for row in rows.values() for key in row if key[1]}):
            label = f"{100 * rate:g} % {kind} noise"
            columns[label] = {name: [run.accuracy for run in row.get((kind, rate), ())] for name, row in rows.items()}
        columns[EIGENVALUE] = _values(clean, eigenvalue)
        columns = {label: column for label, column in columns.items() if any(column.values())}
        if len(columns) < 2:
            continue
        seconds = _values(clean, lambda run: run.seconds)
        columns |= {"seconds": seconds} if any(seconds.values()) else {}
        sized = (EIGENVALUE, "seconds")
        counts = {name: max(len(column.get(name, ())) for column in columns.values()) for name in rows}
        missed = {name for name, found in clean.items() if not all(map(_is_found, found))}
        lines = [
            [name, str(n)]
            + [
                tables.spread(column[name], n, *([sections.SCIENTIFIC] if label in sized else []))
                + ("*" if label == EIGENVALUE and name in missed else "")
                for label, column in columns.items()
            ]
            for name, n in counts.items()
        ]
        text = (
            f"Accuracy in percent on the {setup.split} images, whose labels are true where those of training were"
            " altered, after the last epoch. Low bits (weights rounded after training), the top Hessian eigenvalue (its"
            " residual is in the section on curvature; a star: some run did not reach it) and seconds in training steps"
            " (the first evaluated epoch at the speed of the second) are of the runs on clean labels."
            f" {sections.SPREAD} {sections.origin(of_setup)}"
        )
        content += [page.Heading(str(setup)), page.Table(["network", "n", *columns], lines, text)]
    return content


def low_bits(runs: Sequence[Run]) -> dict[str, Callable[[Run], float | None]]:
    """What was measured of any of these at few bits: accuracy by the label of its quantizer and width."""
    measured = [(spec, row) for run in runs for spec, row in run.measured.get("quantized", {}).items()]
    found = {(spec, width): None for spec, row in measured for width in row if width != "full"}
    return {f"{width} bit, {spec}": _at(spec, width) for spec, width in found if int(width) <= MOST_BITS}


def eigenvalue(run: Run) -> float | None:
    """The top eigenvalue at the end, where it was measured."""
    return run.curvature.get("eigenvalue")


def _at(spec: str, width: str) -> Callable[[Run], float | None]:
    return lambda run: run.measured.get("quantized", {}).get(spec, {}).get(width)


def _is_found(run: Run) -> bool:
    """Whether its top eigenvalue, if it was measured, reached its residual."""
    return bool(run.curvature.get("eigenvalue_converged", True))


def _values(clean: dict[str, list[Run]], value: Callable[[Run], float | None]) -> dict[str, list[float]]:
    return {name: [x for run in found if (x := value(run)) is not None] for name, found in clean.items()}

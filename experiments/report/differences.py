"""Differences to chosen networks: for each task and each of them a table with a row a network and a column a claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import tables
from experiments.report import page, sections
from experiments.report.saved import Cell, Run
from experiments.report.summary import MOST_BITS

EIGENVALUE = "top eigenvalue"


def differences(made: Sequence[sections.Part], against: Sequence[str]) -> list[Any]:
    """For each task and each network of `against`, what every other network has more: paired over the seeds of both.

    Raises:
      ValueError: no task has a network of that name.
    """
    names = dict.fromkeys(cell.name for part in made for cell in part.cells)
    for name in against:
        if name not in names:
            raise ValueError(f"`against` must name networks of these runs ({', '.join(names)}); got {name!r}.")
    content = []
    for part in made:
        by_name = {cell.name: cell for cell in part.cells}
        for base in (by_name[name] for name in dict.fromkeys(against) if name in by_name):
            others = [cell for cell in part.cells if cell is not base]
            if others:
                content += [page.Heading(f"{part.title}: minus {base.name}"), _table(part, base, others)]
    return content


def _table(part: sections.Part, base: Cell, others: Sequence[Cell]) -> page.Table:
    """The table of one task against one network."""
    claims = dict(_claims([base, *others]))
    lines = []
    for cell in others:
        n = len(_seeds(cell) & _seeds(base))
        line = [cell.name, str(n)]
        for label, claim in claims.items():
            values, baseline = (
                {run.config.seed: x for run in c.runs if (x := claim(run)) is not None} for c in (cell, base)
            )
            formats = ("+.3g", ".2g") if label == EIGENVALUE else ("+.2f", ".2f")
            line.append(tables.difference(values, baseline, n, formats))
        lines.append(line)
    text = (
        f"Points of accuracy on the {part.setup.split} images (low bits: weights rounded after training), and top"
        f" Hessian eigenvalue, minus those of {base.name}: paired over the n seeds that both have, mean \u00b1 standard"
        " error. At 95 % confidence one difference over three seeds is told from zero by 4.3 standard errors, over ten"
        " by 2.3; of twenty that are nothing one is to be expected beyond that."
        f" {sections.origin([base, *others])}"
    )
    return page.Table(["network", "n", *claims], lines, text)


def _seeds(cell: Cell) -> set[int]:
    return {run.config.seed for run in cell.runs}


def _claims(cells: Sequence[Cell]) -> Iterator[tuple[str, Callable[[Run], float | None]]]:
    """What is compared, of what was measured of any of these: a label and the value of a run, None without one."""
    runs = [run for cell in cells for run in cell.runs]
    yield "last epoch", lambda run: run.accuracy
    if any(run.accuracy_at_best_validation is not None for run in runs):
        yield "at best validation", lambda run: run.accuracy_at_best_validation
    quantized = [run.measured.get("quantized", {}) for run in runs]
    for spec in dict.fromkeys(spec for by_spec in quantized for spec in by_spec):
        widths = dict.fromkeys(width for by_spec in quantized for width in by_spec.get(spec, ()) if width != "full")
        for width in (width for width in widths if int(width) <= MOST_BITS):
            yield f"{width} bit, {spec}", _at(spec, width)
    if any(run.curvature for run in runs):
        yield EIGENVALUE, lambda run: run.curvature.get("eigenvalue")


def _at(spec: str, width: str) -> Callable[[Run], float | None]:
    return lambda run: run.measured.get("quantized", {}).get(spec, {}).get(width)

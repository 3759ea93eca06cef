"""Differences to chosen networks: for each task and each of them a table with a row a network and a column a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.analysis import page, sections, summary, tables
from experiments.analysis.saved import Cell, Run


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
    runs = [run for cell in (base, *others) for run in cell.runs]
    claims: dict[str, Callable[[Run], float | None]] = {
        "last epoch": lambda run: run.accuracy,
        "at best validation": lambda run: run.accuracy_at_best_validation,
        **summary.low_bits(runs),
        summary.EIGENVALUE: summary.eigenvalue,
    }
    baselines = {label: found for label, claim in claims.items() if (found := base.by_seed(claim))}
    lines = []
    for cell in others:
        n = len(_seeds(cell) & _seeds(base))
        line = [cell.name, str(n)]
        for label, baseline in baselines.items():
            formats = [sections.SCIENTIFIC] if label == summary.EIGENVALUE else []
            line.append(tables.difference(cell.by_seed(claims[label]), baseline, n, *formats))
        lines.append(line)
    text = (
        f"Points of accuracy on the {part.setup.split} images (low bits: weights rounded after training), and top"
        f" Hessian eigenvalue, minus those of {base.name}: paired over the n seeds that both have, mean \u00b1 standard"
        " error. At 95 % confidence one difference over three seeds is told from zero by 4.3 standard errors, over ten"
        " by 2.3; of twenty that are nothing one is to be expected beyond that."
        f" {sections.origin([base, *others])}"
    )
    return page.Table(["network", "n", *baselines], lines, text)


def _seeds(cell: Cell) -> set[int]:
    return {run.config.seed for run in cell.runs}

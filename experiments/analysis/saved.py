"""Saved runs, read back from disk and checked, in cells of one network each: what a report is made of.

measured.json, beside what `experiments.runs` leaves: {"quantized": {SPEC: {"full": %, "8": %, ...}}, "images": n,
"curvature": {"eigenvalue", "eigenvalue_residual", "eigenvalue_converged", "hessian_norm", "hessian_norm_sem",
"images"}}
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.analysis import networks
from experiments.config import LABELS, METHODS, TrainConfig
from experiments.storage import runs

# Relative residual to which training looks for the eigenvalue (the default of `spectrum.top_eigenpairs`).
RTOL = 1e-3


class Run(NamedTuple):
    """One run folder.

    rows: its evaluations, oldest first.
    parts: environment.json of each part of the run.
    measured: measured.json; empty where there is none.
    """

    path: Path
    config: TrainConfig
    status: str
    message: str
    rows: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    measured: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether it ended well, with an evaluation."""
        return self.status == "done" and bool(self.rows)

    @property
    def split(self) -> str:
        """What `accuracy` was measured on: held-out images took the place of the test images in older runs."""
        is_older = self.config.validation_size and not any("validation_accuracy" in row for row in self.rows)
        return "validation" if is_older else "test"

    @property
    def accuracy(self) -> float:
        """Accuracy in percent after the last epoch."""
        return 100 * self.rows[-1]["accuracy"]

    @property
    def accuracy_at_best_validation(self) -> float | None:
        """Accuracy in percent at the first epoch of the highest validation accuracy."""
        rows = [row for row in self.rows if "validation_accuracy" in row]
        return 100 * max(rows, key=lambda row: row["validation_accuracy"])["accuracy"] if rows else None

    @property
    def seconds(self) -> float | None:
        """Time in training steps; the speed of an evaluated epoch stands for those since the one evaluated before.

        That of the second evaluated epoch stands for the first too, in which a process may compile.
        """
        speeds = [row.get("images_per_second") for row in self.rows]
        if not all(speeds) or self.config.batch_size is None:
            return None
        speeds[:1] = speeds[1:2] or speeds[:1]
        steps = [0, *(row["step"] for row in self.rows)]
        images = (self.config.batch_size * (after - before) for before, after in itertools.pairwise(steps))
        return sum(n / speed for n, speed in zip(images, speeds, strict=True))

    @property
    def curvature(self) -> dict[str, Any]:
        """The curvature at the end, from measured.json or from the last epoch; empty where it was not measured."""
        last = self.rows[-1]
        if self.measured.get("curvature"):
            # null is what a number that is not finite was written as.
            return {k: math.nan if v is None else v for k, v in self.measured["curvature"].items()}
        if "eigenvalue" not in last:
            return {}
        names = ("eigenvalue", "eigenvalue_residual", "hessian_norm", "hessian_norm_sem")
        images = last.get("curvature_images", self.config.curvature_size)
        is_found = last["eigenvalue_residual"] <= RTOL
        return {name: last[name] for name in names} | {"eigenvalue_converged": is_found, "images": images}


class Cell(NamedTuple):
    """The runs of one network: they differ in their seed only."""

    name: str
    network: TrainConfig
    runs: list[Run]

    def by_seed(self, value: Callable[[Run], float | None]) -> dict[int, float]:
        """The value of each run that has it, by its seed."""
        return {run.config.seed: found for run in self.runs if (found := value(run)) is not None}


class Found(NamedTuple):
    """Run folders, folders of landscapes (landscape.json) and of searches (search.json), each in the order of names."""

    runs: list[Run]
    landscapes: list[Path]
    searches: list[Path]

    @property
    def main(self) -> list[Run]:
        """The finished runs that are neither trials of a search nor below a folder named ablations or cost."""
        return [run for run in self._finished() if "ablations" not in run.path.parts and not _is_at_equal_cost(run)]

    @property
    def at_equal_cost(self) -> list[Run]:
        """The finished runs below folders named cost, whose epochs are those that a number of gradients buys."""
        return [run for run in self._finished() if _is_at_equal_cost(run)]

    @property
    def ablations(self) -> list[Run]:
        """The finished runs below folders named ablations."""
        return [run for run in self._finished() if "ablations" in run.path.parts]

    def _finished(self) -> list[Run]:
        return [run for run in self.runs if run.is_done and not any(f in run.path.parents for f in self.searches)]


def _is_at_equal_cost(run: Run) -> bool:
    """Whether its folder is COST/runs/NAME with COST named cost."""
    return run.path.parent.parent.name == "cost"


def find(folders: Iterable[Path]) -> Found:
    """Everything below the folders, each once; raises ValueError where there is no run."""
    folders = list(folders)
    paths: dict[Path, Path] = {}
    for folder in folders:
        for base, below, _ in os.walk(folder):
            below[:] = sorted(name for name in below if name != "checkpoint" and not name.startswith("damaged-"))
            paths.setdefault(Path(base).resolve(), Path(base))
    found = [run for run in map(_read_run, paths.values()) if run is not None]
    if not found:
        named = ", ".join(map(str, folders)) or "none"
        raise ValueError(f"`folders` must hold run folders (config.json, metrics.jsonl); got none below {named}.")
    landscapes = [
        path for path in paths.values() if path.name.startswith("landscape") and (path / "landscape.json").exists()
    ]
    return Found(found, landscapes, [path for path in paths.values() if (path / "search.json").exists()])


def _read_run(path: Path) -> Run | None:
    """The run of a folder; None where it is not that of a run."""
    fields = read_json(path / "config.json")
    status = read_json(path / "status.json")
    has_rows = (path / "metrics.jsonl").exists()
    if not {"method", "dataset"} <= set(fields) or not (has_rows or status):
        return None
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(TrainConfig)})
    if unknown:
        raise ValueError(f"`folders` must hold runs of fields that are known here; {path} has {', '.join(unknown)}.")
    before = TrainConfig.before(fields["method"])
    try:
        config = TrainConfig(**before | fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`folders` must hold runs that are possible here; {path} is not: {error}") from None
    environment = read_json(path / "environment.json")
    return Run(
        path=path,
        config=config if config.label_noise else dataclasses.replace(config, label_noise_kind="symmetric"),
        status=status.get("status", "unknown"),
        message=status.get("message", ""),
        rows=runs.read_metrics(path) if has_rows else [],
        parts=[environment, *environment.get("continued", [])] if environment else [],
        measured=read_json(path / "measured.json"),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`folders` must hold whole files; {file} is damaged ({error}).") from None


def without_noise(config: TrainConfig) -> TrainConfig:
    """The configuration on clean labels."""
    return dataclasses.replace(config, label_noise=0.0, label_noise_kind="symmetric")


def cells(runs_of: Sequence[Run], names: Mapping[TrainConfig, str] | None = None) -> list[Cell]:
    """The runs by network, in the order of methods and then of settings.

    Args:
      runs_of: the runs.
      names: those of the networks `without_noise`; default by what these runs differ in.

    Raises:
      ValueError: a network has a seed twice, or its runs were measured differently.
    """
    by_path = {run.path: run for run in runs_of}
    grouped = networks.by_network((run.path, run.config) for run in runs_of)
    named = networks.names(grouped) if names is None else {key: names[without_noise(key)] for key in grouped}
    made = [Cell(named[network], network, [by_path[path] for path in paths]) for network, paths in grouped.items()]
    for cell in made:
        _check_measured_alike(cell)
    return sorted(made, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    """Methods as they are listed, the plain one first, then settings by value, with those not set first."""
    method, *settings = dataclasses.astuple(cell.network)
    is_named = cell.name != LABELS[method]
    return METHODS.index(method), is_named, [(value is not None, value) for value in settings]


def _check_measured_alike(cell: Cell) -> None:
    """Refuses a mean over runs that were evaluated on different images or with different quantizers."""
    kinds: dict[str, Callable[[Run], Any]] = {
        "images": lambda run: run.measured.get("images"),
        "quantizers": lambda run: {spec: list(row) for spec, row in run.measured.get("quantized", {}).items()} or None,
        "images for the curvature": lambda run: run.curvature.get("images"),
    }
    for what, kind in kinds.items():
        measured = [(run.path, kind(run)) for run in cell.runs if kind(run) is not None]
        for path, other in measured[1:]:
            if other != measured[0][1]:
                raise ValueError(
                    f"`folders` must have the runs of {cell.name} measured alike; {what}: {measured[0][1]} in"
                    f" {measured[0][0]}, {other} in {path}."
                )


def plain_cell(made: Sequence[Cell], method: str) -> Cell | None:
    """The cell of a method, where it has several the one without settings in its name, then that of best accuracy."""
    of_method = [cell for cell in made if cell.network.method == method]
    plain = [cell for cell in of_method if cell.name == LABELS[method]]
    return max(plain or of_method, key=mean_accuracy, default=None)


def mean_accuracy(cell: Cell) -> float:
    """Mean accuracy in percent after the last epoch."""
    return sum(run.accuracy for run in cell.runs) / len(cell.runs)

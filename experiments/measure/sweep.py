"""Many runs: each configuration with each seed in a folder of its own, then measured; what is there is not made again.

OUT/config.json         what the sweep is
OUT/runs/NAME-sSEED/    a run folder (`runs`), and with it
    measured.json       accuracy at each bit width, top Hessian eigenvalue and Hessian norm of the run, by `Measuring`

A run that another process is writing is left to it. `engine` says where the runs are made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import data
from experiments.config import TrainConfig
from experiments.measure.engine import Engine
from experiments.storage import files, runs
from experiments.training import compiled, curvature, loop
from hero_jax import errors, quantize

PyTree = Any
# Makes a reporter `(done, metrics)` of a description and a total.
Begin = Callable[[str, int], Callable[[int, Mapping[str, float]], None]]
logger = logging.getLogger(__name__)
# Training images for the Hessian where nothing is said: all of digits, of others what a product takes seconds for on a
# CPU.
CURVATURE_IMAGES = {"digits": 1433}


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What is measured of a run that has ended."""

    specs: tuple[str, ...] = ("channel-narrow",)
    """Names of the quantizers: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    """Bit widths of the weights."""
    curvature_size: int | None = None
    """Training images for the Hessian; default all of digits, 500 of others."""
    curvature_products: int = 200
    """Most Hessian-vector products for the top eigenvalue."""

    def __post_init__(self) -> None:
        for name in ("curvature_size", "curvature_products"):
            if getattr(self, name) is not None:
                errors.integer(name, getattr(self, name), low=1)
        for name in ("specs", "bits"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one; got none.")
        for width in self.bits:
            errors.integer("bits", width, low=quantize.MIN_BITS, high=quantize.MAX_BITS)
        for spec in self.specs:
            quantize.named(spec)

    def curvature_images(self, dataset: str) -> int:
        """`curvature_size`, or its default for a data set."""
        return self.curvature_size or CURVATURE_IMAGES.get(dataset, 500)


class Run(NamedTuple):
    """A run that has ended well: its name and seed, the evaluations along it, and measured.json ({} without)."""

    name: str
    config: TrainConfig
    history: list[dict[str, Any]]
    measured: dict[str, Any]


def run_all(
    configs: Mapping[str, TrainConfig],
    seeds: Sequence[int],
    dataset: data.Dataset,
    out: Path,
    begin: Begin,
    measuring: Measuring | None = None,
    engine: Engine = Engine(),
) -> list[Run]:
    """Trains and measures every configuration with every seed, or what is left of them.

    A run that diverges is said to have done so, and the others go on. Give `check` the configurations first.

    Args:
      configs: resolved configurations by name, whose own seed does not matter.
      seeds: seeds of each.
      dataset: the data as loaded: each configuration holds out and leaves out its own part.
      out: where the run folders are: `out`/runs/NAME-sSEED.
      begin: makes a reporter `(done, metrics)` of a description and a total: one of all runs, and one of each that is
        made here.
      measuring: what is measured of each; None: nothing.
      engine: where the runs are made.

    Returns:
      The runs that ended well, by configuration and seed.

    Raises:
      FileExistsError: a folder holds a run of another configuration.
      Failed: some are left, to the processes that are writing them or since their workers died.
    """
    made = [(name, dataclasses.replace(config, seed=seed)) for name, config in configs.items() for seed in seeds]
    jobs = [_Job(name, run, (out / "runs" / f"{name}-s{run.seed}").absolute(), measuring) for name, run in made]
    report, ended = begin("all runs", len(jobs)), 0

    def done(job: _Job) -> None:
        nonlocal ended
        if runs.status(job.path) == "diverged":
            logger.info("%s diverged; the others go on", job)
        ended += 1
        report(ended, {})

    left = []
    for job in jobs:
        if job.has_ended():
            done(job)
        else:
            left.append(job)
    if engine.is_here:
        make = _Maker(dataset, begin)
        for job in left:
            make(job)
            done(job)
    elif left:
        engine.make(left, _Maker, dataset, done)
    left = [job for job in left if not job.has_ended()]
    if left:
        raise files.Failed(
            f"{len(left)} of {len(jobs)} runs are left, such as {left[0]}: another process is writing them, or their"
            " worker died. Give the same command again when they have ended."
        )
    ended_well = [job for job in jobs if runs.status(job.path) == "done"]
    return [Run(job.name, job.run, runs.read_metrics(job.path), _measured(job.path)) for job in ended_well]


def check(configs: Mapping[str, TrainConfig], dataset: data.Dataset) -> None:
    """Raises ValueError where a configuration asks for more images than the data set has."""
    for run in {dataclasses.replace(run, seed=0) for run in configs.values()}:
        compiled.check_batch_size(run.budget.batch_size, compiled.subset(run, dataset).train.size)


class _Job(NamedTuple):
    """A run that is to be trained and measured, and its folder."""

    name: str
    run: TrainConfig
    path: Path
    measuring: Measuring | None

    def __str__(self) -> str:
        return self.path.name

    def has_ended(self) -> bool:
        """Whether nothing is left to do; raises FileExistsError at the folder of another run."""
        if runs.status(self.path) not in ("done", "diverged"):
            return False
        files.check_same(self.path, self.run, self.run.may_differ())
        return _is_measured(self.path, self.measuring)


def _silent(description: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
    return lambda done, metrics: None


class _Maker:
    """Makes what is left of runs, one after the other, with the programs of one configuration at a time."""

    def __init__(self, dataset: data.Dataset, begin: Begin = _silent) -> None:
        def programs(key: TrainConfig) -> tuple[compiled.Trainer, data.Dataset]:
            images = compiled.subset(key, dataset)
            return compiled.build(key, images), images

        self._begin, self._programs = begin, functools.lru_cache(maxsize=1)(programs)

    def __call__(self, job: _Job) -> None:
        """Makes what is left of a run, unless another process is writing it."""
        name, run, path, measuring = job
        if job.has_ended():
            return
        try:
            with runs.RunFolder(path, run, run.may_differ()) as folder:
                # None of these changes what is compiled.
                key = run.replace(seed=0, label_noise=0.0, label_noise_kind="symmetric")
                trainer, images = self._programs(key)
                line = self._begin(f"{name}, seed {run.seed}", run.budget.epochs)
                report: loop.Report = lambda row: line(int(row["epoch"]), row)  # noqa: E731
                variables = loop.train(run, images, folder, report, trainer).variables
                if measuring is not None and not _is_measured(path, measuring):
                    variables = jax.tree.map(jnp.asarray, variables)
                    found = measure(
                        measuring, run.task.dataset, trainer, variables, compiled.with_label_noise(run, images)
                    )
                    files.write_json(path / "measured.json", {"config": files.to_json(measuring), **found})
        except files.Busy:
            logger.info("%s is left to the process that is writing it", job)
        except loop.Diverged:
            return


def measure(
    measuring: Measuring, name: str, trainer: compiled.Trainer, variables: PyTree, dataset: data.Dataset
) -> dict[str, Any]:
    """Accuracy at every bit width, the eigenvalue of largest magnitude, and the norm of the Hessian, as JSON values.

    BatchNorm uses its running statistics in all; the Hessian is that of the mean cross-entropy of the first training
    images, with the labels they are trained on, without weight decay or augmentation.
    """
    params = variables["params"]

    def eval_fn(params: PyTree) -> dict[str, float]:
        return trainer.evaluate({**variables, "params": params}, dataset.test)

    quantized = {}
    for spec in measuring.specs:
        rows = quantize.quantize_and_evaluate(eval_fn, params, measuring.bits, quantize.named(spec))
        quantized[spec] = {"full" if row.bits is None else str(row.bits): 100 * row.metrics["accuracy"] for row in rows}
    images = dataset.train.first(measuring.curvature_images(name))
    operator = trainer.hessian(variables, images)
    keys = jax.random.key(0), jax.random.key(1)
    found, _ = curvature.measure(operator, keys, measuring.curvature_products)
    return {
        "images": dataset.test.size,
        "quantized": quantized,
        "curvature": {"images": images.size, **found},
    }


def _measured(path: Path) -> dict[str, Any]:
    """measured.json of a run folder; empty where there is none."""
    found = files.read_json(path / "measured.json")
    if "curvature" in found:
        # null is what a number that is not finite was written as.
        found["curvature"] = {k: math.nan if v is None else v for k, v in found["curvature"].items()}
    return found


def _is_measured(path: Path, measuring: Measuring | None) -> bool:
    """Whether a run has been measured as it is asked for; one that diverged has nothing to measure."""
    if measuring is None or runs.status(path) == "diverged":
        return True
    wanted = json.loads(json.dumps(files.to_json(measuring)))
    return _measured(path).get("config") == wanted

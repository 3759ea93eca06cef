"""Many runs: each configuration with each seed in a folder of its own, then measured; what is there is not made again.

OUT/config.json says what the sweep is; each folder OUT/runs/NAME-sSEED has measured.json besides what `runs` leaves. A
run that another process is writing is left to it. `workers` says where the runs are made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import jax
import jax.numpy as jnp
from typing_extensions import TypedDict

from experiments import data
from experiments.config import TrainConfig
from experiments.config.fields import Bits, Checked, Count, number
from experiments.measure.workers import Engine
from experiments.storage import claims, files, records, runs
from experiments.training import compiled, curvature, loop
from hero_jax import quantize

PyTree = Any
# Makes a reporter `(done, metrics)` of a description and a total.
Begin = Callable[[str, int], Callable[[int, Mapping[str, float]], None]]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Measuring(Checked):
    """What is measured of a run that has ended: accuracy by quantizer and width, the Hessian of so many images."""

    specs: tuple[str, ...] = ("channel-narrow",)
    bits: tuple[Bits, ...] = (8, 6, 5, 4, 3, 2)
    curvature_size: Count = 500
    curvature_products: Count = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("specs", "bits"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must name at least one; got none.")
        for spec in self.specs:
            quantize.named(spec)


def curvature_size(asked: Any, dataset: str) -> int:
    """Training images for the Hessian: those asked for, else all of digits; of others a product is to take seconds."""
    return number(asked) or (1433 if dataset == "digits" else Measuring.curvature_size)


@records.schema
class Measured(TypedDict):
    """measured.json: accuracy in percent by quantizer and width, on so many test images, and the Hessian at the end."""

    config: NotRequired[dict[str, Any]]
    images: int
    quantized: dict[str, dict[str, float | None]]
    curvature: records.Numbers


class Run(NamedTuple):
    """A run that has ended well: its name and seed, the evaluations along it, and measured.json ({} without)."""

    name: str
    config: TrainConfig
    history: list[dict[str, Any]]
    measured: Measured


class _Job(NamedTuple):
    """A run that is to be trained and measured, and its folder."""

    name: str
    run: TrainConfig
    path: Path
    measuring: Measuring | None

    def __str__(self) -> str:
        return self.path.name

    def measured(self) -> Measured:
        """measured.json; empty where there is none."""
        found = records.read(self.path / "measured.json", Measured)
        if "curvature" in found:
            found["curvature"] = records.numbers(found["curvature"])
        return found

    def is_measured(self) -> bool:
        """Whether it has been measured as it is asked for."""
        if self.measuring is None:
            return True
        found = self.measured().get("config", {})
        # Older folders left it open.
        size = curvature_size(found.get("curvature_size"), self.run.task.dataset)
        return found | {"curvature_size": size} == claims.to_json(self.measuring)

    def has_ended(self) -> bool:
        """Whether nothing is left to do; raises FileExistsError at the folder of another run."""
        status = runs.status(self.path)
        if status in ("done", "diverged"):
            runs.check_same(self.path, self.run, self.run.may_differ())
        return status == "diverged" or (status == "done" and self.is_measured())


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
      dataset: the data as loaded: each configuration holds out and leaves out its own part.
      begin: for a reporter of all runs, and for one of each that is made here.

    Returns:
      The runs that ended well, by configuration and seed.

    Raises:
      FileExistsError: a folder holds a run of another configuration.
      Failed: some are left, to the processes that are writing them or since their workers died.
    """
    folder = (out / "runs").absolute()
    jobs = [
        _Job(name, dataclasses.replace(config, seed=seed), folder / f"{name}-s{seed}", measuring)
        for name, config in configs.items()
        for seed in seeds
    ]
    report, count = begin("all runs", len(jobs)), itertools.count(1)

    def done(job: _Job) -> None:
        if runs.status(job.path) == "diverged":
            logger.info("%s diverged; the others go on", job)
        report(next(count), {})

    left = [job for job in jobs if not job.has_ended()]
    for job in jobs:
        if job not in left:
            done(job)
    if engine.is_here:
        make = _maker(dataset, begin)
        for job in left:
            make(job)
            done(job)
    elif left:
        engine.make(left, _maker, dataset, done)
    left = [job for job in left if not job.has_ended()]
    if left:
        raise files.Failed(
            f"{len(left)} of {len(jobs)} runs are left, such as {left[0]}: another process is writing them, or their"
            " worker died. Give the same command again when they have ended."
        )
    ended_well = [job for job in jobs if runs.status(job.path) == "done"]
    return [Run(job.name, job.run, runs.history(job.path, job.run), job.measured()) for job in ended_well]


def check(configs: Mapping[str, TrainConfig], dataset: data.Dataset) -> None:
    """Raises ValueError where a configuration asks for more images than the data set has."""
    for run in {dataclasses.replace(run, seed=0) for run in configs.values()}:
        compiled.check_batch_size(run.budget.batch_size, compiled.subset(run, dataset).train.size)


def _maker(
    dataset: data.Dataset, begin: Begin = lambda description, total: lambda done, metrics: None
) -> Callable[[_Job], None]:
    """What makes what is left of runs, one after the other, with the programs of one configuration at a time."""

    @functools.lru_cache(maxsize=1)
    def programs(key: TrainConfig) -> tuple[compiled.Trainer, data.Dataset]:
        images = compiled.subset(key, dataset)
        return compiled.build(key, images), images

    def make(job: _Job) -> None:
        name, run, path, measuring = job
        if job.has_ended():
            return
        try:
            with runs.RunFolder(path, run, run.may_differ()) as folder:
                # None of these changes what is compiled.
                trainer, images = programs(run.replace(seed=0, label_noise=0.0, label_noise_kind="symmetric"))
                line = begin(f"{name}, seed {run.seed}", run.budget.epochs)
                ended = loop.train(run, images, folder, lambda row: line(int(row["epoch"]), row), trainer)
                if measuring is not None and not job.is_measured():
                    variables = jax.tree.map(jnp.asarray, ended.variables)
                    noisy = compiled.with_label_noise(run, images)
                    found = measure(measuring, trainer, variables, noisy)
                    records.write(path / "measured.json", {"config": claims.to_json(measuring), **found})
        except claims.Busy:
            logger.info("%s is left to the process that is writing it", job)
        except loop.Diverged:
            return

    return make


def measure(
    measuring: Measuring, trainer: compiled.Trainer, variables: PyTree, dataset: data.Dataset
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
    images = dataset.train.first(measuring.curvature_size)
    keys = jax.random.key(0), jax.random.key(1)
    found, _ = curvature.measure(trainer.hessian(variables, images), keys, measuring.curvature_products)
    return {"images": dataset.test.size, "quantized": quantized, "curvature": {"images": images.size, **found}}

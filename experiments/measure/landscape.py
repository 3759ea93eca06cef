"""The loss around saved runs and between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

import jax
import numpy as np
from typing_extensions import TypedDict

from experiments.config.fields import Checked, Count, Positive, Several, Whole
from experiments.measure import saved
from experiments.measure.saved import Saved
from experiments.storage import environment, records
from experiments.training import compiled
from hero_jax import landscape
from hero_jax.errors import ArgumentError, integer
from hero_jax.evaluate import Spread

PyTree = Any
# From a quarter before the first network to a quarter after the second, in sixteenths: both are among them.
BETWEEN = np.arange(-4, 21) / 16
SPLITS = ("train", "test")
# Steps across the radius, to which values are interpolated to measure a basin.
FINE = 200
Values = list[float | None]


class Line(TypedDict):
    """The part of a line that is in the basin, over several of them."""

    mean: float
    std: float | None
    n: NotRequired[int]


class Basin(TypedDict):
    """The size of the basin in lines and plane."""

    line: Line
    plane: float


class Center(TypedDict):
    """What a run has at its weights."""

    loss: float | None
    accuracy: float


class Surface(TypedDict):
    """What is around one run: `around`."""

    center: Center
    basin: Basin
    steps: NotRequired[list[float]]
    lines: NotRequired[list[Values]]
    plane: NotRequired[dict[str, list[Values]]]
    not_finite: NotRequired[int]


class Barrier(TypedDict):
    """How far loss and error, a fraction, rise between two runs."""

    loss: float | None
    error: float | None


class Barriers(TypedDict):
    """Those on each split."""

    train: Barrier
    test: Barrier


class Segment(TypedDict):
    """What is between two runs: `between`."""

    barriers: Barriers
    steps: NotRequired[list[float]]
    train: NotRequired[dict[str, Values]]
    test: NotRequired[dict[str, Values]]


class Segments(TypedDict):
    """What is between the first run and others."""

    first: str
    to: dict[str, Segment]


class Drawn(TypedDict):
    """What was drawn: `LandscapeConfig`."""

    radius: float
    rise: float
    directions: int
    images: NotRequired[int]
    points: NotRequired[int]
    levels: NotRequired[list[float]]
    seed: NotRequired[int]


@records.schema
class LandscapeRecord(TypedDict):
    """landscape.json."""

    config: Drawn
    environment: environment.Part
    runs: dict[str, Surface]
    images: NotRequired[dict[str, int]]
    between: NotRequired[Segments]


@dataclasses.dataclass(frozen=True)
class LandscapeConfig(Checked):
    """What to draw."""

    images: Count = 1000
    """The loss is the mean over this many training images, the first ones, without augmentation."""
    points: Annotated[int, functools.partial(integer, low=3)] = 21
    """Points on each side of the plane, and on each line; an odd number has one at the weights themselves."""
    radius: Positive = 1.0
    """Furthest step along a direction, in units of the norm of each filter."""
    levels: tuple[Positive, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Losses of the contours, the same for all runs."""
    rise: Positive = 0.1
    """The basin is where the loss is below that of the weights plus this."""
    directions: Several = 5  # two for the plane, and one line has no deviation
    """Random lines, for a mean and a deviation; the first two directions span the plane."""
    seed: Whole = 0
    """Of all random directions, the same for all runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ArgumentError(f"`levels` must be at least one number, in ascending order; got {self.levels}.")


def load(folders: Sequence[Path], data_dir: Path | None, report: compiled.Report, images: int) -> dict[str, Saved]:
    """Runs by name, with their first images; those of one model share what evaluates them."""
    names = _names(folders)
    runs = saved.load(folders, data_dir, report, images, lambda config: config.task.model).values()
    return {name: run._replace(test=run.test.first(images)) for name, run in zip(names, runs, strict=True)}


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two have the same last part."""
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise ArgumentError(f"`folders` must name each run once; got {folder} twice.")
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def around(config: LandscapeConfig, network: Saved, report: compiled.Report) -> dict[str, Any]:
    """The lines and the plane through the weights of one run, and the size of the basin in them, as JSON values.

    BatchNorm normalises by the running statistics of the run at every point.
    """
    params = network.variables["params"]

    def loss_fn(params: PyTree) -> dict[str, float]:
        return network.trainer.evaluate(network.variables | {"params": params}, network.train)

    key = jax.random.key(config.seed)
    directions = [landscape.filter_normalized(params, jax.random.fold_in(key, i)) for i in range(config.directions)]
    steps = np.linspace(-config.radius, config.radius, config.points)
    center = loss_fn(params)
    lines = [
        landscape.line(loss_fn, params, direction, steps, report=functools.partial(report, f"line {i}")).values["loss"]
        for i, direction in enumerate(directions, 1)
    ]
    in_plane = functools.partial(report, "plane")
    plane = landscape.plane(loss_fn, params, (directions[0], directions[1]), steps, steps, report=in_plane).values
    limit = center["loss"] + config.rise
    widths = [fraction_below(steps, line, limit) for line in lines]
    return {
        "center": center,
        "steps": steps.tolist(),
        "lines": [line.tolist() for line in lines],
        "plane": {name: value.tolist() for name, value in plane.items()},
        "not_finite": int(np.sum(~np.isfinite([*lines, *plane["loss"]]))),
        "basin": {"line": Spread.of(widths)._asdict(), "plane": fraction_below(steps, plane["loss"], limit)},
    }


def fraction_below(steps: np.ndarray, losses: np.ndarray, limit: float) -> float:
    """The fraction of a line, or of the disk that touches the sides of a plane, where the loss is below a limit.

    Of all points x with |x| <= radius, those with L(x) < limit, L being interpolated linearly between the steps: (n,)
    of a line, (n, n) of a plane. What is not finite is not below.
    """
    fine = np.linspace(steps[0], steps[-1], 2 * FINE + 1)
    values, is_inside = losses, np.ones((), bool)
    with np.errstate(invalid="ignore"):
        for axis in range(losses.ndim):
            values = np.apply_along_axis(lambda x: np.interp(fine, steps, x), axis, values)
    if losses.ndim == 2:
        is_inside = np.hypot(*np.meshgrid(fine, fine)) <= steps[-1] * (1 + 1e-9)
    return float(np.mean((values < limit)[np.broadcast_to(is_inside, values.shape)]))


def between(first: Saved, second: Saved, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Loss and accuracy along the straight line from the first run to the second, and its barriers, as JSON values.

    The images are those of the first run, and the statistics of BatchNorm are estimated anew on its training images
    at every point, the two networks included.
    """
    batches = saved.batched(first.train.images)

    def loss_fn(params: PyTree) -> dict[str, dict[str, float]]:
        variables = saved.with_statistics_of(batches, first.trainer, first.variables | {"params": params})
        return {split: first.trainer.evaluate(variables, getattr(first, split)) for split in SPLITS}

    params = first.variables["params"], second.variables["params"]
    found = landscape.interpolate(loss_fn, *params, BETWEEN, report=report)
    values, barriers = {}, {}
    for split in SPLITS:
        part = found.values[split]
        values[split] = {name: x.tolist() for name, x in part.items()}
        errors = {"loss": part["loss"], "error": 1 - part["accuracy"]}
        barriers[split] = {name: landscape.barrier(found.steps, x) for name, x in errors.items()}
    return {"steps": found.steps.tolist(), **values, "barriers": barriers}

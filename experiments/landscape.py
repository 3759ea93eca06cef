"""Draws the loss around saved runs: `python -m experiments.landscape runs/sgd runs/hero`.

The mean training loss along random filter-normalized lines and on a plane through the weights of each run, the same
random draws for all, and along the straight line from the first run to each other one of its architecture. Leaves
landscape.json, lines.png, plane.png and, where there is a second run of the same architecture, between.png.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import cli, data, progress
from experiments.analysis import plots, tables
from experiments.config import TrainConfig
from experiments.storage import environment, files
from experiments.training import compiled
from hero_jax import errors, landscape
from hero_jax.evaluate import Spread
from hero_jax.quantize import linen

PyTree = Any
Report = Callable[[str, int, int], None]
# From a quarter before the first network to a quarter after the second, in sixteenths: both are among them.
BETWEEN = np.arange(-4, 21) / 16
SPLITS = ("train", "test")
STATISTICS_BATCH = 128
# Steps across the radius, to which values are interpolated to measure a basin.
FINE = 200


@dataclasses.dataclass(frozen=True)
class LandscapeConfig:
    """What to draw."""

    images: int = 1000
    """The loss is the mean over the first so many training images, without augmentation."""
    points: int = 21
    """Points on each side of the plane, and on each line; an odd number has one at the weights themselves."""
    radius: float = 1.0
    """Furthest step along a direction, in units of the norm of each filter."""
    levels: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Losses of the contours, the same for all runs."""
    rise: float = 0.1
    """The basin is where the loss is below that of the weights and so much."""
    directions: int = 5
    """Random lines, for a mean and a deviation; the first two directions span the plane."""
    seed: int = 0
    """Of all random directions, the same for all runs."""

    def __post_init__(self) -> None:
        errors.integer("images", self.images, low=1)
        errors.integer("points", self.points, low=3)
        # Two for the plane, and one line has no deviation.
        errors.integer("directions", self.directions, low=2)
        errors.integer("seed", self.seed, low=0)
        for name in ("radius", "rise"):
            errors.positive(name, getattr(self, name))
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"`levels` must be at least one number, in ascending order; got {self.levels}.")
        for level in self.levels:
            errors.positive("levels", level)


class Network(NamedTuple):
    """A saved run, and what evaluates it."""

    config: TrainConfig
    trainer: compiled.Trainer
    variables: PyTree
    train: data.Split
    test: data.Split


def load(folders: Sequence[Path], data_dir: Path | None, report: Report, images: int) -> dict[str, Network]:
    """Run folders as `Network`s by name, with their first images; those of one model share what is compiled.

    Raises ValueError where a run is given twice, or where their data sets differ.
    """
    names = _names(folders)
    loaded: dict[str, Network] = {}
    shared: dict[str, compiled.Trainer] = {}
    for name, folder in zip(names, folders, strict=True):
        config, trainer, variables, dataset = compiled.load(folder, data_dir, report)
        # Its evaluation depends on the model and the data set only.
        trainer = shared.setdefault(str(config.model), trainer)
        loaded[name] = Network(config, trainer, variables, dataset.train.first(images), dataset.test.first(images))
    datasets = {network.config.dataset for network in loaded.values()}
    if len(datasets) > 1:
        raise ValueError(f"`folders` must be of one data set; got {', '.join(sorted(datasets))}.")
    return loaded


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two have the same last part."""
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise ValueError(f"`folders` must name each run once; got {folder} twice.")
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def around(config: LandscapeConfig, network: Network, report: Report) -> dict[str, Any]:
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
    lines = []
    for i, direction in enumerate(directions):
        line_report = functools.partial(report, f"line {i + 1}")
        lines.append(landscape.line(loss_fn, params, direction, steps, report=line_report).values["loss"])
    plane_report = functools.partial(report, "plane")
    plane = landscape.plane(loss_fn, params, tuple(directions[:2]), steps, steps, report=plane_report).values
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


def between(first: Network, second: Network, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Loss and accuracy along the straight line from the first run to the second, and its barriers, as JSON values.

    The images are those of the first run, and the statistics of BatchNorm are estimated anew on its training images
    at every point, the two networks included.
    """
    images = first.train.images
    batches = [images[i : i + STATISTICS_BATCH] for i in range(0, len(images), STATISTICS_BATCH)]

    def loss_fn(params: PyTree) -> dict[str, dict[str, float]]:
        variables = first.variables | {"params": params}
        if jax.tree.leaves(first.variables["batch_stats"]):
            stats = linen.reestimate_batch_stats(
                lambda stats, images: first.trainer.statistics({"params": params, "batch_stats": stats}, images),
                variables["batch_stats"],
                batches,
            )
            variables = variables | {"batch_stats": stats}
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


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    config: Annotated[LandscapeConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Draws the loss around saved runs, along random lines and on a plane, and between those of one architecture.

    Args:
        folders: Run folders with a checkpoint, all of one data set.
        config: What to draw.
        out: Folder for the results, new or empty; default landscape in the first run.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    if not folders:
        raise ValueError("`folders` must name at least one run folder; got none.")
    out = out or folders[0] / "landscape"
    started = time.monotonic()
    with progress.bar() as display:
        report = progress.steps(display)
        networks = load(folders, data_dir, report, config.images)
        files.claim(out, besides=("lines.png", "plane.png", "between.png"))
        surfaces = {
            name: around(config, network, lambda what, *steps, name=name: report(f"{name} {what}", *steps))
            for name, network in networks.items()
        }
        (origin, first), *others = networks.items()
        segments = {
            name: between(first, network, functools.partial(report, f"{origin} to {name}"))
            for name, network in others
            if network.config.model == first.config.model
        }
    methods = {name: network.config.method for name, network in networks.items()}
    record = {
        "config": files.to_json(config),
        "images": {name: network.train.size for name, network in networks.items()},
        "runs": surfaces,
        "between": {"first": origin, "to": segments},
    }
    plots.landscape_lines(surfaces, methods, out / "lines.png")
    plots.landscape_planes(surfaces, config.levels, out / "plane.png")
    if segments:
        plots.landscape_between(origin, segments, methods, out / "between.png")
    # Last, so that a folder with it is whole.
    files.write_json(out / "landscape.json", record | {"environment": environment.current()})
    header = ["run", "loss", "accuracy", "basin, line", "basin, plane", "not finite"]
    cli.console.print(tables.terminal(header, [_line(name, found) for name, found in surfaces.items()]))
    cli.console.print(
        f"Mean cross-entropy over {first.train.size:,} training images, running BatchNorm statistics, no"
        f" augmentation. Basin: percent of the steps up to {config.radius:g} along {config.directions} random"
        f" filter-normalized lines (mean \u00b1 standard deviation), and of the disk of that radius in the plane of the"
        f" first two, where the loss is less than {config.rise:g} above that of the run."
    )
    if segments:
        header = ["to", "train loss", "train error", "test loss", "test error"]
        lines = [[name, *_barriers(found)] for name, found in segments.items()]
        cli.console.print(tables.terminal(header, lines, f"barriers on the straight line from {origin}"))
        cli.console.print(
            "Barrier: most by which loss, or error in percent, rises above the line through the two runs."
        )
    cli.console.print(f"{time.monotonic() - started:.0f} s. Results are in {out}.")


def _line(name: str, found: dict[str, Any]) -> list[str]:
    center, basin = found["center"], found["basin"]
    line = tables.cell(100 * basin["line"]["mean"], 100 * basin["line"]["std"], (".1f", ".1f"))
    figures = [f"{center['loss']:.4f}", f"{center['accuracy']:.2%}", line, f"{100 * basin['plane']:.1f}"]
    return [name, *figures, str(found["not_finite"])]


def _barriers(found: dict[str, Any]) -> list[str]:
    parts = [found["barriers"][split] for split in SPLITS]
    return [text for part in parts for text in (f"{part['loss']:.3f}", f"{100 * part['error']:.2f}")]


if __name__ == "__main__":
    cli.run(main)

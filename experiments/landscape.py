"""Draws the loss around saved runs: `python -m experiments.landscape runs/sgd runs/hero`.

The mean training loss along random filter-normalized lines and on a plane through the weights of each run, and along
the straight line from the first run to each other one of its architecture. Leaves landscape.json and a plot of each.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, progress
from experiments.analysis import curvature, plots, tables
from experiments.measure.landscape import LandscapeConfig, around, between, load
from experiments.storage import claims, environment, records


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
    started = time.monotonic()
    with progress.bar() as display:
        report = progress.steps(display)
        networks = load(folders, data_dir, report, config.images)
        out = out or folders[0] / "landscape"
        with claims.results(out, ("lines.png", "plane.png", "between.png")):
            surfaces = {
                name: around(config, network, lambda what, *steps, name=name: report(f"{name} {what}", *steps))
                for name, network in networks.items()
            }
            (origin, first), *others = networks.items()
            segments = {
                name: between(first, network, functools.partial(report, f"{origin} to {name}"))
                for name, network in others
                if network.config.task.model == first.config.task.model
            }
            methods = {name: network.config.method.name for name, network in networks.items()}
            plots.landscape_lines(surfaces, methods, out / "lines.png")
            plots.landscape_planes(surfaces, config.levels, out / "plane.png")
            if segments:
                plots.landscape_between(origin, segments, methods, out / "between.png")
            record = {
                "config": claims.to_json(config),
                "images": {name: network.train.size for name, network in networks.items()},
                "runs": surfaces,
                "between": {"first": origin, "to": segments},
                "environment": environment.current(),
            }
            records.write(out / "landscape.json", record)
    header, lines = curvature.basins(surfaces)
    lines = [[*line, str(found["not_finite"])] for line, found in zip(lines, surfaces.values(), strict=True)]
    cli.console.print(tables.terminal([*header, "not finite"], lines))
    cli.console.print(
        f"Mean cross-entropy, and accuracy in percent, over {first.train.size:,} training images, running BatchNorm"
        f" statistics, no augmentation. Basin: percent of the steps up to {config.radius:g} along {config.directions}"
        f" random filter-normalized lines (mean \u00b1 standard deviation), and of the disk of that radius in the plane"
        f" of the first two, where the loss is less than {config.rise:g} above that of the run."
    )
    if segments:
        title = f"barriers on the straight line from {origin}"
        cli.console.print(tables.terminal(*curvature.barriers(segments), title))
        text = "Barrier: most by which loss, or error in percent, rises above the line through the two runs."
        cli.console.print(text)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Results are in {out}.")


if __name__ == "__main__":
    cli.run(main)

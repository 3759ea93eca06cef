"""Images a second in training, by layout, devices and steps in a call: `python -m benchmarks.throughput`.

The trainer itself is measured: its data on the device, its augmentation, its step, on random images. An epoch of each
row is timed in turn, one row after the other, so that a slow minute of the machine falls on all of them alike; what is
printed is the median over epochs after one that is not timed, which compiles. Devices that a CPU simulates share its
cores: there the rows say what a layout adds to the work of one device, and nothing of how it scales.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments import cli, data
from experiments.config import DTYPES, METHODS, PARALLEL, TrainConfig, resolve
from experiments.storage import claims, environment, records
from experiments.training import compiled
from hero_jax import errors, models

LAYOUTS = (*PARALLEL, "sharded")
SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    methods: tuple[str, ...] = ("sgd", "hero")
    """Methods, with the hyper-parameters of the preset."""
    dataset: str = "cifar10"
    """Images of the size of digits or cifar10, with its augmentation; random ones, nothing is read."""
    model: str | None = None
    """A name in hero_jax.models; default the preset."""
    layouts: tuple[str, ...] = ("none",)
    """none (one device), pmap, jit, sharded (jit with parameters split over the devices)."""
    devices: tuple[int, ...] = (1,)
    """Devices of the layouts but none; a CPU simulates as many as the largest."""
    steps_per_call: tuple[int, ...] = (1,)
    """Steps in one compiled call."""
    dtypes: tuple[str, ...] = ("float32",)
    """Types of computation, float32 and bfloat16."""
    batch_size: int | None = None
    """Images a step; default the preset."""
    steps: int = 8
    """Steps of an epoch."""
    repeats: int = 5
    """Epochs that are timed."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for method in self.methods:
            errors.one_of("methods", method, METHODS)
        for layout in self.layouts:
            errors.one_of("layouts", layout, LAYOUTS)
        for dtype in self.dtypes:
            errors.one_of("dtypes", dtype, DTYPES)
        errors.one_of("dataset", self.dataset, SHAPES)
        if self.model is not None:
            errors.one_of("model", self.model, models.MODELS)
        for count in (*self.devices, *self.steps_per_call, self.steps):
            errors.integer("devices, steps_per_call and steps", count, low=1)
        errors.integer("repeats", self.repeats, low=2)

    def configurations(self) -> list[TrainConfig]:
        """The runs to measure, one a row."""
        found = []
        for method in self.methods:
            for dtype in self.dtypes:
                for layout in self.layouts:
                    for devices in (None,) if layout == "none" else self.devices:
                        for steps in self.steps_per_call:
                            config = resolve(
                                method=method,
                                dataset=self.dataset,
                                model=self.model,
                                batch_size=self.batch_size,
                                dtype=dtype,
                                parallel="jit" if layout == "sharded" else layout,
                                shard_params=layout == "sharded",
                                devices=devices,
                                steps_per_call=steps,
                            )
                            found.append(config)
        return found


def random_dataset(name: str, size: int) -> data.Dataset:
    """Random images and labels of the shape of a data set."""
    rng = np.random.default_rng(0)
    shape = SHAPES[name]
    split = data.Split(rng.integers(0, 256, (size, *shape), np.uint8), rng.integers(0, 10, size).astype(np.int32))
    channels = (0.5,) * shape[-1]
    return data.Dataset(split, split, 10, data.Pixels(255.0, channels, channels, augment=name != "digits"))


def epoch(config: TrainConfig, dataset: data.Dataset) -> Callable[[], float]:
    """An epoch that returns its seconds when called."""
    trainer = compiled.build(config, dataset)
    images, labels = trainer.layout.replicate(dataset.train)
    state = trainer.init(0)
    order = data.epoch_order(0, 0, dataset.train.size, config.budget.batch_size)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        losses: Any = None
        if config.pace.steps_per_call > 1:
            for start in range(0, len(order), config.pace.steps_per_call):
                part = order[start : start + config.pace.steps_per_call]
                state, losses = trainer.steps(state, images, labels, part)
        else:
            for indices in order:
                state, losses = trainer.step(state, images, labels, indices)
        jax.block_until_ready((state, losses))
        return time.perf_counter() - started

    return run


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """One row a configuration: images a second, median and quartiles, and seconds to the end of the first epoch."""
    configurations = arguments.configurations()
    dataset = random_dataset(arguments.dataset, arguments.steps * configurations[0].budget.batch_size)
    epochs = [epoch(config, dataset) for config in configurations]
    first = [run() for run in epochs]
    times = [[run() for run in epochs] for _ in range(arguments.repeats)]
    rows = []
    for config, seconds, begun in zip(configurations, zip(*times, strict=True), first, strict=True):
        images = dataset.train.size
        low, _, high = statistics.quantiles(seconds, n=4)
        rows.append(
            {
                "method": config.method.name,
                "dtype": config.layout.dtype,
                "layout": "sharded" if config.layout.shard_params else config.layout.parallel,
                "devices": 1 if config.layout.devices == "all" else config.layout.devices,
                "steps_per_call": config.pace.steps_per_call,
                "images_per_second": images / statistics.median(seconds),
                "quartiles": [images / high, images / low],
                "first_epoch_seconds": begun,
            }
        )
    return rows


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints images a second of each layout; with `--out`, writes the record too."""
    # Without effect on accelerators. The backend must not have been touched.
    jax.config.update("jax_num_cpu_devices", max(arguments.devices))
    rows, where = measure(arguments), environment.current()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("method", "dtype", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("devices", "steps", "images/s", "quartiles", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        names = (row["method"], row["dtype"], row["layout"], str(row["devices"]), str(row["steps_per_call"]))
        low, high = row["quartiles"]
        speeds = (f"{row['images_per_second']:.0f}", f"{low:.0f}-{high:.0f}", f"{row['first_epoch_seconds']:.1f} s")
        table.add_row(*names, *speeds)
    cli.console.print(table)
    config, device = arguments.configurations()[0], where["device"]
    simulated = ", simulated, which share the cores" if device["platform"] == "cpu" and device["count"] > 1 else ""
    cli.console.print(
        f"Training of {config.task.model} on images of {arguments.dataset}, batch {config.budget.batch_size},"
        f" {arguments.steps} steps an epoch, so many in a call: images a second, median and"
        f" quartiles of {arguments.repeats} epochs after the first, which compiles. {device['kind']} x"
        f" {device['count']}{simulated}, {where['machine']['cores']} cores; jax"
        f" {where['versions']['jax']}, python {where['versions']['python']}."
    )
    record = {"arguments": claims.to_json(arguments), "environment": where, "rows": rows}
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

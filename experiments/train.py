"""Trains one network and leaves a run folder: `python -m experiments.train --method hero --dataset digits`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import jax
import tyro

from experiments import cli, data, progress
from experiments.config import TrainConfig
from experiments.storage import runs
from experiments.storage.tensorboard import events
from experiments.training import layouts
from experiments.training.compiled import build, subset
from experiments.training.loop import train


def main(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
    tensorboard: bool = False,
) -> None:
    """Trains one network on one data set and leaves a run folder; the same command continues what was interrupted.

    Several processes (docs/parallel.md) are started by one command each, the same but for --process-id; process 0
    writes and prints. They wait 300 s for all to join, notice after at most 60 s that one has died, and wait 60 s at
    the end.

    Args:
        config: The run.
        out: Run folder, new, empty or that of the same run; default runs/DATASET-MODEL-METHOD-sSEED.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
        coordinator: HOST:PORT of process 0, which must be free there.
        num_processes: Processes in all.
        process_id: Which of them this is, from 0.
        distributed: Ask the cluster (Slurm, Open MPI, Kubernetes, TPU pods) for these three.
        tensorboard: Write the metrics of each epoch to OUT/tensorboard too.
    """
    layouts.join(coordinator, num_processes, process_id, distributed)
    config = layouts.with_devices(config)
    task, epochs = config.task, config.budget.epochs
    out = out or Path("runs") / f"{task.dataset}-{task.model}-{config.method.name}-s{config.seed}"
    is_writer = jax.process_index() == 0
    cli.console.quiet = not is_writer
    cli.console.print(f"{config.method.name} on {task.dataset}, {task.model}, {epochs} epochs, into {out}")
    with progress.bar() as bar, contextlib.ExitStack() as stack:
        dataset = subset(config, data.load(task.dataset, data_dir, progress.decoding(bar, task.dataset)))
        # Before the folder is made: a setting that the data does not allow leaves none.
        trainer = build(config, dataset)
        advance = progress.lines(bar)(config.method.name, epochs)
        folder = stack.enter_context(runs.RunFolder(out, config, config.may_differ())) if is_writer else None
        stack.enter_context(layouts.watched())
        write = stack.enter_context(events(out)) if tensorboard and is_writer else None

        def report(row: dict[str, float]) -> None:
            advance(int(row["epoch"]), row)
            if write is not None:
                write(row)

        result = train(config, dataset, folder, report, trainer)
    if not result.metrics:
        cli.console.print("ended before the first evaluation; the same command continues")
        return
    if config.watch.every != "never" and is_writer:
        from experiments.analysis import plots  # which takes half a second of every command's help

        plots.curvature_along_training(runs.read_metrics(out), out / "curvature.png")
    cli.console.print(
        f"test accuracy {result.metrics['accuracy']:.2%}, loss {result.metrics['loss']:.4f} after the last epoch"
        f" (n = 1 run, {dataset.test.size} images)"
    )


if __name__ == "__main__":
    cli.run(main)

"""Saved runs with what evaluates them, and the statistics of BatchNorm on some of their images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import data
from experiments.config import TrainConfig
from experiments.training import compiled
from hero_jax.errors import ArgumentError
from hero_jax.evaluate import classifier
from hero_jax.quantize import linen

PyTree = Any
BATCH = 128


class Saved(NamedTuple):
    """A saved run; `classify(variables, images, labels)` gives predictions too, running BatchNorm statistics."""

    config: TrainConfig
    trainer: compiled.Trainer
    classify: Callable[..., dict[str, Any]]
    variables: PyTree
    train: data.Split
    test: data.Split | data.Stream


def load(
    folders: Sequence[Path],
    data_dir: Path | None,
    report: compiled.Report,
    images: int,
    alike: Callable[[TrainConfig], Hashable] = lambda config: config.replace(seed=0),
    *,
    all_test: bool = False,
) -> dict[Path, Saved]:
    """Runs by folder, with their first training images; those of which `alike` is the same share what is compiled.

    Raises ArgumentError where there is none, or they are of several data sets. `all_test` is that of `compiled.load`.
    """
    if not folders:
        raise ArgumentError("`folders` must name at least one run folder; got none.")
    loaded: dict[Path, Saved] = {}
    programs: dict[Hashable, Saved] = {}
    splits: dict[TrainConfig, tuple[data.Split, data.Split | data.Stream]] = {}
    for folder in folders:
        config, trainer, variables, dataset = compiled.load(folder, data_dir, report, all_test)
        own = dataset.train.first(images), dataset.test
        # Labels that were altered are those of each seed; else the data are there once.
        if not config.labels.label_noise:
            own = splits.setdefault(config.replace(seed=0), own)
        classify = classifier(trainer.forward, batch_size=compiled.EVAL_BATCH)
        run = Saved(config, trainer, classify, variables, *own)
        like = programs.setdefault(alike(config), run)
        loaded[folder] = run._replace(trainer=like.trainer, classify=like.classify)
    names = {run.config.task.dataset for run in loaded.values()}
    if len(names) > 1:
        raise ArgumentError(f"`folders` must be of one data set; got {', '.join(sorted(names))}.")
    return loaded


def batched(images: np.ndarray) -> list[np.ndarray]:
    return [images[i : i + BATCH] for i in range(0, len(images), BATCH)]


def with_statistics_of(batches: Sequence[np.ndarray], trainer: compiled.Trainer, variables: PyTree) -> PyTree:
    """The variables, with the statistics of BatchNorm, if any, estimated anew on these images."""
    params, stats = variables["params"], variables["batch_stats"]
    if not jax.tree.leaves(stats):
        return variables
    stats = linen.reestimate_batch_stats(
        lambda stats, batch: trainer.statistics({"params": params, "batch_stats": stats}, batch), stats, batches
    )
    return variables | {"batch_stats": stats}

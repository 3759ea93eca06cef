"""Saved runs by network: those that differ in their seed, or in how they were paced, laid out and watched, are one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.config import Layout, Pace, TrainConfig, Watch, resolve

# Fields that say what is measured along a run, and nothing about what it computes.
WATCHED = ("every", "curvature_size")


def network(config: TrainConfig) -> TrainConfig:
    """What the runs of one network share: the configuration with seed 0 and plain in whatever `may_differ`."""
    default = {field.name: field.default for group in (Layout, Pace, Watch) for field in dataclasses.fields(group)}
    return config.replace(seed=0, **{name: default[name] for name in (*config.may_differ(), *WATCHED)})


def by_network(configs: Iterable[tuple[Path, TrainConfig]]) -> dict[TrainConfig, list[Path]]:
    """Runs by what they share; raises ValueError where one network has a seed twice."""
    groups: dict[TrainConfig, list[Path]] = {}
    seen: dict[TrainConfig, Path] = {}
    for path, config in configs:
        shared = network(config)
        with_seed = shared.replace(seed=config.seed)
        if with_seed in seen:
            raise ValueError(
                f"`folders` must differ; {path} has the configuration and seed of another one, {seen[with_seed]}."
            )
        seen[with_seed] = path
        groups.setdefault(shared, []).append(path)
    return groups


def group_runs(configs: Iterable[tuple[Path, TrainConfig]]) -> dict[str, list[Path]]:
    """Runs by the name of their network; raises ValueError where one network has a seed twice."""
    groups = by_network(configs)
    return {name: groups[config] for config, name in names(groups).items()}


def names(networks: Iterable[TrainConfig]) -> dict[TrainConfig, str]:
    """A name for each, no two alike: its method, and the settings that differ among those of that method."""
    among = list(networks)
    return {config: _name(config, among) for config in among}


def _name(config: TrainConfig, among: Iterable[TrainConfig]) -> str:
    """The label of the method, with the settings that are not those of most networks of that method.

    Where no value is that of most of them, that of most networks of every method goes without saying (the epochs, say),
    and where there is none either, the preset, or what is taken without one.
    """
    every = [other.flat() for other in among]
    rivals = [other for other in every if other["method"] == config.method.name]
    task, method = config.task, config.method
    penalty = None if method.penalty == "none" else method.penalty
    preset = resolve(method.name, task.dataset, model=task.model, penalty=penalty).flat()
    settings = []
    for name, value in config.flat().items():
        if name == "sigma" and value == "none":
            continue  # the noise is that of the bits, which are named
        usual = _of_most(rivals, name)
        if usual is None and not hasattr(method, name):
            usual = _of_most(every, name)
        if value != (preset[name] if usual is None else usual[0]):
            settings.append(f"{name} {value}")
    return method.label + (f" ({', '.join(settings)})" if settings else "")


def _of_most(configs: Iterable[Mapping[str, Any]], name: str) -> tuple[Any] | None:
    """The one value of a field that is more frequent than any other."""
    counts = Counter(config[name] for config in configs).most_common(2)
    return (counts[0][0],) if len(counts) == 1 or counts[0][1] > counts[1][1] else None

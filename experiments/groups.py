"""Saved runs by network: those that differ in their seed, or in how they were paced, laid out and watched, are one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from experiments import presets
from experiments.config import LABELS, TAKES, TrainConfig

# Fields that say what is measured along a run, and nothing about what it computes.
WATCHED = ("every", "curvature_size")


def network(config: TrainConfig) -> TrainConfig:
    """What the runs of one network share: the configuration with seed 0 and plain in whatever `may_differ`."""
    plain = {name: getattr(TrainConfig, name) for name in (*config.may_differ(), *WATCHED)}
    return dataclasses.replace(config, seed=0, **plain)


def by_network(configs: Iterable[tuple[Path, TrainConfig]]) -> dict[TrainConfig, list[Path]]:
    """Runs by what they share; raises ValueError where one network has a seed twice."""
    groups: dict[TrainConfig, list[Path]] = {}
    seen: dict[TrainConfig, Path] = {}
    for path, config in configs:
        shared = network(config)
        with_seed = dataclasses.replace(shared, seed=config.seed)
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

    Where no value is that of most, the preset, or what is taken without one, goes without saying.
    """
    rivals = [dataclasses.asdict(other) for other in among if other.method == config.method]
    takes = TAKES[config.method]
    preset = presets.of(config.dataset, config.model, config.method, config.penalty, takes)
    settings = []
    for name, value in dataclasses.asdict(config).items():
        counts = Counter(rival[name] for rival in rivals).most_common(2)
        has_most = len(counts) == 1 or counts[0][1] > counts[1][1]
        usual = counts[0][0] if has_most else preset.get(name, getattr(TrainConfig, name))
        if value != usual:
            settings.append(f"{name} {value}")
    return LABELS[config.method] + (f" ({', '.join(settings)})" if settings else "")

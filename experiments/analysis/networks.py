"""Saved runs by network: those that differ in their seed, or in how they were paced, laid out and watched, are one."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.config import LABELS, METHODS, TrainConfig, resolve
from experiments.config.fields import types_of

Settings = dict[str, Any]
# Fields that say what is measured along a run, and nothing about what it computes.
WATCHED = ("every", "curvature_size")
WORDS = (None, "all", "none", "never")


def settings(config: TrainConfig) -> Settings:
    """The settings of a run by name; None where the method has none of the name, or a word such as "all" stands."""
    flat = config.flat()
    return {name: None if flat.get(name) in WORDS else flat[name] for name in TrainConfig.settings()}


def network(config: TrainConfig) -> Settings:
    """What the runs of one network share: the settings with seed 0 and plain in whatever `may_differ`."""
    plain, own = settings(resolve("sgd")), {"seed", *config.may_differ(), *WATCHED}
    return {name: plain[name] if name in own else value for name, value in settings(config).items()}


def key(of: Mapping[str, Any]) -> tuple[tuple[bool, Any], ...]:
    """What tells the settings of networks apart; in its order None comes first."""
    return tuple((value is not None, value) for value in of.values())


def refuse_twice(runs: Iterable[tuple[Path, Hashable]]) -> None:
    """Raises ValueError where two runs, told by what they computed, are the same."""
    seen: dict[Hashable, Path] = {}
    for path, computed in runs:
        if computed in seen:
            raise ValueError(
                f"`folders` must differ; {path} has the configuration and seed of another one, {seen[computed]}."
            )
        seen[computed] = path


def group_runs(configs: Iterable[tuple[Path, TrainConfig]]) -> dict[str, list[Path]]:
    """Runs by the name of their network; raises ValueError where one network has a seed twice."""
    runs = [(path, network(config), config.seed) for path, config in configs]
    refuse_twice((path, (key(shared), seed)) for path, shared, seed in runs)
    named = names(shared for _, shared, _ in runs)
    groups: dict[str, list[Path]] = {}
    for path, shared, _ in runs:
        groups.setdefault(named[key(shared)], []).append(path)
    return groups


def names(networks: Iterable[Settings]) -> dict[tuple[Any, ...], str]:
    """A name for each by its `key`, no two alike: its method, and the settings that differ among those of it.

    They are in the order in which they are shown: methods as they are listed, the plain one first, then by setting.
    """
    among = {key(each): each for each in networks}
    named = {found: _name(each, list(among.values())) for found, each in among.items()}
    methods = {found: each["method"] for found, each in among.items()}
    order = sorted(named, key=lambda k: (list(METHODS).index(methods[k]), named[k] != LABELS[methods[k]], k))
    return {found: named[found] for found in order}


def _name(own: Settings, among: Iterable[Settings]) -> str:
    """The label of the method, with the settings that are not those of most networks of that method.

    Where no value is that of most of them, that of most networks of every method goes without saying (the epochs, say),
    and where there is none either, the preset, or what is taken without one.
    """
    method = own["method"]
    rivals = [other for other in among if other["method"] == method]
    of_method = {name: own[name] for name in ("method", "dataset", "model")}
    # Other settings depend on the penalty, and it does not depend on itself.
    preset = settings(resolve(**of_method, penalty=own["penalty"]))
    preset |= {"penalty": settings(resolve(**of_method))["penalty"]}
    told = []
    for name, value in own.items():
        if name == "sigma" and value is None and own["noise_bits"] is not None:
            continue  # the noise is that of the bits, which are named
        usual = statistics.multimode(other[name] for other in rivals)
        if len(usual) > 1 and name not in types_of(METHODS[method]):
            usual = statistics.multimode(other[name] for other in among)
        if value != (usual[0] if len(usual) == 1 else preset[name]):
            told.append(f"{name} {value}")
    return LABELS[method] + (f" ({', '.join(told)})" if told else "")

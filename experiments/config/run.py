"""What one training run is: its method, its task, its budget, how it lies on devices, what is measured along it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from experiments.config import methods, presets
from experiments.config.fields import Whole, types_of
from experiments.config.groups import Budget, Grouped, Labels, Layout, Optimizer, Pace, Task, Watch
from hero_jax.errors import ArgumentError, one_of


@dataclasses.dataclass(frozen=True)
class TrainConfig(Grouped):
    """One training run."""

    method: methods.Method
    task: Task
    budget: Budget
    optimizer: Optimizer
    labels: Labels
    layout: Layout
    watch: Watch
    pace: Pace
    validation_size: Whole = 0
    """Hold this many training images out, and evaluate on them too: what is chosen is chosen there."""
    seed: Whole = 0
    """Of initial weights, data order and augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method, layout = self.method, self.layout
        if method.ascent_decay != "none" and not layout.sync and not isinstance(method, methods.Msam):
            decay = method.ascent_decay
            raise ArgumentError(f"`ascent_decay` needs sync True: a momentum is of all devices; got {decay}.")
        if method.product == "difference" and layout.dtype != "float32":
            raise ArgumentError(f"`product` must be 'exact' with dtype {layout.dtype}; got 'difference'.")

    @classmethod
    def of_saved(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration that a run folder has saved; a setting that is younger than the folder has its default.

        Raises:
          ArgumentError: a setting without a default is not there: presets of today say nothing of that run.
        """
        made = super().of_saved(settings)
        fields = (field for kind in cls.groups(made.flat()).values() for field in dataclasses.fields(kind))
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        for name in [*needed, "method"]:
            if name not in settings:
                raise ArgumentError(f"`{name}` must be saved, since it has no default; got nothing.")
        return made

    @classmethod
    def presets(cls, dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is taken on a data set by the method that is given, or HERO."""
        found = presets.settings(dataset, given.get("method", "hero"), given.get("penalty"))
        if given.get("noise_bits", "none") != "none" and "sigma" in found:
            found |= {"sigma": "none"}  # the noise of NSO is that of the bits
        return super().presets(dataset, given) | found

    @classmethod
    def groups(cls, settings: Mapping[str, Any]) -> dict[str, type]:
        """Those with the method; raises ArgumentError for a setting that the method, or HERO, does not have."""
        method = settings.get("method", "hero")
        one_of("method", method, methods.METHODS)
        methods.refuse_others(method, settings)
        return super().groups(settings) | {"method": methods.METHODS[method]}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The type of every setting, by name; those of all methods too."""
        return methods.SETTINGS | super().settings()

    def evaluated_epochs(self) -> list[int]:
        """The epochs, from 1, after which a run is evaluated."""
        watch, last = self.watch, self.budget.epochs
        every = [watch.eval_every, *([] if watch.every == "never" else [watch.every])]
        return [epoch for epoch in range(1, last + 1) if epoch == last or any(epoch % n == 0 for n in every)]

    def may_differ(self) -> set[str]:
        """The settings in which parts of one run may differ: what it gives does not depend on them.

        The layout is one of them, unless it says what is perturbed, or normalized in BatchNorm, together.
        """
        has_parts = not self.layout.sync or self.layout.microbatch_size != "all"
        layout = set() if has_parts else {"parallel", "devices", "shard_params", "shard_devices"}
        return {*types_of(Pace), "remat", *layout}

    def on_one_device(self) -> TrainConfig:
        """This configuration for work on its results, which needs no layout."""
        sync = self.layout.sync or self.layout.parallel != "none"
        whole: dict[str, Any] = {"parallel": "none", "devices": "all", "shard_params": False, "shard_devices": "all"}
        return self.replace(**whole, sync=sync, **dataclasses.asdict(Pace()))


def resolve(method: str = "hero", dataset: str = "digits", **settings: Any) -> TrainConfig:
    """`TrainConfig.resolve`."""
    return TrainConfig.resolve(dataset, method=method, **settings)

"""The groups of settings that configurations are made of, and what makes a configuration of groups.

A setting has one name in all groups, so that flags and saved configurations need no groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from experiments.config import presets
from experiments.config.fields import Checked, Count, Fraction, NonNegative, Positive, types_of
from hero_jax import models
from hero_jax.errors import ArgumentError, one_of

Dataset = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "imagenette", "imagenet2012"]
LabelNoise = Literal["symmetric", "uniform", "asymmetric"]
Parallel = Literal["none", "pmap", "shard_map", "jit"]
Dtype = Literal["float32", "bfloat16"]
LABEL_NOISE_KINDS, PARALLEL, DTYPES = map(get_args, (LabelNoise, Parallel, Dtype))


class Grouped(Checked):
    """A dataclass of groups, which are dataclasses, and of settings of its own."""

    @classmethod
    def resolve(cls, dataset: str = "digits", **settings: Any) -> Self:
        """The configuration with these settings, by name; what is left out, or None, takes the preset or the default.

        Raises ArgumentError for a value that is not allowed, and TypeError for a name that no setting has.
        """
        one_of("dataset", dataset, presets.DATASETS)
        given = {name: value for name, value in settings.items() if value is not None}
        return cls.of(cls.presets(dataset, given) | given | {"dataset": dataset})

    @classmethod
    def of_saved(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration that a folder has saved."""
        return cls.resolve(**settings)

    @classmethod
    def presets(cls, dataset: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is taken on a data set beside the settings that are given."""
        names = {name for kind in cls.groups({}).values() for name in types_of(kind)}
        return {name: x for name, x in presets.budget(dataset, given.get("model")).items() if name in names}

    @classmethod
    def groups(cls, settings: Mapping[str, Any]) -> dict[str, type]:
        """The types of the fields that are groups, in the configuration with these settings."""
        return {
            name: kind for name, kind in types_of(cls).items() if isinstance(kind, type) and issubclass(kind, Checked)
        }

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration with these settings, and defaults alone for the others."""
        left = dict(settings)
        made = {
            group: kind(**{name: left.pop(name) for name in types_of(kind) if name in left})
            for group, kind in cls.groups(settings).items()
        }
        made |= {name: left.pop(name) for name in types_of(cls) if name in left}
        if left:
            raise TypeError(f"`{next(iter(left))}` is no setting of {cls.__name__}.")
        return cls(**made)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The type of every setting, by name."""
        groups = cls.groups({})
        found = {name: kind for name, kind in types_of(cls).items() if name not in groups}
        return found | {name: kind for group in groups.values() for name, kind in types_of(group).items()}

    def flat(self) -> dict[str, Any]:
        """All settings by name, as they are saved."""
        found: dict[str, Any] = {}
        for name in types_of(type(self)):
            value = getattr(self, name)
            found |= dataclasses.asdict(value) if isinstance(value, Checked) else {name: value}
        return found

    def replace(self, **settings: Any) -> Self:
        """This configuration with other settings, given by name."""
        return self.of(self.flat() | settings)


@dataclasses.dataclass(frozen=True)
class Task(Checked):
    """What is learned, from what."""

    dataset: Dataset
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
    model: str
    """A name in hero_jax.models."""
    train_size: Count | Literal["all"] = "all"
    """Train on this many images, a random subset that is the same for every seed."""
    test_size: Count | Literal["all"] = "all"
    """Evaluate on this many test images, a random subset that is the same for every run."""
    augment: bool = True
    """Random crops and flips, where the data set is trained with them; False: every epoch has the images as they
    are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model", self.model, models.MODELS)


@dataclasses.dataclass(frozen=True)
class Labels(Checked):
    """What is done to the labels of training."""

    label_noise: Fraction = 0.0
    """Share of the training images whose label is altered; every evaluation is on clean labels."""
    label_noise_kind: LabelNoise = "symmetric"
    """symmetric (uniform over the other classes), uniform (over all, the true one included), or asymmetric (the class
    that is taken for it, docs/data.md)."""


@dataclasses.dataclass(frozen=True)
class Budget(Checked):
    """How long it is learned."""

    epochs: Count
    """Passes over the training images; the learning rate falls by a cosine, once per epoch."""
    batch_size: Count
    """Images per step. The last, smaller batch of an epoch is left out."""


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    """What every method descends with: SGD, momentum 0.9, cosine."""

    learning_rate: NonNegative
    """Peak learning rate."""
    weight_decay: NonNegative
    """Coupled weight decay on all parameters, taken at the unperturbed weights."""
    learning_rate_floor: Fraction = 0.0
    """Share of the peak that the cosine falls to."""


@dataclasses.dataclass(frozen=True)
class Watch(Checked):
    """What is measured along training."""

    eval_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    every: Count | Literal["never"] = "never"
    """Epochs between measurements of the top Hessian eigenvalue and the Hessian norm."""
    curvature_size: Count = 1000
    """Training images (the first ones) that `every` measures on."""


@dataclasses.dataclass(frozen=True)
class Pace(Checked):
    """When a run pauses or asks the host; nothing about what it computes."""

    save_minutes: NonNegative = 5.0
    """Time between checkpoints; the end is always saved."""
    max_minutes: Positive | Literal["never"] = "never"
    """End when this much time has passed, with a checkpoint that the same command continues."""
    steps_per_call: Count = 1
    """Steps in one compiled call; as many as an epoch has make it one call. XLA:CPU runs convolutions in such a loop
    forty times slower."""


@dataclasses.dataclass(frozen=True)
class Layout(Checked):
    """How a step is computed, on which devices."""

    parallel: Parallel = "none"
    """none (one device), pmap or shard_map (data parallel), or jit (over a mesh); the result is the same."""
    devices: Count | Literal["all"] = "all"
    """Devices to use, those of all processes together (not with none)."""
    shard_params: bool = False
    """Split parameters and optimizer state over the devices instead of a copy on each (jit)."""
    shard_devices: Count | Literal["all"] = "all"
    """Neighbours that share a copy with `--shard-params`: with 8, on hosts of eight devices, every host has one."""
    sync: bool = True
    """Perturb, and normalize in BatchNorm, by the whole batch; False: by the part of it on each device (pmap,
    shard_map) or in each of `groups` (none), which is m-sharpness."""
    groups: Count = 1
    """Equal parts of the batch that `--no-sync` perturbs alone on one device."""
    microbatch_size: Count | Literal["all"] = "all"
    """Images that a pass takes at a time (on each device under pmap and shard_map), to save memory: the same gradients
    and products, except that BatchNorm normalizes by these images alone. XLA:CPU runs convolutions in such a loop forty
    times slower."""
    remat: bool = False
    """Keep only the outputs of convolutions and products until a pass goes backwards, and compute the rest again, to
    save memory: docs/parallel.md says how much, and where."""
    dtype: Dtype = "float32"
    """Type of computation in a step; parameters, statistics, loss and all that is measured are float32 in both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel == "none" and self.devices not in ("all", 1):
            raise ArgumentError(f"`devices` must be 1 with parallel 'none'; got {self.devices}.")
        if self.shard_params and self.parallel != "jit":
            raise ArgumentError(f"`shard_params` needs parallel 'jit'; got parallel {self.parallel!r}.")
        if self.shard_devices != "all" and not self.shard_params:
            raise ArgumentError(f"`shard_devices` has no effect without `shard_params`; got {self.shard_devices}.")
        if not self.sync and self.parallel == "jit":
            raise ArgumentError("`sync` must be True with parallel 'jit', where XLA sees one batch; got False.")
        if not self.sync and self.parallel == "none" and self.groups == 1:
            raise ArgumentError("`sync` must be True on one device without `groups` to differ; got False and groups 1.")
        if self.groups > 1 and (self.sync or self.parallel != "none"):
            raise ArgumentError(
                f"`groups` needs sync False and parallel 'none' (mapped, a device is a group); got {self.groups} with"
                f" sync {self.sync} and parallel {self.parallel!r}."
            )

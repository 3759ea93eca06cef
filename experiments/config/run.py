"""What a run is: its method, its task, its budget, how it lies on devices, what is measured along it.

A configuration is resolved: every field has the value that the run takes. `resolve` makes one of settings by name, with
the presets (`presets`) for those that are left out; `flat` gives the settings back, and `of_saved` takes those of a run
folder, older ones included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.config import methods, presets
from experiments.config.fields import Count, Fraction, NonNegative, Positive, Whole, check
from hero_jax import models
from hero_jax.errors import ArgumentError, one_of

Dataset = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "imagenette", "imagenet2012"]
LabelNoise = Literal["symmetric", "uniform", "asymmetric"]
Parallel = Literal["none", "pmap", "jit"]
Dtype = Literal["float32", "bfloat16"]
LABEL_NOISE_KINDS, PARALLEL, DTYPES = map(get_args, (LabelNoise, Parallel, Dtype))


class _Checked:
    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class Task(_Checked):
    """What is learned, from what."""

    dataset: Dataset
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
    model: str
    """A name in hero_jax.models."""
    train_size: Count | Literal["all"] = "all"
    """Train on this many images, a random subset that is the same for every seed."""
    validation_size: Whole = 0
    """Hold this many training images out, and evaluate on them too: what is chosen is chosen there."""
    test_size: Count | Literal["all"] = "all"
    """Evaluate on this many test images, a random subset that is the same for every run."""
    augment: bool = True
    """Random crops and flips, where the data set is trained with them; False: every epoch has the images as they
    are."""
    label_noise: Fraction = 0.0
    """Share of the training images whose label is altered; every evaluation is on clean labels."""
    label_noise_kind: LabelNoise = "symmetric"
    """symmetric (uniform over the other classes), uniform (over all, the true one included), or asymmetric (the class
    that is taken for it, docs/data.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model", self.model, models.MODELS)


@dataclasses.dataclass(frozen=True)
class Budget(_Checked):
    """How long it is learned."""

    epochs: Count
    """Passes over the training images; the learning rate falls to 0 by a cosine, once per epoch."""
    batch_size: Count
    """Images per step. The last, smaller batch of an epoch is left out."""


@dataclasses.dataclass(frozen=True)
class Optimizer(_Checked):
    """What every method descends with: SGD, momentum 0.9, cosine."""

    learning_rate: NonNegative
    """Peak learning rate."""
    weight_decay: NonNegative
    """Coupled weight decay on all parameters, taken at the unperturbed weights."""


@dataclasses.dataclass(frozen=True)
class Watch(_Checked):
    """What is measured along training."""

    eval_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    every: Count | Literal["never"] = "never"
    """Epochs between measurements of the top Hessian eigenvalue and the Hessian norm."""
    curvature_size: Count = 1000
    """Training images (the first ones) that `every` measures on."""


@dataclasses.dataclass(frozen=True)
class Pace(_Checked):
    """When a run pauses or asks the host; nothing about what it computes."""

    save_minutes: NonNegative = 5.0
    """Time between checkpoints; the end is always saved."""
    max_minutes: Positive | Literal["never"] = "never"
    """End when this much time has passed, with a checkpoint that the same command continues."""
    steps_per_call: Count = 1
    """Steps in one compiled call; as many as an epoch has make it one call. XLA:CPU runs convolutions in such a loop
    forty times slower."""


@dataclasses.dataclass(frozen=True)
class Layout(_Checked):
    """How a step is computed, on which devices."""

    parallel: Parallel = "none"
    """none (one device), pmap (data parallel), or jit (over a mesh); the result is the same."""
    devices: Count | Literal["all"] = "all"
    """Devices to use, those of all processes together (pmap, jit)."""
    shard_params: bool = False
    """Split parameters and optimizer state over the devices instead of a copy on each (jit)."""
    sync: bool = True
    """Perturb, and normalize in BatchNorm, by the whole batch; False: by the part of it on each device (pmap) or in
    each of `groups` (none), which is m-sharpness."""
    groups: Count = 1
    """Equal parts of the batch that `--no-sync` perturbs alone on one device."""
    microbatch_size: Count | Literal["all"] = "all"
    """Images that a pass takes at a time (on each device under pmap), to save memory: the same gradients and products,
    except that BatchNorm normalizes by these images alone. XLA:CPU runs convolutions in such a loop forty times
    slower."""
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
        if not self.sync and self.parallel == "jit":
            raise ArgumentError("`sync` must be True with parallel 'jit', where XLA sees one batch; got False.")
        if not self.sync and self.parallel == "none" and self.groups == 1:
            raise ArgumentError("`sync` must be True on one device without `groups` to differ; got False and groups 1.")
        if self.groups > 1 and (self.sync or self.parallel != "none"):
            raise ArgumentError(
                f"`groups` needs sync False and parallel 'none' (with pmap a device is a group); got {self.groups} with"
                f" sync {self.sync} and parallel {self.parallel!r}."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    method: methods.Method
    task: Task
    budget: Budget
    optimizer: Optimizer
    layout: Layout = Layout()
    watch: Watch = Watch()
    pace: Pace = Pace()
    seed: Whole = 0
    """Of initial weights, data order and augmentation."""

    def __post_init__(self) -> None:
        check(self)
        method, layout = self.method, self.layout
        if method.ascent_decay != "none" and not layout.sync and not isinstance(method, methods.Msam):
            decay = method.ascent_decay
            raise ArgumentError(f"`ascent_decay` needs sync True: a momentum is of all devices; got {decay}.")
        if method.product == "difference" and layout.dtype != "float32":
            raise ArgumentError(f"`product` must be 'exact' with dtype {layout.dtype}; got 'difference'.")

    def flat(self) -> dict[str, Any]:
        """All settings by name, as they are saved."""
        found: dict[str, Any] = {"method": self.method.name}
        for group in GROUPS:
            found |= dataclasses.asdict(getattr(self, group))
        del found["name"]
        return found | {"seed": self.seed}

    def replace(self, **settings: Any) -> TrainConfig:
        """This configuration with other settings, given by name; those of its own method only."""
        changed = _grouped(settings, type(self.method))
        top = changed.pop("", {})
        groups = {group: dataclasses.replace(getattr(self, group), **values) for group, values in changed.items()}
        return dataclasses.replace(self, **groups, **top)

    def may_differ(self) -> set[str]:
        """The settings in which parts of one run may differ: what it gives does not depend on them.

        The layout is one of them, unless it says what is perturbed, or normalized in BatchNorm, together.
        """
        has_parts = not self.layout.sync or self.layout.microbatch_size != "all"
        layout = set() if has_parts else {"parallel", "devices", "shard_params"}
        return {*(field.name for field in dataclasses.fields(Pace)), "remat", *layout}

    def on_one_device(self) -> TrainConfig:
        """This configuration for work on its results, which needs no layout."""
        sync = self.layout.sync or self.layout.parallel != "none"
        plain = dataclasses.replace(self.layout, parallel="none", devices="all", shard_params=False, sync=sync)
        return dataclasses.replace(self, layout=plain, pace=Pace())

    def default_folder(self) -> Path:
        """Where the run goes when no folder is given: runs/DATASET-MODEL-METHOD-sSEED."""
        return Path("runs") / f"{self.task.dataset}-{self.task.model}-{self.method.name}-s{self.seed}"


_TYPES = {"task": Task, "budget": Budget, "optimizer": Optimizer, "layout": Layout, "watch": Watch, "pace": Pace}
# In the order of `flat`.
GROUPS = ("task", "budget", "optimizer", "method", "layout", "watch", "pace")


def resolve(method: str = "hero", dataset: str = "digits", **settings: Any) -> TrainConfig:
    """The configuration with these settings; what is left out, or None, takes the preset.

    It takes what `TrainConfig.flat` gives, and what older runs have saved, which lack the later settings.

    Args:
      method: a name in `methods.METHODS`.
      dataset: that of `Task`.
      **settings: of the method and of all groups, by name.

    Raises:
      ArgumentError: a value that is not allowed, or a setting that the method does not have.
      TypeError: no setting has this name.
    """
    one_of("method", method, methods.METHODS)
    one_of("dataset", dataset, presets.DATASETS)
    given = {name: value for name, value in settings.items() if value is not None}
    preset = presets.settings(dataset, method, given.get("penalty"))
    if "noise_bits" in given and "sigma" not in given and "sigma" in preset:
        preset = preset | {"sigma": "none"}  # the noise of NSO is that of the bits
    values = presets.budget(dataset, given.get("model")) | preset | given | {"dataset": dataset}
    kind = methods.METHODS[method]
    parts = _grouped(values, kind)
    groups = {group: made(**parts.pop(group, {})) for group, made in _TYPES.items()}
    return TrainConfig(method=kind(**parts.pop("method", {})), **groups, **parts.pop("", {}))


def _grouped(settings: Mapping[str, Any], kind: type[methods.Method]) -> dict[str, dict[str, Any]]:
    """Settings by group: that of the method, those of `_TYPES`, and "" for what has none."""
    made: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name in methods.SETTINGS and name not in methods.settings(kind):
            raise ArgumentError(f"`{name}` has no effect on method {kind.name!r}; got {value!r}.")
        if name not in _PLACES:
            raise TypeError(f"`{name}` is no setting of a run.")
        made.setdefault(_PLACES[name], {})[name] = value
    return made


_PLACES = {field.name: group for group, made in _TYPES.items() for field in dataclasses.fields(made)}
_PLACES |= dict.fromkeys(methods.SETTINGS, "method") | {"seed": ""}
# The name of every setting, those of all methods included.
SETTINGS = ("method", *_PLACES)

"""What a run is: one frozen dataclass, with presets for each data set and method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments import data
from hero_jax import _check, models, penalty

LABELS = {"sgd": "SGD", "sam": "SAM", "asam": "ASAM", "grad_l1": "GRAD L1", "hero": "HERO"}
METHODS = tuple(LABELS)
PARALLEL = ("none", "pmap", "jit")
DTYPES = ("float32", "bfloat16")
# Fields that say when a run pauses or asks the host, and nothing about what it computes.
PACE = ("save_minutes", "max_minutes", "steps_per_call")
# The hyper-parameters each method has, besides those of SGD.
TAKES = {
    "sgd": (),
    "sam": ("rho",),
    "asam": ("rho",),
    "grad_l1": ("gamma", "gamma_warmup", "interval", "penalty_batch_size"),
    "hero": ("rho", "gamma", "gamma_warmup", "penalty", "interval", "penalty_batch_size"),
}

# digits: rho and gamma by accuracy on 360 images held out of train (results/digits-search.md), never on the test set;
# HERO's rho is that of ASAM, so that the two rows differ by the penalty alone.
# cifar10: the one recipe that the authors publish (ResNet20, 200 epochs, rho 0.5, gamma 5, no penalty in epoch 0). The
# rho of SAM is that of Foret et al. for CIFAR-10; the gamma of GRAD L1 is a starting point that nobody has tuned here.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "mlp",
        "epochs": 60,
        "batch_size": 64,
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "methods": {
            "sam": {"rho": 0.1},
            "asam": {"rho": 1.0},
            "grad_l1": {"gamma": 0.003, "gamma_warmup": 1, "interval": 1},
            "hero": {"rho": 1.0, "gamma": 100.0, "gamma_warmup": 1, "penalty": "detached", "interval": 1},
        },
    },
    "cifar10": {
        "model": "resnet20",
        "epochs": 200,
        "batch_size": 128,
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "methods": {
            "sam": {"rho": 0.05},
            "asam": {"rho": 0.5},
            "grad_l1": {"gamma": 1e-3, "gamma_warmup": 1, "interval": 1},
            "hero": {"rho": 0.5, "gamma": 5.0, "gamma_warmup": 1, "penalty": "detached", "interval": 1},
        },
    },
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. What is left out takes the preset of the data set and method (`experiments/config.py`)."""

    method: str = "hero"
    """sgd, sam, asam, grad_l1 or hero."""
    dataset: str = "digits"
    """digits (embedded) or cifar10 (prepared for tensorflow-datasets)."""
    model: str | None = None
    """A name in hero_jax.models."""
    epochs: int | None = None
    """Passes over the training images; the learning rate falls to 0 by a cosine, once an epoch."""
    batch_size: int | None = None
    """Images a step. The last, smaller batch of an epoch is left out."""
    learning_rate: float | None = None
    """Peak learning rate of SGD with momentum 0.9."""
    weight_decay: float | None = None
    """Coupled weight decay on all parameters, taken at the unperturbed weights."""
    rho: float | None = None
    """Radius of the perturbation (sam, asam, hero)."""
    gamma: float | None = None
    """Strength of the penalty (grad_l1, hero)."""
    gamma_warmup: int | None = None
    """Epochs at the start without the penalty; the perturbed gradient is used from the first step."""
    penalty: str | None = None
    """Penalty of hero: detached, difference, hvp or eigenvalue."""
    interval: int | None = None
    """Every so many steps the penalty is in (grad_l1, hero); the others are without, at their lower cost."""
    penalty_batch_size: int | None = None
    """Images of a batch, evenly spread over it, on which the penalty's products with the Hessian are taken (grad_l1,
    hero), at a lower cost; default all."""
    dtype: str = "float32"
    """Type of computation in a step, float32 or bfloat16; parameters, statistics, loss and all that is measured are
    float32 in both."""
    seed: int = 0
    """Initial weights, data order and augmentation."""
    train_size: int | None = None
    """Train on this many images, a random subset that is the same for every seed; default all."""
    validation_size: int = 0
    """Hold this many training images out and evaluate on them in place of the test set."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    every: int | None = None
    """Epochs between measurements of the top Hessian eigenvalue and the Hessian norm; default never."""
    curvature_size: int = 1000
    """Training images (the first so many) that `every` measures on."""
    save_minutes: float = 5.0
    """Time between checkpoints; the end is always saved."""
    max_minutes: float | None = None
    """End when this much time has passed, with a checkpoint that the same command continues; default never."""
    steps_per_call: int = 1
    """Steps in one compiled call; as many as an epoch has make it one call. XLA:CPU runs convolutions in such a loop
    forty times slower."""
    parallel: str = "none"
    """none (one device), pmap (data parallel), or jit (over a mesh); the result is the same."""
    devices: int | None = None
    """Devices to use, those of all processes together; default all (pmap, jit)."""
    shard_params: bool = False
    """Split parameters and optimizer state over the devices in place of a copy on each (jit)."""
    sync: bool = True
    """Perturb, and normalise in BatchNorm, by the whole batch; False: by the part of it on each device (pmap) or in
    each of `groups` (none), which is m-sharpness."""
    groups: int = 1
    """Equal parts of the batch that `--no-sync` perturbs alone on one device."""
    microbatch_size: int | None = None
    """Images that a pass takes at a time (on each device under pmap), to save memory: the same gradients and products,
    but BatchNorm normalises by these images alone. XLA:CPU runs convolutions in such a loop forty times slower."""

    def __post_init__(self) -> None:
        _check.one_of("method", self.method, METHODS)
        _check.one_of("dataset", self.dataset, data.DATASETS)
        if self.model is not None:
            _check.one_of("model", self.model, models.MODELS)
        if self.penalty is not None:
            _check.one_of("penalty", self.penalty, penalty.PENALTIES)
        sizes = (
            "epochs",
            "batch_size",
            "train_size",
            "eval_every",
            "every",
            "curvature_size",
            "devices",
            "groups",
            "interval",
            "penalty_batch_size",
            "microbatch_size",
            "steps_per_call",
        )
        for name in sizes:
            if getattr(self, name) is not None:
                _check.integer(name, getattr(self, name), low=1)
        for name in ("seed", "validation_size"):
            _check.integer(name, getattr(self, name), low=0)
        if self.max_minutes is not None:
            _check.positive("max_minutes", self.max_minutes)
        if self.gamma_warmup is not None:
            _check.integer("gamma_warmup", self.gamma_warmup, low=0)
        for name in ("learning_rate", "weight_decay", "rho", "gamma", "save_minutes"):
            if getattr(self, name) is not None:
                _check.non_negative(name, getattr(self, name))
        _check.one_of("dtype", self.dtype, DTYPES)
        for name in ("rho", "gamma", "gamma_warmup", "penalty", "interval", "penalty_batch_size"):
            if getattr(self, name) is not None and name not in TAKES[self.method]:
                raise ValueError(f"`{name}` has no effect on method {self.method!r}; got {getattr(self, name)!r}.")
        self._check_layout()

    def _check_layout(self) -> None:
        """Refuses what contradicts itself whatever the devices are; `parallel.layout` knows these."""
        _check.one_of("parallel", self.parallel, PARALLEL)
        if self.parallel == "none" and (self.devices or 1) > 1:
            raise ValueError(f"`devices` must be 1 with parallel 'none'; got {self.devices}.")
        if self.shard_params and self.parallel != "jit":
            raise ValueError(f"`shard_params` needs parallel 'jit'; got parallel {self.parallel!r}.")
        if not self.sync and self.parallel == "jit":
            raise ValueError("`sync` must be True with parallel 'jit', where XLA sees one batch; got False.")
        if not self.sync and self.parallel == "none" and self.groups == 1:
            raise ValueError("`sync` must be True on one device without `groups` to differ; got False and groups 1.")
        if self.groups > 1 and (self.sync or self.parallel != "none"):
            raise ValueError(
                f"`groups` needs sync False and parallel 'none' (with pmap a device is a group); got {self.groups} with"
                f" sync {self.sync} and parallel {self.parallel!r}."
            )

    def resolved(self) -> TrainConfig:
        """This configuration with every preset filled in."""
        preset = PRESETS[self.dataset]
        defaults = {k: v for k, v in preset.items() if k != "methods"} | preset["methods"].get(self.method, {})
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def may_differ(self) -> set[str]:
        """The fields in which parts of one run may differ: what it gives does not depend on them.

        The layout is one of them, unless it says what is perturbed, or normalised in BatchNorm, together.
        """
        has_parts = not self.sync or self.microbatch_size is not None
        layout = set() if has_parts else {"parallel", "devices", "shard_params"}
        return {*PACE, *layout}

    def on_one_device(self) -> TrainConfig:
        """This configuration for work on its results, which needs no layout."""
        sync = self.sync or self.parallel != "none"
        plain = {name: getattr(TrainConfig, name) for name in PACE}
        return dataclasses.replace(self, parallel="none", devices=None, shard_params=False, sync=sync, **plain)

    def default_folder(self) -> Path:
        """Where the run goes when no folder is given: runs/DATASET-MODEL-METHOD-sSEED."""
        config = self.resolved()
        return Path("runs") / f"{config.dataset}-{config.model}-{config.method}-s{config.seed}"

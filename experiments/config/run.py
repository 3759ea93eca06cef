"""What a run is: one frozen dataclass; what is left out of it is filled in from `presets`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.config import presets
from hero_jax import errors, models, penalties, perturbations, quantize

LABELS = {
    "sgd": "SGD",
    "noise": "Weight noise",
    "ema": "EMA",
    "nso": "NSO",
    "msam": "MSAM",
    "sam": "SAM",
    "asam": "ASAM",
    "grad_l1": "GRAD L1",
    "hero": "HERO",
}
METHODS = tuple(LABELS)
PARALLEL = ("none", "pmap", "jit")
DTYPES = ("float32", "bfloat16")
LABEL_NOISE_KINDS = ("symmetric", "uniform", "asymmetric")
# Fields that say when a run pauses or asks the host, and nothing about what it computes.
PACE = ("save_minutes", "max_minutes", "steps_per_call")
# The hyper-parameters each method has, besides those of SGD.
_OF_ASCENT = ("rho", "scope", "noise_bits", "suppress", "ascent_decay", "ascent_batch_size", "perturb_from")
_OF_PENALTY = ("gamma", "gamma_warmup", "interval", "penalty_batch_size", "penalize_from")
TAKES = {
    "sgd": (),
    "noise": ("noise_bits",),
    "ema": ("ema_decay",),
    "nso": ("sigma", "noise_bits", "perturb_from"),
    "msam": ("rho", "scope", "adaptive", "ascent_decay", "perturb_from"),
    "sam": _OF_ASCENT,
    "asam": _OF_ASCENT,
    "grad_l1": (*_OF_PENALTY, "noise_bits"),
    "hero": (*_OF_ASCENT, *_OF_PENALTY, "adaptive", "penalty", "reduction", "product"),
}


# What runs did before their configuration had these fields.
BEFORE = {
    "scope": "global",
    "reduction": "mean",
    "interval": 1,
    "suppress": 0.0,
    "product": "exact",
    "perturb_from": 0.0,
    "penalize_from": 0.0,
    "adaptive": True,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. What is left out takes the preset of data set, model and method (`presets`)."""

    method: str = "hero"
    """sgd, noise (SGD around weights with noise), ema (SGD, averaged weights), nso (noise of both signs), msam
    (momentum-SAM), sam, asam, grad_l1 or hero."""
    dataset: str = "digits"
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
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
    """Radius of the perturbation (msam, sam, asam, hero)."""
    adaptive: bool | None = None
    """Scale the perturbation with the weights, as ASAM does, or not (msam, hero)."""
    gamma: float | None = None
    """Strength of the penalty (grad_l1, hero)."""
    gamma_warmup: int | None = None
    """Epochs at the start without the penalty; the perturbed gradient is used from the first step."""
    penalty: str | None = None
    """Penalty of hero: detached, difference, hvp or eigenvalue."""
    scope: str | None = None
    """Norm of the perturbation: global (that of the whole tree) or leaf (msam, sam, asam, hero)."""
    suppress: float | None = None
    """Share taken from the components of the perturbed gradient that point the way of the gradient and are smaller:
    those that fit noisy labels (sam, asam, hero)."""
    ascent_decay: float | None = None
    """Perturb along a momentum of the gradients with this decay per step (msam; sam, asam, hero where given)."""
    ascent_batch_size: int | None = None
    """Images of a batch, evenly spread over it, on which the perturbation and the penalty are taken (sam, asam, hero),
    at a lower cost; default all. The loss that is reported and BatchNorm's statistics are of these images too."""
    perturb_from: float | None = None
    """Fraction of training before which nothing is perturbed or penalised, at the cost of SGD (nso, msam, sam, asam,
    hero)."""
    reduction: str | None = None
    """The penalty of a kernel is the mean over its entries, or their sum (hero)."""
    product: str | None = None
    """Products with the Hessian: exact, or the difference of two gradients, cheaper and for smooth networks alone, of
    which hero_jax.models has vit_tiny (hero)."""
    penalize_from: float | None = None
    """Fraction of training before which the penalty is left out, at that lower cost (grad_l1, hero)."""
    sigma: float | None = None
    """Standard deviation of the noise on every weight (nso)."""
    noise_bits: int | None = None
    """Every pass of a step is taken around weights with uniform noise as wide as a bin of the grid channel-narrow of so
    many bits (noise; sam, asam, grad_l1, hero where given); the noise of nso, instead of `sigma`."""
    ema_decay: float | None = None
    """Decay a step of the exponential average of weights and statistics that is evaluated and saved (ema)."""
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
    """Hold this many training images out, and evaluate on them too: what is chosen is chosen there."""
    test_size: int | None = None
    """Evaluate on this many test images, a random subset that is the same for every run; default all."""
    augment: bool = True
    """Random crops and flips, where the data set is trained with them; False: every epoch has the images as they
    are."""
    label_noise: float = 0.0
    """Share of the training images whose label is altered; every evaluation is on clean labels."""
    label_noise_kind: str = "symmetric"
    """symmetric (uniform over the other classes), uniform (over all, the true one included), or asymmetric (the class
    that is taken for it, docs/data.md)."""
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
    remat: bool = False
    """Keep the outputs of convolutions and products alone until a pass goes backwards, and compute the rest again, to
    save memory: docs/parallel.md says how much, and where."""

    def __post_init__(self) -> None:
        errors.one_of("method", self.method, METHODS)
        errors.one_of("dataset", self.dataset, presets.DATASETS)
        if self.model is not None:
            errors.one_of("model", self.model, models.MODELS)
        if self.penalty is not None:
            errors.one_of("penalty", self.penalty, penalties.PENALTIES)
        sizes = (
            "epochs",
            "batch_size",
            "train_size",
            "test_size",
            "eval_every",
            "every",
            "curvature_size",
            "devices",
            "groups",
            "interval",
            "penalty_batch_size",
            "ascent_batch_size",
            "microbatch_size",
            "steps_per_call",
        )
        for name in sizes:
            if getattr(self, name) is not None:
                errors.integer(name, getattr(self, name), low=1)
        for name in ("seed", "validation_size"):
            errors.integer(name, getattr(self, name), low=0)
        if self.max_minutes is not None:
            errors.positive("max_minutes", self.max_minutes)
        if self.gamma_warmup is not None:
            errors.integer("gamma_warmup", self.gamma_warmup, low=0)
        for name in ("learning_rate", "weight_decay", "rho", "gamma", "sigma", "save_minutes"):
            if getattr(self, name) is not None:
                errors.non_negative(name, getattr(self, name))
        errors.one_of("dtype", self.dtype, DTYPES)
        if self.scope is not None:
            errors.one_of("scope", self.scope, perturbations.SCOPES)
        if self.reduction is not None:
            errors.one_of("reduction", self.reduction, penalties.REDUCTIONS)
        if self.noise_bits is not None:
            errors.integer("noise_bits", self.noise_bits, low=quantize.MIN_BITS, high=quantize.MAX_BITS)
        if self.product is not None:
            errors.one_of("product", self.product, penalties.PRODUCTS)
        for name in ("ema_decay", "suppress", "ascent_decay", "perturb_from", "penalize_from", "label_noise"):
            if getattr(self, name) is not None:
                errors.fraction(name, getattr(self, name))
        errors.one_of("label_noise_kind", self.label_noise_kind, LABEL_NOISE_KINDS)
        for name in {name for names in TAKES.values() for name in names}:
            if getattr(self, name) is not None and name not in TAKES[self.method]:
                raise ValueError(f"`{name}` has no effect on method {self.method!r}; got {getattr(self, name)!r}.")
        if self.sigma is not None and self.noise_bits is not None:
            raise ValueError(f"`sigma` must be left out where noise_bits is given; got {self.sigma!r}.")
        if self.product == "difference" and self.penalty in ("hvp", "eigenvalue"):
            raise ValueError(f"`product` must be 'exact' with penalty {self.penalty!r}; got 'difference'.")
        if self.ascent_decay is not None and not self.sync and self.method != "msam":
            raise ValueError(f"`ascent_decay` needs sync True: a momentum is of all devices; got {self.ascent_decay}.")
        if self.product == "difference" and self.dtype != "float32":
            raise ValueError(f"`product` must be 'exact' with dtype {self.dtype}; got 'difference'.")
        if self.ascent_batch_size is not None and self.penalty_batch_size is not None:
            raise ValueError(
                "`penalty_batch_size` must be left out where ascent_batch_size is given, which the penalty takes too;"
                f" got {self.penalty_batch_size}."
            )
        self._check_layout()

    def _check_layout(self) -> None:
        """Refuses what contradicts itself whatever the devices are; `parallel.layout` knows these."""
        errors.one_of("parallel", self.parallel, PARALLEL)
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

    @staticmethod
    def before(method: str) -> dict[str, Any]:
        """What an older configuration of a method lacks, as its run had it."""
        return {name: value for name, value in BEFORE.items() if name in TAKES.get(method, ())}

    def resolved(self) -> TrainConfig:
        """This configuration with every preset filled in."""
        defaults = presets.of(self.dataset, self.model, self.method, self.penalty, TAKES[self.method])
        if self.noise_bits is not None:
            defaults.pop("sigma", None)  # the noise of nso is that of the bits then
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def may_differ(self) -> set[str]:
        """The fields in which parts of one run may differ: what it gives does not depend on them.

        The layout is one of them, unless it says what is perturbed, or normalised in BatchNorm, together.
        """
        has_parts = not self.sync or self.microbatch_size is not None
        layout = set() if has_parts else {"parallel", "devices", "shard_params"}
        return {*PACE, "remat", *layout}

    def on_one_device(self) -> TrainConfig:
        """This configuration for work on its results, which needs no layout."""
        sync = self.sync or self.parallel != "none"
        plain = {name: getattr(TrainConfig, name) for name in PACE}
        return dataclasses.replace(self, parallel="none", devices=None, shard_params=False, sync=sync, **plain)

    def default_folder(self) -> Path:
        """Where the run goes when no folder is given: runs/DATASET-MODEL-METHOD-sSEED."""
        config = self.resolved()
        return Path("runs") / f"{config.dataset}-{config.model}-{config.method}-s{config.seed}"

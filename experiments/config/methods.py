"""The methods, each with the settings that it has: `Sgd | WeightNoise | Ema | Nso | Msam | Sam | Asam | GradL1 | Hero`.

A setting without a default is a matter of the data set: `presets` has it. The defaults are those of the authors'
released command for HERO (ResNet20 on CIFAR-10, https://arxiv.org/abs/2111.11986), and for MSAM those of Becker et al.,
2024 (arXiv 2401.12033).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from experiments.config.fields import Bits, Checked, Count, Fraction, NonNegative, Whole, types_of
from hero_jax.errors import ArgumentError

Name = Literal["sgd", "noise", "ema", "nso", "msam", "sam", "asam", "grad_l1", "hero"]
Scope = Literal["global", "leaf"]
Penalty = Literal["detached", "difference", "hvp", "eigenvalue"]


class _Without:
    """Every setting, in the order in which tables have them; the values are what a method does without the setting.

    In a method that has the setting and no default for it, `dataclasses.field()` keeps these from being that.
    """

    rho: NonNegative = 0.0
    adaptive: bool = False
    gamma: NonNegative = 0.0
    gamma_warmup: Whole = 0
    penalty: Penalty | Literal["none"] = "none"
    scope: Scope = "global"
    suppress: Fraction = 0.0
    ascent_decay: Fraction | Literal["none"] = "none"
    ascent_batch_size: Count | Literal["all"] = "all"
    perturb_from: Fraction = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    product: Literal["exact", "difference"] = "exact"
    penalize_from: Fraction = 0.0
    sigma: NonNegative | Literal["none"] = "none"
    noise_bits: Bits | Literal["none"] = "none"
    ema_decay: Fraction | Literal["none"] = "none"
    interval: Count = 1
    penalty_batch_size: Count | Literal["all"] = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(_Without, Checked):
    """What all methods share: a name, for flags and folders, and a label, for tables."""

    label: ClassVar[str] = ""
    method: Name
    """What is trained; `--method NAME --help` shows its settings. sgd, noise (SGD around weights with noise), ema (SGD
    whose averaged weights are evaluated), nso (noise of both signs), msam (momentum-SAM), sam, asam, grad_l1, hero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = type(self).method
        if self.method != wanted:
            raise ArgumentError(f"`method` must be {wanted!r} in {type(self).__name__}; got {self.method!r}.")

    @property
    def name(self) -> Name:
        """That of the method."""
        return self.method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Method):
    """SGD with momentum."""

    label: ClassVar[str] = "SGD"
    method: Name = "sgd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Averaged(Method):
    ema_decay: Fraction | Literal["none"] = "none"
    """Evaluate and save the exponential average of weights and statistics with this decay per step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNoise(_Averaged):
    """SGD whose gradient is that at weights with noise."""

    label: ClassVar[str] = "Weight noise"
    method: Name = "noise"
    noise_bits: Bits = dataclasses.field()  # pyright: ignore[reportIncompatibleVariableOverride]
    """The noise is uniform, as wide as a bin of the grid channel-narrow of this number of bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema(Method):
    """SGD; an exponential average of its weights and statistics is evaluated and saved."""

    label: ClassVar[str] = "EMA"
    method: Name = "ema"
    ema_decay: Fraction = dataclasses.field()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Decay of the average per step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nso(_Averaged):
    """The mean of the gradients at weights with noise of both signs."""

    label: ClassVar[str] = "NSO"
    method: Name = "nso"
    sigma: NonNegative | Literal["none"] = dataclasses.field()
    """Standard deviation of the noise on every weight; none where noise_bits is given."""
    noise_bits: Bits | Literal["none"] = "none"
    """Uniform noise instead, as wide as a bin of the grid channel-narrow of this number of bits."""
    perturb_from: Fraction = 0.0
    """Fraction of training before which nothing is perturbed, at the cost of SGD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_bits != "none" and self.sigma != "none":
            raise ArgumentError(f"`sigma` must be left out where noise_bits is given; got {self.sigma!r}.")
        if self.noise_bits == self.sigma == "none":
            raise ArgumentError("`sigma` must be a number where noise_bits is not given; got 'none'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ascent(Method):
    rho: NonNegative = dataclasses.field()
    """Radius of the perturbation."""
    scope: Scope = "global"
    """Norm of the perturbation: of the whole tree (global) or of each leaf (leaf)."""
    perturb_from: Fraction = 0.0
    """Fraction of training before which nothing is perturbed or penalized, at the cost of SGD."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noisy(_Averaged):
    noise_bits: Bits | Literal["none"] = "none"
    """Take every pass of a step around weights with uniform noise, as wide as a bin of the grid channel-narrow of this
    number of bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Msam(_Ascent):
    """Momentum-SAM: the perturbation is along the momentum, so that a step takes one gradient."""

    label: ClassVar[str] = "MSAM"
    method: Name = "msam"
    adaptive: bool = False
    """Scale the perturbation with the weights, as ASAM does."""
    ascent_decay: Fraction = 0.9  # pyright: ignore[reportIncompatibleVariableOverride]
    """Decay of the momentum per step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Perturbed(_Ascent, _Noisy):
    suppress: Fraction = 0.0
    """Share taken from the components of the perturbed gradient that point the way of the gradient and are smaller:
    those that fit noisy labels."""
    ascent_decay: Fraction | Literal["none"] = "none"
    """Perturb along a momentum of the gradients with this decay per step."""
    ascent_batch_size: Count | Literal["all"] = "all"
    """Images of a batch, evenly spread over it, on which perturbation and penalty are taken, at a lower cost. The loss
    that is reported and BatchNorm's statistics are of these images too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Penalized(_Noisy):
    gamma: NonNegative = dataclasses.field()
    """Strength of the penalty."""
    gamma_warmup: Whole = 1
    """Epochs at the start without the penalty; the perturbed gradient is used from the first step."""
    penalize_from: Fraction = 0.0
    """Fraction of training before which the penalty is left out, at that lower cost."""
    interval: Count = 1
    """The penalty is in every N-th step; the others are without it, at their lower cost."""
    penalty_batch_size: Count | Literal["all"] = "all"
    """Images of a batch, evenly spread over it, on which the penalty's products with the Hessian are taken, at a lower
    cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam(_Perturbed):
    """SAM: the gradient at the weights perturbed along the gradient."""

    label: ClassVar[str] = "SAM"
    method: Name = "sam"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asam(_Perturbed):
    """ASAM: SAM with a perturbation that scales with the weights."""

    label: ClassVar[str] = "ASAM"
    method: Name = "asam"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradL1(_Penalized):
    """SGD with a penalty on the absolute values of the gradient."""

    label: ClassVar[str] = "GRAD L1"
    method: Name = "grad_l1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hero(_Penalized, _Perturbed):
    """HERO: the perturbed gradient, and a penalty on curvature."""

    label: ClassVar[str] = "HERO"
    method: Name = "hero"
    adaptive: bool = True
    """Scale the perturbation with the weights, as ASAM does."""
    penalty: Penalty = "detached"  # pyright: ignore[reportIncompatibleVariableOverride]
    """What is penalized: see hero_jax.penalties."""
    reduction: Literal["mean", "sum"] = "mean"
    """The penalty of a kernel is the mean over its entries, or their sum."""
    product: Literal["exact", "difference"] = "exact"
    """Products with the Hessian: exact, or the difference of two gradients, cheaper and for smooth networks alone, of
    which hero_jax.models has vit_tiny."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product == "difference" and self.penalty in ("hvp", "eigenvalue"):
            raise ArgumentError(f"`product` must be 'exact' with penalty {self.penalty!r}; got 'difference'.")
        if self.ascent_batch_size != "all" and self.penalty_batch_size != "all":
            raise ArgumentError(
                "`penalty_batch_size` must be left out where ascent_batch_size is given, which the penalty takes too;"
                f" got {self.penalty_batch_size}."
            )


METHODS: dict[str, type[Method]] = {
    kind.method: kind for kind in (Sgd, WeightNoise, Ema, Nso, Msam, Sam, Asam, GradL1, Hero)
}
LABELS = {name: kind.label for name, kind in METHODS.items()}
# Of all methods together.
SETTINGS = {"method": Name, **typing.get_type_hints(_Without, include_extras=True)}


def refuse_others(method: str, settings: Mapping[str, Any]) -> None:
    """Raises ArgumentError where settings by name have one that other methods have and this one has not."""
    for name, value in settings.items():
        if name in SETTINGS and name not in types_of(METHODS[method]):
            raise ArgumentError(f"`{name}` has no effect on method {method!r}; got {value!r}.")

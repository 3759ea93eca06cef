"""hero_jax: train networks with low curvature, measure it, and quantize them.

hero_jax.transforms    hero, sam, grad_l1: Optax gradient transformations
hero_jax.perturbations where the second gradient is taken (SAM, ASAM)
hero_jax.penalties     the curvature penalties and their exact gradients
hero_jax.curvature     products with the Hessian, the Gauss-Newton matrix and the empirical Fisher
hero_jax.spectrum      eigenvalues, traces, norms and densities, each with its error
hero_jax.sharpness     worst-case and predicted increases of the loss
hero_jax.landscape     the loss along lines and planes through the weights, and between networks
hero_jax.quantize      post-training weight quantization: grids, evaluation, rounding, sensitivity, files
hero_jax.evaluate      a classifier's accuracy and loss on a data set, means over runs
hero_jax.parallel      per-device gradients under vmap, pmap and shard_map
hero_jax.models        Flax Linen networks (needs flax; imported on first use)
"""

import importlib
from typing import TYPE_CHECKING, Any

from hero_jax import (
    curvature,
    evaluate,
    landscape,
    parallel,
    penalties,
    perturbations,
    quantize,
    sharpness,
    spectrum,
    transforms,
)
from hero_jax.transforms import HeroState, Metrics, grad_l1, hero, sam

if TYPE_CHECKING:
    from hero_jax import models as models

__version__ = "0.1.0"

__all__ = [
    "HeroState",
    "Metrics",
    "curvature",
    "evaluate",
    "grad_l1",
    "hero",
    "landscape",
    "parallel",
    "penalties",
    "perturbations",
    "quantize",
    "sam",
    "sharpness",
    "spectrum",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name == "models":
        try:
            return importlib.import_module("hero_jax.models")
        except ModuleNotFoundError as error:
            raise ImportError(f'`hero_jax.models` needs {error.name}: pip install "hero_jax[experiments]"') from error
    raise AttributeError(f"module 'hero_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "models"]

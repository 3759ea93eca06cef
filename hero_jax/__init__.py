"""hero_jax: train networks with low curvature, measure it, and quantize them.

Training
  hero_jax.transforms     hero, sam, grad_l1: Optax gradient transformations
  hero_jax.momentum_sam   msam: SAM for one gradient per step, around any Optax optimizer
  hero_jax.noise_stability  nso: gradients at weights with symmetric noise
  hero_jax.perturbations  where the second gradient is taken (SAM, ASAM, noise)
  hero_jax.penalties      the curvature penalties and their exact gradients
  hero_jax.parallel       per-device gradients under vmap, pmap and shard_map
Measuring
  hero_jax.examples       Examples, Stream: the data that a mean is taken over
  hero_jax.mean_loss      MeanLoss: the mean loss over data, a function of the weights
  hero_jax.operators      Operator: a product that knows the tree it works on
  hero_jax.curvature      products with the Hessian, the Gauss-Newton matrix and the empirical Fisher
  hero_jax.spectrum       eigenvalues, traces, norms and densities, each with its error
  hero_jax.sharpness      worst-case, average and predicted increases of the loss; eigenvalues of single batches
  hero_jax.landscape      the loss along lines and planes through the weights, and between networks
  hero_jax.evaluate       accuracy and loss of a classifier on a data set, means over runs
Deploying
  hero_jax.quantize       post-training weight quantization: grids, evaluation, rounding, sensitivity, files

  hero_jax.models         Flax Linen networks (needs flax; imported on first use)
  hero_jax.errors         ArgumentError, which every refused argument raises; the rules of single arguments
"""

import importlib
from typing import TYPE_CHECKING, Any

from hero_jax import (
    curvature,
    errors,
    evaluate,
    examples,
    landscape,
    mean_loss,
    momentum_sam,
    noise_stability,
    operators,
    parallel,
    penalties,
    perturbations,
    quantize,
    sharpness,
    spectrum,
    transforms,
)
from hero_jax.errors import ArgumentError
from hero_jax.examples import Examples, Stream
from hero_jax.mean_loss import MeanLoss
from hero_jax.momentum_sam import MsamState, msam, msam_eval_params
from hero_jax.noise_stability import NsoState, nso
from hero_jax.operators import HostOperator, Operator
from hero_jax.transforms import HeroState, Metrics, grad_l1, hero, sam

if TYPE_CHECKING:
    from hero_jax import models as models

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Examples",
    "HeroState",
    "HostOperator",
    "MeanLoss",
    "Metrics",
    "MsamState",
    "NsoState",
    "Operator",
    "Stream",
    "curvature",
    "errors",
    "evaluate",
    "examples",
    "grad_l1",
    "hero",
    "landscape",
    "mean_loss",
    "momentum_sam",
    "msam",
    "msam_eval_params",
    "noise_stability",
    "nso",
    "operators",
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
            raise ImportError(f'`hero_jax.models` needs {error.name}: pip install "hero_jax[models]"') from error
    raise AttributeError(f"module 'hero_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "models"]

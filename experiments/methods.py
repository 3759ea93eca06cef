"""The methods compared: Optax pipelines, the noise a step is taken around, and the average that is evaluated.

SGD, SAM, ASAM, GRAD L1, HERO    direction -> + weight decay -> SGD with momentum      (hero_jax's transformations)
Weight noise                     SGD whose gradient is that at w + u; a new u every step  (`noise`)
EMA                              SGD; the average of its weights is evaluated             (`averaged`)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import hero_jax
from experiments.config import TrainConfig
from hero_jax import parallel, quantize

PyTree = Any
NOISE_SPEC = quantize.named("channel-narrow")


def optimizer(
    config: TrainConfig, steps_per_epoch: int, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """`direction -> + weight decay -> SGD with momentum 0.9`, cosine to 0 in steps of one epoch.

    Args:
      config: a resolved configuration.
      steps_per_epoch: steps in an epoch, which the schedules count in.
      axis_name: the mapped axis that the batch is split over, as in `hero_jax.hero`: what follows the direction is the
        same on every device. With `config.sync` perturbations are those of the whole batch.
    """
    assert config.learning_rate is not None
    assert config.weight_decay is not None
    assert config.epochs is not None
    cosine = optax.cosine_decay_schedule(config.learning_rate, config.epochs)
    return optax.chain(
        direction(config, steps_per_epoch, axis_name),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(lambda step: cosine(jnp.asarray(step) // steps_per_epoch), momentum=0.9),
    )


def direction(
    config: TrainConfig, steps_per_epoch: int, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of the raw gradient that makes the method."""
    if config.method in ("sgd", "noise", "ema"):
        return optax.with_extra_args_support(optax.stateless(lambda grads, _: parallel.mean(grads, axis_name)))
    where: dict[str, Any] = {} if axis_name is None else {"axis_name": axis_name, "sync": config.sync}
    if config.method in ("sam", "asam"):
        assert config.rho is not None
        assert config.scope is not None
        return hero_jax.sam(config.rho, adaptive=config.method == "asam", scope=config.scope, **where)
    gamma = _after_warmup(config, steps_per_epoch)
    if config.method == "grad_l1":
        return hero_jax.grad_l1(gamma, **where)
    assert config.rho is not None
    assert config.scope is not None
    assert config.penalty is not None
    assert config.reduction is not None
    return hero_jax.hero(
        config.rho, gamma, scope=config.scope, penalty=config.penalty, reduction=config.reduction, **where
    )


def noise(config: TrainConfig, key: jax.Array, params: PyTree) -> PyTree | None:
    """u of a step: uniform within a bin of the grid of `noise_bits` bits on the kernels, 0 elsewhere; None without."""
    return (
        None if config.noise_bits is None else quantize.rounding_noise(params, config.noise_bits, key, spec=NOISE_SPEC)
    )


def averaged(config: TrainConfig, average: PyTree, variables: PyTree, step: jax.Array) -> PyTree:
    """The exponential average of weights and statistics after `variables` of a step, counted from 0.

        average = beta average + (1 - beta) variables,   beta = min(ema_decay, (1 + step) / (10 + step))

    so that it forgets the initial weights early; empty where the method has none.

    Source: Polyak and Juditsky, 1992; the schedule of beta is that of TensorFlow's ExponentialMovingAverage.
    """
    if config.ema_decay is None:
        return {}
    step = step.astype(jnp.float32)
    beta = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, x: a + (1 - beta).astype(x.dtype) * (x - a), average, variables)


def _after_warmup(config: TrainConfig, steps_per_epoch: int) -> float | optax.Schedule:
    """gamma, or 0 before `gamma_warmup` epochs have passed."""
    assert config.gamma is not None
    assert config.gamma_warmup is not None
    if config.gamma == 0 or config.gamma_warmup == 0:
        return config.gamma
    start = config.gamma_warmup * steps_per_epoch
    return optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(config.gamma)], [start])

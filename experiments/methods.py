"""The methods compared, as Optax pipelines: what is chained before weight decay and SGD with momentum."""

from __future__ import annotations

import jax.numpy as jnp
import optax

import hero_jax
from experiments.config import TrainConfig


def optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """`direction -> + weight decay -> SGD with momentum 0.9`, cosine to 0 in steps of one epoch.

    Args:
      config: a resolved configuration.
      steps_per_epoch: steps in an epoch, which the schedules count in.
    """
    assert config.learning_rate is not None
    assert config.weight_decay is not None
    assert config.epochs is not None
    cosine = optax.cosine_decay_schedule(config.learning_rate, config.epochs)
    return optax.chain(
        direction(config, steps_per_epoch),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(lambda step: cosine(jnp.asarray(step) // steps_per_epoch), momentum=0.9),
    )


def direction(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The transformation of the raw gradient that makes the method."""
    if config.method == "sgd":
        return optax.with_extra_args_support(optax.identity())
    if config.method in ("sam", "asam"):
        assert config.rho is not None
        return hero_jax.sam(config.rho, adaptive=config.method == "asam")
    gamma = _after_warmup(config, steps_per_epoch)
    if config.method == "grad_l1":
        return hero_jax.grad_l1(gamma)
    assert config.rho is not None
    assert config.penalty is not None
    return hero_jax.hero(config.rho, gamma, penalty=config.penalty)


def _after_warmup(config: TrainConfig, steps_per_epoch: int) -> float | optax.Schedule:
    """gamma, or 0 before `gamma_warmup` epochs have passed."""
    assert config.gamma is not None
    assert config.gamma_warmup is not None
    if config.gamma == 0 or config.gamma_warmup == 0:
        return config.gamma
    start = config.gamma_warmup * steps_per_epoch
    return optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(config.gamma)], [start])

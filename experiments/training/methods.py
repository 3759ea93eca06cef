"""The methods compared: Optax pipelines, the noise a step is taken around, and what is evaluated.

SGD, SAM, ASAM, GRAD L1, HERO, NSO    direction -> + weight decay -> SGD with momentum   (hero_jax's transformations)
MSAM                     the wrapper around weight decay and SGD; its weights without e are evaluated     (`evaluated`)
Weight noise             SGD whose gradient is that at w + u; a new u in every step                       (`noise`)
EMA                      SGD; the average of its weights is evaluated                                     (`evaluated`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hero_jax
from experiments.config import TrainConfig
from experiments.config.methods import Asam, Ema, GradL1, Hero, Method, Msam, Nso, Sam, Sgd, WeightNoise
from hero_jax import parallel, penalties, quantize

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
        same on every device. With `sync` perturbations are those of the whole batch.
    """
    cosine = optax.cosine_decay_schedule(config.optimizer.learning_rate, config.budget.epochs)
    base = (
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(lambda step: cosine(jnp.asarray(step) // steps_per_epoch), momentum=0.9),
    )
    if isinstance(config.method, Msam):
        base = (_msam(config.method, optax.chain(*base), config.budget.epochs * steps_per_epoch),)
    return optax.chain(direction(config, steps_per_epoch, axis_name), *base)


def direction(
    config: TrainConfig, steps_per_epoch: int, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of the raw gradient that makes the method; that of MSAM, around the optimizer, is not here."""
    method = config.method
    if isinstance(method, Sgd | WeightNoise | Ema | Msam):
        return optax.with_extra_args_support(optax.stateless(lambda grads, _: parallel.mean(grads, axis_name)))
    where: dict[str, Any] = {} if axis_name is None else {"axis_name": axis_name, "sync": config.layout.sync}
    if isinstance(method, Nso):
        if method.noise_bits != "none":
            return hero_jax.nso(1.0, seed=0, sample=functools.partial(_bin_noise, method.noise_bits), **where)
        assert method.sigma != "none"
        return hero_jax.nso(method.sigma, seed=0, **where)
    if isinstance(method, GradL1):
        return hero_jax.grad_l1(_after_warmup(method, steps_per_epoch), **where)
    assert isinstance(method, Sam | Asam | Hero)
    shared: dict[str, Any] = {"scope": method.scope, "suppress": method.suppress, **where}
    if isinstance(method, Hero):
        of_hero = {"adaptive": method.adaptive, "reduction": method.reduction, "product": method.product}
        gamma = _after_warmup(method, steps_per_epoch)
        made = hero_jax.hero(method.rho, gamma, penalty=method.penalty, **of_hero, **shared)
    else:
        made = hero_jax.sam(method.rho, adaptive=isinstance(method, Asam), **shared)
    return made if method.ascent_decay == "none" else _along_momentum(made, method.ascent_decay, axis_name)


class Phase(NamedTuple):
    """What a step has: arguments of the update, which are static."""

    perturb: bool
    penalize: bool


def phases(config: TrainConfig, steps_per_epoch: int) -> tuple[list[Phase], Callable[[Any], Any]]:
    """The kinds of steps that a run has, and which of them a step is: a function of its number, traced or not."""
    last = config.budget.epochs * steps_per_epoch
    perturb_at, penalize_at = (round(x * last) for x in (config.method.perturb_from, config.method.penalize_from))
    interval = config.method.interval
    kinds = [Phase(True, True)]
    # MSAM has no such step: its rho is 0 until then.
    perturbs_late, penalizes_late = (
        perturb_at > 0 and not isinstance(config.method, Msam),
        penalize_at > 0 or interval > 1,
    )
    if penalizes_late and (interval > 1 or penalize_at > perturb_at or not perturbs_late):
        kinds.append(Phase(True, False))
    else:
        penalizes_late = False
    if perturbs_late:
        kinds.append(Phase(False, False))

    def kind(step: Any) -> Any:
        is_plain = perturbs_late & (step < perturb_at)
        is_without = penalizes_late & ((step < penalize_at) | (step % interval != 0))
        return is_plain * (len(kinds) - 1) + (1 - is_plain) * is_without

    return kinds, kind


def gradients(config: TrainConfig) -> float:
    """Gradients of the whole batch that a step takes on average: the cost of a resolved configuration, SGD's being 1.

    Counted from the formulas (`hero_jax.penalties`), not measured.
    """
    method, batch_size = config.method, config.budget.batch_size
    perturbed = 1 - method.perturb_from
    penalized = (1 - max(method.perturb_from, method.penalize_from)) / method.interval
    if isinstance(method, Sgd | WeightNoise | Ema | Msam):
        return 1.0
    if isinstance(method, Nso):
        return 1 + perturbed
    made = _penalty(method)
    by_difference = method.product == "difference" and made is not made.without
    whole = made.cost_by_difference if by_difference else made.cost
    assert whole is not None
    added = whole - made.without.cost
    of_ascent, of_penalty = (
        1.0 if size == "all" else size / batch_size for size in (method.ascent_batch_size, method.penalty_batch_size)
    )
    # The penalties of d need the gradient of the part at w + e.
    needs_part = method.penalty in ("detached", "difference") and made is not made.without
    if of_ascent < 1:
        suppresses = bool(method.suppress) * (perturbed - needs_part * penalized)
        return 1 + of_ascent * (perturbed + (added + needs_part) * penalized + suppresses)
    if of_penalty < 1:
        # On a part the gradients that products begin with are not there yet.
        added = of_penalty * (added + (2 if method.penalty == "difference" else 1)) * (made is not made.without)
    return 1 + (made.without.cost - 1) * perturbed + added * penalized


def _penalty(method: Method) -> penalties.Penalty:
    """That of a method with a perturbation or a penalty."""
    if isinstance(method, Sam | Asam):
        return penalties.PERTURBED
    made = penalties.GRADIENT_L1 if isinstance(method, GradL1) else penalties.PENALTIES[method.penalty]
    return made.without if method.gamma == 0 else made


def noise(config: TrainConfig, key: jax.Array, params: PyTree) -> PyTree | None:
    """u of a step: uniform within a bin of the grid of `noise_bits` bits on the kernels, 0 elsewhere; None without."""
    if config.method.noise_bits == "none" or isinstance(config.method, Nso):
        return None
    return _bin_noise(config.method.noise_bits, params, key)


def evaluated(config: TrainConfig, before: PyTree, variables: PyTree, opt_state: PyTree, step: jax.Array) -> PyTree:
    """What is evaluated instead of the `variables` after a step, counted from 0; empty where these are.

    Of MSAM the weights without the perturbation. Of EMA the exponential average of weights and statistics,

        average = beta average + (1 - beta) variables,   beta = min(ema_decay, (1 + step) / (10 + step))

    so that it forgets the initial weights early.

    Source: Polyak and Juditsky, 1992; the schedule of beta is that of TensorFlow's ExponentialMovingAverage.
    """
    if isinstance(config.method, Msam):
        return variables | {"params": hero_jax.msam_eval_params(opt_state, variables["params"])}
    if config.method.ema_decay == "none":
        return {}
    step = step.astype(jnp.float32)
    beta = jnp.minimum(config.method.ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, x: a + (1 - beta).astype(x.dtype) * (x - a), before, variables)


def has_evaluated(config: TrainConfig) -> bool:
    """Whether `evaluated` gives anything."""
    return isinstance(config.method, Msam | Ema)


def seeded(opt_state: PyTree, seed: jax.Array) -> PyTree:
    """The first state of the optimizer with the noise of this seed (the data of a key)."""
    return jax.tree.map(
        lambda x: x._replace(key=seed) if isinstance(x, hero_jax.NsoState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, hero_jax.NsoState),
    )


def metrics(opt_state: PyTree) -> dict[str, float]:
    """The metrics of the transformation at the last step, where the method has any."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, hero_jax.HeroState))
    found = next((x.metrics for x in states if isinstance(x, hero_jax.HeroState)), None)
    return {} if found is None else {k: float(v) for k, v in found._asdict().items()}


class _MomentumState(NamedTuple):
    momentum: PyTree
    inner: Any


def _along_momentum(
    tx: optax.GradientTransformationExtraArgs, decay: float, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which perturbs along m = decay m + g, the gradients of the batches so far, instead of g."""

    def init_fn(params: PyTree) -> Any:
        return _MomentumState(jax.tree.map(jnp.zeros_like, params), tx.init(params))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> Any:
        mean = parallel.mean(updates, axis_name)
        momentum = jax.tree.map(lambda g, m: g + decay * m, mean, state.momentum)
        updates, inner = tx.update(updates, state.inner, params, ascent=momentum, **extra_args)
        return updates, _MomentumState(momentum, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _msam(
    method: Msam, base: optax.GradientTransformationExtraArgs, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """`base` in the wrapper, whose rho is 0 before `perturb_from`."""
    rho = _from(method.rho, round(method.perturb_from * num_steps))
    return hero_jax.msam(base, rho, decay=method.ascent_decay, adaptive=method.adaptive, scope=method.scope)


def _bin_noise(bits: int, params: PyTree, key: jax.Array) -> PyTree:
    return quantize.rounding_noise(params, bits, key, spec=NOISE_SPEC)


def _after_warmup(method: GradL1 | Hero, steps_per_epoch: int) -> float | optax.Schedule:
    """gamma, or 0 before `gamma_warmup` epochs have passed."""
    return _from(method.gamma, method.gamma_warmup * steps_per_epoch)


def _from(value: float, start: int) -> float | optax.Schedule:
    """0 before step `start`, `value` from then on; a number where it never changes, which may save its cost."""
    if value == 0 or start == 0:
        return value
    return optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(value)], [start])

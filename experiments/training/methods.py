"""The methods compared: Optax pipelines, the noise a step is taken around, and what is evaluated.

SGD, SAM, ASAM, GRAD L1, HERO, NSO    direction -> + weight decay -> SGD with momentum   (hero_jax's transformations)
MSAM                     the wrapper around weight decay and SGD; its weights without e are evaluated       (`on_host`)
Weight noise             SGD whose gradient is that at w + u; a new u in every step                       (`noise`)
EMA                      SGD; the average of its weights is evaluated, as of other methods where asked      (`averaged`)
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
from experiments.config.fields import number
from experiments.config.methods import Asam, Ema, GradL1, Hero, Msam, Nso, Sam, Sgd, WeightNoise
from experiments.storage import runs
from experiments.training.layouts import TrainState
from hero_jax import parallel, penalties, quantize

PyTree = Any
Transformation = optax.GradientTransformationExtraArgs
NOISE_SPEC = quantize.named("channel-narrow")
# Those whose direction is the gradient.
PLAIN = Sgd | WeightNoise | Ema | Msam


def optimizer(config: TrainConfig, steps_per_epoch: int, axis_name: str | None = None) -> Transformation:
    """`direction -> + weight decay -> SGD with momentum 0.9`, the learning rate falling in steps of one epoch.

        rate of an epoch = peak * (floor + (1 - floor) * (1 + cos(pi epoch / epochs)) / 2),   epoch = 0, 1, ...

    `axis_name` is the mapped axis that the batch is split over, as in `hero_jax.hero`: what follows the direction is
    the same on every device. With `sync` perturbations are those of the whole batch.
    """
    rate = config.optimizer
    cosine = optax.cosine_decay_schedule(rate.learning_rate, config.budget.epochs, alpha=rate.learning_rate_floor)
    base = (
        optax.add_decayed_weights(rate.weight_decay),
        optax.sgd(lambda step: cosine(jnp.asarray(step) // steps_per_epoch), momentum=0.9),
    )
    if isinstance(config.method, Msam):
        msam, num_steps = config.method, config.budget.epochs * steps_per_epoch
        rho = _from(msam.rho, round(msam.perturb_from * num_steps))
        options: dict[str, Any] = {"decay": msam.ascent_decay, "adaptive": msam.adaptive, "scope": msam.scope}
        base = (hero_jax.msam(optax.chain(*base), rho, **options),)
    return optax.chain(_direction(config, steps_per_epoch, axis_name), *base)


def _direction(config: TrainConfig, steps_per_epoch: int, axis_name: str | None) -> Transformation:
    """The transformation of the raw gradient that makes the method; that of MSAM, around the optimizer, is not here."""
    method = config.method
    if isinstance(method, PLAIN):
        return optax.with_extra_args_support(optax.stateless(lambda grads, _: parallel.mean(grads, axis_name)))
    options: dict[str, Any] = {} if axis_name is None else {"axis_name": axis_name, "sync": config.layout.sync}
    if isinstance(method, Nso):
        bits = method.noise_bits
        sigma, sample = (number(method.sigma), None) if bits == "none" else (1.0, functools.partial(_bin_noise, bits))
        return hero_jax.nso(sigma, seed=0, sample=sample, **options)
    # gamma, or 0 before `gamma_warmup` epochs have passed.
    gamma = _from(method.gamma, method.gamma_warmup * steps_per_epoch)
    if isinstance(method, GradL1):
        return hero_jax.grad_l1(gamma, **options)
    assert isinstance(method, Sam | Asam | Hero)
    options |= {"scope": method.scope, "suppress": method.suppress}
    if isinstance(method, Hero):
        options |= {name: getattr(method, name) for name in ("penalty", "adaptive", "reduction", "product")}
        made = hero_jax.hero(method.rho, gamma, **options)
    else:
        made = hero_jax.sam(method.rho, adaptive=isinstance(method, Asam), **options)
    return made if method.ascent_decay == "none" else _along_momentum(made, method.ascent_decay, axis_name)


class Phase(NamedTuple):
    """What a step has: arguments of the update, which are static."""

    perturb: bool
    penalize: bool


def phases(config: TrainConfig, steps_per_epoch: int) -> tuple[list[Phase], Callable[[Any], Any]]:
    """The kinds of steps that a run has, and which of them a step is: a function of its number, traced or not."""
    method, last = config.method, config.budget.epochs * steps_per_epoch
    # MSAM has no step without a perturbation: its rho is 0 until then.
    perturb_at = 0 if isinstance(method, Msam) else round(method.perturb_from * last)
    penalize_at, interval = round(method.penalize_from * last), method.interval
    penalizes_late = interval > 1 or penalize_at > perturb_at
    kinds = [Phase(True, True)]
    if penalizes_late:
        kinds.append(Phase(True, False))
    if perturb_at > 0:
        kinds.append(Phase(False, False))

    def kind(step: Any) -> Any:
        is_plain = step < perturb_at
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
    if isinstance(method, PLAIN):
        return 1.0
    if isinstance(method, Nso):
        return 1 + perturbed
    is_l1 = isinstance(method, GradL1)
    made = penalties.GRADIENT_L1 if is_l1 else penalties.PENALTIES.get(method.penalty, penalties.PERTURBED)
    made = made.without if method.gamma == 0 else made
    penalizes = made is not made.without
    whole = made.cost_by_difference if method.product == "difference" and penalizes else made.cost
    assert whole is not None
    added = whole - made.without.cost
    of_ascent, of_penalty = (
        1.0 if size == "all" else size / batch_size for size in (method.ascent_batch_size, method.penalty_batch_size)
    )
    # The penalties of d need the gradient of the part at w + e.
    needs_part = method.penalty in ("detached", "difference") and penalizes
    if of_ascent < 1:
        suppresses = bool(method.suppress) * (perturbed - needs_part * penalized)
        return 1 + of_ascent * (perturbed + (added + needs_part) * penalized + suppresses)
    if of_penalty < 1:
        # On a part the gradients that products begin with are not there yet.
        added = of_penalty * (added + (2 if method.penalty == "difference" else 1)) * penalizes
    return 1 + (made.without.cost - 1) * perturbed + added * penalized


def noise(config: TrainConfig, key: jax.Array, params: PyTree) -> PyTree | None:
    """u of a step: uniform within a bin of the grid of `noise_bits` bits on the kernels, 0 elsewhere; None without."""
    if config.method.noise_bits == "none" or isinstance(config.method, Nso):
        return None
    return _bin_noise(config.method.noise_bits, params, key)


def averaged(config: TrainConfig, before: PyTree, variables: PyTree, step: jax.Array) -> PyTree:
    """The exponential average of weights and statistics after a step, counted from 0; {} without `ema_decay`.

        average = beta average + (1 - beta) variables,   beta = min(ema_decay, (1 + step) / (10 + step))

    so that it forgets the initial weights early.

    Source: Polyak and Juditsky, 1992; the schedule of beta is that of TensorFlow's ExponentialMovingAverage.
    """
    if config.method.ema_decay == "none":
        return {}
    step = step.astype(jnp.float32)
    beta = jnp.minimum(config.method.ema_decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, x: a + (1 - beta).astype(x.dtype) * (x - a), before, variables)


def on_host(config: TrainConfig, state: TrainState) -> TrainState:
    """A state on the host with what is evaluated instead of its weights.

    Of MSAM these are the weights without the perturbation, of which the devices need no copy beside the one in the
    state of the optimizer.
    """
    if not isinstance(config.method, Msam):
        return state
    params = runs.snapshot(hero_jax.msam_eval_params(state.opt_state, state.params))
    return state._replace(averaged={"params": params, "batch_stats": state.batch_stats})


def seeded(opt_state: PyTree, seed: jax.Array) -> PyTree:
    """The first state of the optimizer with the noise of this seed (the data of a key)."""
    state = optax.tree.get(opt_state, "NsoState")
    return opt_state if state is None else optax.tree.set(opt_state, NsoState=state._replace(key=seed))


def metrics(opt_state: PyTree) -> dict[str, float]:
    """The metrics of the transformation at the last step, where the method has any."""
    state = optax.tree.get(opt_state, "HeroState")
    return {} if state is None else {name: float(value) for name, value in state.metrics._asdict().items()}


class _MomentumState(NamedTuple):
    momentum: PyTree
    inner: Any


def _along_momentum(tx: Transformation, decay: float, axis_name: str | None) -> Transformation:
    """`tx`, which perturbs along m = decay m + g, the gradients of the batches so far, instead of g."""

    def init_fn(params: PyTree) -> Any:
        return _MomentumState(jax.tree.map(jnp.zeros_like, params), tx.init(params))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> Any:
        mean = parallel.mean(updates, axis_name)
        momentum = jax.tree.map(lambda g, m: g + decay * m, mean, state.momentum)
        updates, inner = tx.update(updates, state.inner, params, ascent=momentum, **extra_args)
        return updates, _MomentumState(momentum, inner)

    return Transformation(init_fn, update_fn)


def _bin_noise(bits: int, params: PyTree, key: jax.Array) -> PyTree:
    return quantize.rounding_noise(params, bits, key, spec=NOISE_SPEC)


def _from(value: float, start: int) -> float | optax.Schedule:
    """0 before step `start`, `value` from then on; a number where it never changes, which may save its cost."""
    if value == 0 or start == 0:
        return value
    return optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(value)], [start])

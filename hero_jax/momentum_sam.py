"""Momentum-SAM: sharpness-aware training at the price of its base optimizer, one gradient per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hero_jax import _check, _tree, errors
from hero_jax._update import Scalar, at
from hero_jax.errors import ArgumentError
from hero_jax.perturbations import SCOPES, Mask, ascent_on, moved_leaves, scaled_leaves

__all__ = ["MsamState", "msam", "msam_eval_params"]

PyTree = Any
# optax types a state as a tree of arrays, which is narrower than the NamedTuples it is used with.
OptState = Any


class MsamState(NamedTuple):
    """State of `msam`.

    count: int32 scalar, steps taken.
    momentum: m, shaped like the parameters, in float32 or wider.
    weights: w, like the parameters, from which the loop's are w + e.
    base_state: the state of the base optimizer.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: PyTree
    weights: PyTree
    base_state: OptState


def msam(
    optimizer: optax.GradientTransformation,
    rho: Scalar,
    *,
    decay: jax.typing.ArrayLike = 0.9,
    adaptive: bool | Mask = False,
    scope: str = "global",
    perturb_mask: Mask | None = None,
    eps: jax.typing.ArrayLike = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it takes its gradients at weights perturbed along their own momentum.

        g = grad L(w + e)                      the incoming updates: the loop's parameters are w + e
        w = w + optimizer's update of g at w   weight decay in it is that of w
        m = decay m + g
        e = rho m / (||m|| + eps)              adaptive=False
        e = rho w^2 m / (|| |w| m || + eps)    adaptive=True

    SAM climbs along the gradient of the batch, which costs a second gradient; this climbs along those of the batches
    before. The parameters that the loop holds, and hands to the loss and to `update`, are the perturbed ones;
    `msam_eval_params` gives w, the ones to evaluate and to save. m and e are 0 before the first step.

    At a constant learning rate it circles a minimum; as the learning rate falls to 0 it comes to rest. Statistics of
    BatchNorm that a loop collects are those at w + e.

    It is the whole optimizer: chain nothing after it, which would scale or clip e as well. What changes the gradient
    (clipping, say) may come before it or in `optimizer`. w is in the state: what else changes the loop's parameters is
    undone by the next step.

    Args:
      optimizer: any Optax optimizer, with its learning rate, momentum and weight decay. It gets w as `params`, and the
        extra arguments except `grad_fn` and `value_fn`, which are not of w. A transformation that needs these (`hero`,
        `sam`) cannot be wrapped.
      rho: radius of the perturbation, >= 0: a float, a traced scalar or a schedule of this transformation's step count.
        The gradient of step t is taken at a distance of rho(t). 0 is `optimizer` alone.
      decay: of the momentum, in [0, 1]; that of `optimizer`, if it has one, is another.
      adaptive: False for the geometry of SAM, True for that of ASAM, or a mask of the leaves to scale, as in `hero`.
      scope: "global" takes the norm in e over the whole tree, "leaf" over each leaf.
      perturb_mask: bool tree, prefix of one, or callable from params to one: the leaves that are perturbed. Under
        `optax.inject_hyperparams` a callable mask needs `static_args`.
      eps: added to the norm in e, >= 0.

    Returns:
      A transformation with state `MsamState`. `update(updates, state, params)` needs `params`, and no `grad_fn`.
      Several devices need nothing: average the gradient as for any optimizer. `optax.MultiSteps` around it is right,
      too.

    Raises:
      ArgumentError: a negative or non-finite `rho`, a `decay` outside [0, 1], an unknown `scope`; at update no
        `params`, or a tree that does not match it.
      TypeError: an argument or a parameter of the wrong kind.

    Cost: 1 gradient per step, and the memory of two trees of parameters. Parameters of 16 bits round w + e, as with
    `sam`; w itself is kept to the last digit.

    >>> import hero_jax, jax, jax.numpy as jnp, optax
    >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
    >>> tx = hero_jax.msam(optax.sgd(optax.cosine_decay_schedule(0.1, 200), momentum=0.9), rho=0.05)
    >>> params = jnp.array([3.0, -2.0])
    >>> opt_state = tx.init(params)
    >>> for _ in range(200):
    ...     updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(jnp.allclose(hero_jax.msam_eval_params(opt_state, params), 1.0, atol=0.05))
    True

    Source: Becker, Altrock and Risse, Momentum-SAM: sharpness aware minimization without computational overhead, 2024
    (arXiv 2401.12033). Departure: their momentum is that of the optimizer, with its weight decay; here it is one of the
    gradients alone, so that any optimizer can be wrapped.
    """
    _check.schedule("msam(rho=...)", rho)
    errors.fraction("msam(decay=...)", decay)
    errors.one_of("msam(scope=...)", scope, SCOPES)
    errors.non_negative("msam(eps=...)", eps)
    _check.bools("msam(adaptive=...)", adaptive)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"`msam(optimizer=...)` must be an Optax optimizer; got {errors.brief(optimizer)}.")
    base = optax.with_extra_args_support(optimizer)

    def leaves(params: PyTree) -> tuple[PyTree, PyTree]:
        return (
            scaled_leaves("msam(adaptive=...)", adaptive, params),
            moved_leaves("msam(perturb_mask=...)", perturb_mask, params),
        )

    def init_fn(params: PyTree) -> OptState:
        if jax.tree.leaves(params):  # optax.tree.map_params asks for the state of a placeholder without any
            _check.floating_tree("params", params)
            leaves(params)
        zeros = jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params)
        # A copy: a step that may overwrite its arguments must not be given one twice.
        return MsamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, params), base.init(params))

    def update_fn(
        updates: PyTree, state: OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, OptState]:
        if params is None:
            raise ArgumentError("`msam` needs `params`: call `tx.update(grads, state, params)`; got None.")
        _check.state("msam", state, MsamState)
        _check.matching_tree("updates", updates, params)
        _check.matching_tree("state.weights", state.weights, params)
        for name in ("grad_fn", "value_fn"):
            extra_args.pop(name, None)
        momentum = _tree.add(updates, state.momentum, decay)
        base_updates, base_state = base.update(updates, state.base_state, state.weights, **extra_args)
        weights = optax.apply_updates(state.weights, base_updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        e = ascent_on(*leaves(weights), weights, momentum, at("msam(rho=...)", rho, count), scope, eps)
        changes = _tree.cast_like(_tree.subtract(_tree.add(weights, e), params), params)
        # w rather than e: params - e has fewer digits than w where |w| < |e|.
        return changes, MsamState(count, momentum, weights, base_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def msam_eval_params(state: OptState, params: PyTree) -> PyTree:
    """Returns the weights of a run with `msam`, without the perturbation that the loop's parameters have.

        w = params - e, to the last digit of w

    Args:
      state: the optimizer's state that came with `params`: an `MsamState`, or a state that has one inside
        (`optax.chain`, `optax.inject_hyperparams`, `optax.MultiSteps`).
      params: the loop's parameters.

    Returns:
      w, with the structure and types of `params`: what is to be evaluated, saved, and measured.

    Raises:
      ArgumentError: `state` has no `MsamState`, or several; `params` does not match it.

    Cost: no gradient; a copy.

    >>> import hero_jax, jax.numpy as jnp, optax
    >>> tx, w = hero_jax.msam(optax.sgd(0.5), rho=5.0), jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)
    >>> params = optax.apply_updates(w, updates)
    >>> params, msam_eval_params(state, params)
    (Array([2.5, 4. ], dtype=float32), Array([-0.5,  0. ], dtype=float32))

    Source: see `msam`; the convention is that of `optax.contrib.schedule_free_eval_params`.
    """
    inside = _states(state)
    if len(inside) != 1:
        raise ArgumentError(
            f"`msam_eval_params(state=...)` must have one MsamState in it; got {len(inside)} in {errors.brief(state)}"
            + (": the state comes first, then the parameters." if _states(params) else ".")
        )
    _check.matching_tree("state.weights", inside[0].weights, params)
    # A copy, since a step may overwrite the state.
    return jax.tree.map(jnp.copy, inside[0].weights)


def _states(tree: PyTree) -> list[MsamState]:
    """Those in a tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]


def _is_state(x: Any) -> bool:
    return isinstance(x, MsamState)

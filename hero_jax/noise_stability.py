"""Training around randomly perturbed weights: symmetric noise lowers the trace of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _check, _tree, errors, parallel
from hero_jax._update import GradFn, OptState, Scalar, at, device_updates, required_grad_fn
from hero_jax.perturbations import Mask, moved_leaves, noise

__all__ = ["NsoState", "nso"]

PyTree = Any


class NsoState(NamedTuple):
    """State of `nso`.

    count: int32 scalar, steps taken.
    key: the data (`jax.random.key_data`) of the key that every step's noise is derived from, with `count`.
    noise_norm: ||u|| of the last step, as it was after the rounding of w + u to the types of the parameters; float32.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    noise_norm: jax.Array


def nso(
    sigma: Scalar,
    *,
    seed: int | jax.Array,
    sample: Callable[[PyTree, jax.Array], PyTree] | None = None,
    symmetric: bool = True,
    perturb_mask: Mask | None = None,
    axis_name: parallel.AxisName | None = None,
    sync: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient by its mean at weights with noise of both signs: noise stability optimization.

        u = sigma z                                                z as in `perturbations.noise`, new in every step
        direction = 1/2 [grad L(w + u) + grad L(w - u)]            symmetric=True
        direction = grad L(w + u)                                  symmetric=False

    In expectation it descends L + 1/2 tr(H Cov u) to second order. With both signs the slope of the loss along u
    cancels, which is most of the variance that one sign has.

    Args:
      sigma: standard deviation of an entry of u, in the units of the weights, or a factor of what `sample` draws, >= 0:
        a float, a traced scalar or a schedule of this transformation's step count.
      seed: an integer, or a `jax.random.key`. The noise of a step depends on it and on the step count alone.
      sample: `(params, key) -> z`; default standard normal. Noise within a bin of the grid that the weights will be
        rounded to is `lambda params, key: quantize.rounding_noise(params, 3, key, spec=spec)`, with sigma 1. Under
        `optax.inject_hyperparams` it needs `static_args`.
      symmetric: False takes one sign, for one gradient less.
      perturb_mask: bool tree, prefix of one, or callable from params to one: the leaves that get noise; default all.
      axis_name: the mapped axis, as in `hero`.
      sync: True has the same noise on every device, False its own, for one all-reduce either way; False needs
        `axis_name`.

    Returns:
      A transformation with state `NsoState`, and the update call of `hero`: `update(updates, state, params,
      grad_fn=...)`. `updates`, the gradient at w, is not used, and under `jit` not computed either if nothing else
      uses it. `perturb=False`, static, takes it as the direction instead.

    Raises:
      ArgumentError: a negative or non-finite `sigma`, a negative `seed`, `sync=False` without
        `axis_name`; at update no `grad_fn`, no `params`, a tree (also that of `sample`) that does not match `params`, a
        mask that selects nothing.
      TypeError: an argument or a parameter of the wrong kind.

    Cost: 2 gradients per step, 1 with `symmetric=False`; as compiled for CPU the memory of both.

    >>> import hero_jax, jax, jax.numpy as jnp
    >>> tx = hero_jax.nso(0.5, seed=0)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**3))
    >>> w = jnp.array([1.0, -2.0])
    >>> direction, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    >>> u = hero_jax.perturbations.noise(w, 0.5, jax.random.fold_in(jax.random.key(0), 0))
    >>> bool(jnp.allclose(direction, 3 * (w**2 + u**2)))
    True

    Source: Zhang, Li, Kakade and Zhang, Noise stability optimization for finding flat minima, 2023 (arXiv 2306.08553);
    one-sided noise of the size of rounding: Baskin et al., UNIQ, 2021.
    """
    _check.schedule("nso(sigma=...)", sigma)
    errors.boolean("nso(symmetric=...)", symmetric)
    _check.optional_function("nso(sample=...)", sample)
    _check.local("nso", sync, axis_name)
    key = _key(seed)

    def init_fn(params: PyTree) -> OptState:
        if jax.tree.leaves(params):  # optax.tree.map_params asks for the state of a placeholder without any
            _check.no_masked_nodes("params", params)
            _check.floating_tree("params", params)
            moved_leaves("nso(perturb_mask=...)", perturb_mask, params)
        return NsoState(jnp.zeros((), jnp.int32), jax.random.key_data(key), jnp.zeros((), jnp.float32))

    def update_fn(
        updates: PyTree,
        state: OptState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        perturb: bool = True,
        **extra_args: Any,
    ) -> tuple[PyTree, OptState]:
        del extra_args
        errors.boolean("nso update(perturb=...)", perturb)
        grad_fn = required_grad_fn("nso", updates, params, grad_fn, value_fn)
        _check.state("nso", state, NsoState)
        count = jnp.asarray(optax.safe_increment(state.count))
        grad_fn = parallel.local_grad_fn(grad_fn, axis_name)
        if not perturb:
            grads = parallel.mean(device_updates(updates, params, grad_fn, axis_name), axis_name)
            return _tree.cast_like(grads, params), NsoState(count, state.key, jnp.zeros((), jnp.float32))
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(key)), state.count)
        if not sync:
            assert axis_name is not None
            step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axis_name))
            params = parallel.vary(params, axis_name)
        u = noise(params, at("nso(sigma=...)", sigma, state.count), step_key, sample=sample, mask=perturb_mask)
        points = [_tree.cast_like(_tree.add(params, u, sign), params) for sign in ((1, -1) if symmetric else (1,))]
        gradients = [grad_fn(point) for point in points]
        direction = gradients[0]
        if symmetric:
            direction = _tree.scale(0.5, _tree.add(*gradients))
        norm = _tree.norm(_tree.subtract(points[0], params)).astype(jnp.float32)
        direction, norm = parallel.mean((direction, norm), axis_name)
        return _tree.cast_like(direction, params), NsoState(count, state.key, norm)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _key(seed: Any) -> jax.Array:
    """The key of a seed, which may be one."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape:
            raise TypeError(f"`nso(seed=...)` must be one key; got an array of shape {seed.shape}.")
        return seed
    if isinstance(seed, bool | np.bool_):
        raise TypeError(f"`nso(seed=...)` must be an integer or a `jax.random.key`; got {seed}.")
    errors.integer("nso(seed=...)", seed, low=0)
    return jax.random.key(seed)

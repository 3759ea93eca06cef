"""Exact curvature products of a loss, on pytrees: `jax.jvp` of the gradient, forward over reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from hero_jax import _check, _tree

PyTree = Any


def hvp(loss_fn: Callable[..., jax.Array], params: PyTree, vector: PyTree, *args: Any) -> PyTree:
    """Multiplies the Hessian of a loss by a vector.

        H(w) u = d/dt grad L(w + t u) at t = 0,   L(w) = loss_fn(w, *args)

    Exact (no finite difference), linear in `vector`, and differentiable. The mean is that of `loss_fn`: a loss that is
    the mean over a batch gives the Hessian of that mean, and nothing is averaged over devices here
    (inside `shard_map(check_vma=True)`, mark replicated `params` and `vector` with `parallel.vary` first, then average:
    the product of replicated ones is summed over devices already). Where the loss
    normalises with batch statistics, they are part of the function and of its Hessian.

    Args:
      loss_fn: `(params, *args) -> scalar`.
      params: pytree of floating-point arrays, w.
      vector: pytree with the structure and shapes of `params`, u; taken in the types of `params`.
      *args: passed on to `loss_fn`, never differentiated; give data here rather than in a closure.

    Returns:
      H(w) u, with the structure, shapes and types of `params`.

    Raises:
      ValueError: `vector` does not match `params` (names the first path that differs).
      TypeError: a leaf of `params` is not floating point.

    Cost: about 2 gradients beyond the gradient itself, at twice its memory; independent of the number of parameters.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, scale):
    ...     return scale * (w["a"] ** 3).sum() + w["a"].sum() * w["b"]
    >>> w = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    >>> hvp(loss_fn, w, {"a": jnp.array([1.0, 1.0]), "b": jnp.array(1.0)}, 0.5)
    {'a': Array([4., 7.], dtype=float32), 'b': Array(2., dtype=float32, weak_type=True)}

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    """
    _check.floating_tree("params", params)
    _check.matching_tree("vector", vector, params)
    return grad_product(lambda w: jax.grad(loss_fn)(w, *args), params, vector)


def grad_product(grad_fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree) -> PyTree:
    """Multiplies the Jacobian of a gradient function by a vector: `hvp` for a caller who has `grad_fn` only.

        d/dt grad_fn(w + t u) at t = 0

    Only the tangent is returned. Where the caller also evaluates `grad_fn(params)`, XLA's common-subexpression
    elimination merges that with the primal of this product under `jit`, so both cost 1 + 2 gradients (a test counts the
    operations). `jax.linearize` compiles to the same program, except around a `scan` (microbatching), where it would
    keep the residuals of every microbatch: ten times the memory.
    """
    return jax.jvp(grad_fn, (params,), (_tree.cast_like(vector, params),))[1]

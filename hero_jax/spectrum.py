"""Eigenvalues of a symmetric operator given as `matvec`, on pytrees, each with its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hero_jax import _check, _tree

PyTree = Any


class EigenResult(NamedTuple):
    """An approximate eigenpair and how good it is.

    eigenvalue: the Rayleigh quotient of `eigenvector`, sign kept; float32 or wider.
    eigenvector: unit pytree, in the types of the start vector.
    residual: ||H v - lambda v|| / |lambda|: some eigenvalue lies within |lambda| residual of `eigenvalue`. 0 for the
      zero operator, inf where lambda is 0 and H v is not, NaN where a product was NaN.
    converged: residual <= rtol.
    num_matvecs: int32, products taken.
    """

    eigenvalue: jax.Array
    eigenvector: PyTree
    residual: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array


def power_iteration(
    matvec: Callable[[PyTree], PyTree],
    v0: PyTree,
    *,
    max_iters: int = 100,
    rtol: float = 1e-3,
) -> EigenResult:
    """Finds the eigenvalue of largest magnitude by power iteration, sign kept.

        v <- H v / ||H v||,   lambda = v^T H v,   residual = ||H v - lambda v|| / |lambda|

    until residual <= rtol or `max_iters` products are spent.

    Args:
      matvec: `vector -> vector`, a symmetric linear operator H on pytrees shaped like `v0`. What it means (which loss,
        which batch, which mean, averaged over which devices) is the caller's choice.
      v0: start vector, pytree of floating-point arrays, not zero; normally random, since a start without a component
        along the dominant eigenvector cannot find it.
      max_iters: most products to take. Static.
      rtol: relative residual at which to stop.

    Returns:
      `EigenResult`. `converged` says that (eigenvalue, eigenvector) is an eigenpair to `rtol`: it cannot say that no
      larger one exists. Eigenvalues of equal magnitude and opposite sign never converge, and are reported so, with the
      residual; the zero operator gives 0, converged. A NaN product stops the loop, not converged.

    Raises:
      ValueError: `max_iters` or `rtol` not positive; `v0` zero or not finite; `matvec(v0)` shaped unlike `v0`.
      TypeError: a leaf of `v0` is not floating point.

    Cost: `num_matvecs` products, of about 2 gradients each beyond the gradient; memory of one product and two vectors.
    One compiled loop; call it inside `jax.jit` to compile it once for many calls.

    >>> import jax.numpy as jnp
    >>> diagonal = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[-5.0]])}
    >>> v0 = {"a": jnp.ones(2), "b": jnp.ones((1, 1))}
    >>> result = power_iteration(lambda v: {k: diagonal[k] * v[k] for k in v}, v0)
    >>> round(float(result.eigenvalue), 3), bool(result.converged), int(result.num_matvecs)
    (-5.0, True, 9)

    Source: Golub and Van Loan, Matrix Computations, section 8.2; the residual bound is theorem 8.1.15 there.
    """
    _check.integer("power_iteration(max_iters=...)", max_iters, low=1)
    _check.positive("power_iteration(rtol=...)", rtol)
    _check.floating_tree("v0", v0)
    start, length = _tree.normalize(v0)
    if not isinstance(length, Tracer) and not (jnp.isfinite(length) and length > 0):
        raise ValueError(f"`power_iteration(v0=...)` must be finite and not zero; its norm is {length}.")

    def is_running(carry: tuple[PyTree, EigenResult]) -> jax.Array:
        _, result = carry
        # A NaN residual compares False, which stops the loop.
        return (result.residual > rtol) & (result.num_matvecs < max_iters)

    def iterate(carry: tuple[PyTree, EigenResult]) -> tuple[PyTree, EigenResult]:
        v, result = carry
        product = matvec(v)
        _check.matching_tree("matvec(v0)", product, v0)
        # v^T v is 1 to rounding only, and to 3 digits in bfloat16.
        eigenvalue = _tree.dot(v, product) / _tree.dot(v, v)
        residual = _relative_residual(v, product, eigenvalue)
        unit, _ = _tree.normalize(product)
        result = EigenResult(eigenvalue, v, residual, residual <= rtol, result.num_matvecs + 1)
        return _tree.cast_like(unit, v0), result

    start = _tree.cast_like(start, v0)
    scalar_type = length.dtype
    initial = EigenResult(
        eigenvalue=jnp.full((), jnp.nan, scalar_type),
        eigenvector=start,
        residual=jnp.full((), jnp.inf, scalar_type),
        converged=jnp.zeros((), bool),
        num_matvecs=jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(is_running, iterate, (start, initial))[1]


def _relative_residual(v: PyTree, product: PyTree, eigenvalue: jax.Array) -> jax.Array:
    """||H v - lambda v|| / |lambda|, with 0 / 0 = 0: a vector that H maps to zero is an eigenvector."""
    residual = _tree.norm(_tree.add(product, v, -eigenvalue))
    magnitude = jnp.abs(eigenvalue)
    return jnp.where(residual == 0, 0, residual / magnitude)

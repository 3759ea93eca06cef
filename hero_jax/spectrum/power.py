"""Power iteration: the eigenvalue of largest magnitude, with its residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _loop, _tree, errors
from hero_jax._jax import Tracer
from hero_jax.errors import ArgumentError
from hero_jax.spectrum import _residual

__all__ = ["Eigenpair", "power_iteration"]

PyTree = Any


class Eigenpair(NamedTuple):
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
    operator: Callable[[PyTree], PyTree],
    v0: PyTree,
    *,
    max_iters: int = 100,
    rtol: float = 1e-3,
) -> Eigenpair:
    """Finds the eigenvalue of largest magnitude by power iteration, sign kept.

        v <- H v / ||H v||,   lambda = v^T H v,   residual = ||H v - lambda v|| / |lambda|

    until residual <= rtol or `max_iters` products are spent.

    Args:
      operator: an `Operator`, or any function `vector -> vector`: symmetric and linear, H, on pytrees shaped like `v0`.
        What it means (which loss, which data, which mean, averaged over which devices) is the caller's choice.
      v0: start vector, pytree of floating-point arrays, not zero; normally random, since a start without a component
        along the dominant eigenvector cannot find it.
      max_iters: most products to take. Static.
      rtol: relative residual at which to stop.

    Returns:
      `Eigenpair`. `converged` says that (eigenvalue, eigenvector) is an eigenpair to `rtol`: it cannot say that no
      larger one exists. Eigenvalues of equal magnitude and opposite sign never converge, and are reported so, with the
      residual; the zero operator gives 0, converged. A NaN product stops the loop, not converged.

    Raises:
      ArgumentError: `max_iters` or `rtol` not positive; `v0` zero or not finite; `operator(v0)` shaped unlike `v0`.
      TypeError: a leaf of `v0` is not floating point.

    Cost: `num_matvecs` products, of about 2 gradients each beyond the gradient; memory of one product and two vectors.
    The iteration is compiled: inside a trace (`jax.jit`, `vmap`) the loop is on the device, outside one it runs on the
    host around one compiled iteration, since XLA:CPU is some forty times slower at convolutions inside a loop. A plain
    function is compiled anew at every call; those of `hero_jax.curvature`, and any `jax.tree_util.Partial(product,
    params, data)`, share one compilation over calls with the same `product`.

    >>> import jax.numpy as jnp
    >>> diagonal = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[-5.0]])}
    >>> v0 = {"a": jnp.ones(2), "b": jnp.ones((1, 1))}
    >>> result = power_iteration(lambda v: {k: diagonal[k] * v[k] for k in v}, v0)
    >>> round(float(result.eigenvalue), 3), bool(result.converged), int(result.num_matvecs)
    (-5.0, True, 9)

    Source: Golub and Van Loan, Matrix Computations, section 8.2; the residual bound is theorem 8.1.15 there.
    """
    errors.integer("power_iteration(max_iters=...)", max_iters, low=1)
    errors.positive("power_iteration(rtol=...)", rtol)
    _check.floating_tree("v0", v0)
    start, length = jax.jit(_tree.normalize)(v0)
    if not isinstance(length, Tracer) and not (jnp.isfinite(length) and length > 0):
        raise ArgumentError(f"`power_iteration(v0=...)` must be finite and not zero; its norm is {length}.")

    start = _tree.cast_like(start, v0)
    initial = Eigenpair(
        eigenvalue=jnp.zeros((), length.dtype),
        eigenvector=start,
        residual=jnp.full((), jnp.inf, length.dtype),
        converged=jnp.zeros((), bool),
        num_matvecs=jnp.zeros((), jnp.int32),
    )
    limits = (jnp.asarray(rtol, length.dtype), jnp.asarray(max_iters, jnp.int32))
    return _loop.run(_PowerIteration(), operator, _Carry(start, initial, limits)).result


class _Carry(NamedTuple):
    v: PyTree
    result: Eigenpair
    limits: tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _PowerIteration:
    def is_running(self, carry: _Carry) -> jax.Array:
        rtol, max_iters = carry.limits
        # A NaN residual compares False, which stops the loop.
        return (carry.result.residual > rtol) & (carry.result.num_matvecs < max_iters)

    def argument(self, carry: _Carry) -> PyTree:
        return carry.v

    def advance(self, carry: _Carry, product: PyTree) -> _Carry:
        v, result, limits = carry
        rtol, _ = limits
        _check.matching_tree("operator(v0)", product, v, than="v0")
        # v^T v is 1 to rounding only, and to 3 digits in bfloat16.
        eigenvalue = (_tree.dot(v, product) / _tree.dot(v, v)).astype(rtol.dtype)
        residual = _residual.relative_residual(v, product, eigenvalue).astype(rtol.dtype)
        unit, _ = _tree.normalize(product)
        result = Eigenpair(eigenvalue, v, residual, residual <= rtol, result.num_matvecs + 1)
        return _Carry(_tree.cast_like(unit, v), result, limits)

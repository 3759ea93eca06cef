"""A Krylov space and the Ritz pairs in it, each with its residual.

Every product is orthogonalised against all vectors before it, twice, and all coefficients are kept. With Q the
orthonormal vectors as columns, j of them multiplied so far, this measures an identity that holds to rounding for any
operator:

    H Q_j = Q T,    T = Q^T H Q_j

so the residual of a Ritz pair (theta, y = Q_j s) is known without another product:

    ||H y - theta y|| = ||T s - theta [s; 0]||

exactly until a restart leaves a part of T out, and at most that plus the length of what was left out from then on;
and ||T_j - T_j^T|| says how far the operator is from symmetric, where T_j is T without its last rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _loop, _tree
from hero_jax.spectrum import _basis, _residual

PyTree = Any
# A length of at most this many eps ||H|| is rounding error.
ROUNDING = 64


class Space(NamedTuple):
    """What the iteration has built: `H basis[:num_multiplied] = basis coefficients`, up to `defects`.

    basis: m + b rows, those beyond the ones found being zero; b is the number of start vectors.
    coefficients: (m + b, m), T above.
    defects: (m,), at most the length of the part of H q that a restart left out.
    num_multiplied: rows whose product is in `coefficients`; row `num_multiplied` is multiplied next.
    num_matvecs: products taken; more than `num_multiplied` after a restart.
    scale: the longest product so far, a lower bound of ||H||.
    asymmetry: see `Eigenpairs`.
    is_invariant: the Krylov space is complete, or the whole space is spanned: there is no row to multiply.
    """

    basis: PyTree
    coefficients: jax.Array
    defects: jax.Array
    num_multiplied: jax.Array
    num_matvecs: jax.Array
    scale: jax.Array
    asymmetry: jax.Array
    is_invariant: jax.Array


class Ritz(NamedTuple):
    """Ritz pairs: values (k,), components (m, k) on the multiplied rows, residual norms (k,), converged (k,).

    is_set: (k,), False where there are fewer than k; all else is 0 and not converged there.
    """

    values: jax.Array
    components: jax.Array
    residual_norms: jax.Array
    converged: jax.Array
    is_set: jax.Array


def krylov_space(operator: Callable[[PyTree], PyTree], v0: PyTree, num_steps: int) -> Space:
    """The Krylov space of `v0`, of at most `num_steps` dimensions and at most that of the whole space."""
    solver = _Krylov(min(num_steps, _tree.size(v0)), _basis.Packing.of(v0))
    # The empty space goes straight into the loop, so that nothing else holds its memory.
    start = jax.tree.map(lambda x: jnp.asarray(x)[None], v0)
    return _loop.run(solver, operator, empty(solver.num_steps, solver.packing, start))


def no_pairs(space: Space, k: int) -> Ritz:
    """The k Ritz pairs of an empty space: none is set."""
    zeros, none = jnp.zeros(k, space.coefficients.dtype), jnp.zeros(k, bool)
    return Ritz(zeros, jnp.zeros((space.coefficients.shape[1], k), zeros.dtype), zeros, none, none)


def ritz_pairs(space: Space, rtol: Any, k: int | None = None, which: str = "smallest", first: Any = 0) -> Ritz:
    """The k wanted Ritz pairs (default all, ascending) of the rows from `first` on."""
    coefficients, j = space.coefficients, space.num_multiplied
    num_columns = coefficients.shape[1]
    k = num_columns if k is None else k
    rows = jnp.arange(num_columns, dtype=j.dtype)
    is_set = (rows < j) & (rows >= first)
    projected = jnp.where(is_set[:, None] & is_set[None, :], coefficients[:num_columns], 0)
    # Rows not set yet get an eigenvalue of their own, far from all others, so that they mix with none.
    bound = jnp.max(jnp.sum(jnp.abs(projected), 1))
    far = jnp.where(bound > 0, 4 * bound, 1)
    matrix = (projected + projected.T) / 2 + jnp.diag(jnp.where(is_set, 0, far))
    values, vectors = jnp.linalg.eigh(matrix)
    is_real = jnp.sum(jnp.where(is_set[:, None], vectors**2, 0), 0) > 0.5
    rank = {"magnitude": -jnp.abs(values), "largest": -values, "smallest": values}[which]
    chosen = jnp.argsort(jnp.where(is_real, rank, jnp.inf))[:k]
    is_real = is_real[chosen]
    values = jnp.where(is_real, values[chosen], 0)
    components = jnp.where(is_real, vectors[:, chosen], 0)
    padded = jnp.zeros_like(coefficients, shape=(len(coefficients), k)).at[:num_columns].set(components)
    lengths = jax.vmap(_tree.norm, 1)(product(coefficients, components) - padded * values[None, :])
    residual_norms = jnp.where(is_real, lengths + left_out(space, components), 0)
    # A comparison with NaN is False.
    converged = is_real & ((residual_norms <= rtol * jnp.abs(values)) | (residual_norms <= rounding(space)))
    return Ritz(values, components, residual_norms, converged, is_real)


@dataclasses.dataclass(frozen=True)
class _Krylov:
    """Lanczos from one vector, to the end of its Krylov space."""

    num_steps: int
    packing: _basis.Packing

    def is_running(self, carry: Space) -> jax.Array:
        return ~carry.is_invariant & jnp.isfinite(carry.scale) & (carry.num_multiplied < self.num_steps)

    def argument(self, carry: Space) -> PyTree:
        return self.packing.unpack(_basis.row(carry.basis, carry.num_multiplied))

    def advance(self, carry: Space, product: PyTree) -> Space:
        return extend(carry, self.packing, product, 1, None)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty(num_columns: int, packing: _basis.Packing, v0: PyTree, key: jax.Array | None = None) -> Space:
    """A space with nothing multiplied and the orthonormalised start vectors as its first rows.

    A start vector that depends on those before it is replaced by a random one where there is a `key`.
    """
    v0 = jax.vmap(packing.pack)(v0)
    num_starts = len(jax.tree.leaves(v0)[0])
    basis = packing.empty_basis(num_columns + num_starts)
    for i in range(num_starts):
        vector, _ = _tree.normalize(_basis.row(v0, i))
        vector, _ = _basis.orthogonalize(basis, vector)
        left = _tree.norm(vector)
        vector, _ = _tree.normalize(vector)
        if key is not None:
            key, key_random = jax.random.split(key)
            # NaN or zero starts are replaced as well.
            is_new = left > 1e-3
            vector = jax.tree.map(
                lambda a, b, is_new=is_new: jnp.where(is_new, a, b),
                vector,
                _basis.random_direction(key_random, basis, packing),
            )
            vector, _ = _tree.normalize(_basis.orthogonalize(basis, vector)[0])
        basis = _basis.with_row(basis, i, vector)
    dtype = _tree.dot(v0, v0).dtype
    return Space(
        basis=basis,
        coefficients=jnp.zeros((num_columns + num_starts, num_columns), dtype),
        defects=jnp.zeros(num_columns, dtype),
        num_multiplied=jnp.zeros((), jnp.int32),
        num_matvecs=jnp.zeros((), jnp.int32),
        scale=jnp.zeros((), dtype),
        asymmetry=jnp.zeros((), dtype),
        is_invariant=jnp.zeros((), bool),
    )


def extend(
    space: Space, packing: _basis.Packing, product: PyTree, num_starts: int, key: jax.Array | None
) -> tuple[Space, jax.Array]:
    """The space after the product of its next row is known, with a new row at its end, and whether the product lay in
    it.

    If so, the new row is a random direction, or, without a `key`, there is none.
    """
    j = space.num_multiplied
    num_columns = space.coefficients.shape[1]
    _check.matching_tree("operator(v)", product, packing.unpack(_basis.row(space.basis, 0)), than="v")
    product = packing.pack(product)
    dtype = space.scale.dtype
    scale = jnp.maximum(space.scale, _tree.norm(product).astype(dtype))
    space = space._replace(scale=scale)
    rest, column = _basis.orthogonalize(space.basis, product)
    length = _tree.norm(rest).astype(dtype)
    has_ended = length <= rounding(space)
    unit, _ = _tree.normalize(rest)
    # What is cut off here stays in the residuals.
    defects = space.defects.at[j].set(jnp.where(has_ended, length, 0))
    length = jnp.where(has_ended, 0, length)
    if key is None:
        unit = _tree.scale(jnp.where(has_ended, 0, 1), unit)
    else:
        unit = jax.lax.cond(has_ended, lambda: _basis.random_direction(key, space.basis, packing), lambda: unit)
    new = j + num_starts
    coefficients = space.coefficients.at[:, j].set(column.astype(dtype).at[new].set(length))
    basis = _basis.with_row(space.basis, new, unit)
    is_set = jnp.arange(num_columns, dtype=j.dtype) <= j
    projected = jnp.where(is_set[:, None] & is_set[None, :], coefficients[:num_columns], 0)
    size = _tree.norm(projected)
    asymmetry = _tree.norm(projected - projected.T) / jnp.where(size > 0, size, 1)
    next_row = _basis.row(basis, jnp.minimum(j + 1, num_columns + num_starts - 1))
    space = Space(
        basis=basis,
        coefficients=coefficients,
        defects=defects,
        num_multiplied=j + 1,
        num_matvecs=space.num_matvecs + 1,
        scale=scale,
        asymmetry=jnp.maximum(space.asymmetry, asymmetry),
        # NaN is not zero: a broken product is not an invariant space.
        is_invariant=_tree.largest(next_row) == 0,
    )
    return space, has_ended


@functools.partial(jax.jit, static_argnums=0)
def _stacked(packing: _basis.Packing, ritz: Ritz, space: Space) -> PyTree:
    """The vectors y = Q s, stacked."""
    num_columns = space.coefficients.shape[1]
    rows = _basis.combine(ritz.components.T, jax.tree.map(lambda q: q[:num_columns], space.basis))
    return jax.vmap(packing.unpack)(rows)


def ritz_vectors(packing: _basis.Packing, ritz: Ritz, space: Space, like: PyTree) -> PyTree:
    """The vectors, in the types of `like`."""
    return jax.tree.map(lambda v, x: v.astype(jnp.result_type(x)), _stacked(packing, ritz, space), like)


def marked(ritz: Ritz) -> tuple[jax.Array, jax.Array]:
    """Values and relative residuals, NaN in the places that are not set."""
    residuals = _residual.relative(ritz.residual_norms, ritz.values)
    return _tree.nan_where(~ritz.is_set, ritz.values), _tree.nan_where(~ritz.is_set, residuals)


def rounding(space: Space) -> jax.Array:
    """The length below which a vector is rounding error of the operator."""
    return ROUNDING * jnp.finfo(space.scale.dtype).eps * space.scale


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in full: accelerators round the factors to 8 or 11 bits by default."""
    return jnp.matmul(a, b, precision="highest")


def left_out(space: Space, components: jax.Array) -> jax.Array:
    """The length that the defects of the rows add up to in each combination of rows."""
    return added(space, jnp.abs(space.defects[:, None] * components))


def added(space: Space, lengths: jax.Array) -> jax.Array:
    """The length of the sum, over the first axis, of vectors whose lengths alone are known.

    At most the sum of the lengths; the root of the sum of their squares where all are rounding errors, which are
    independent of each other.
    """
    most = lengths.sum(0)
    return jnp.where(most > rounding(space), most, jax.vmap(_tree.norm, 1)(lengths))

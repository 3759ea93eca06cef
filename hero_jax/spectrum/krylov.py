"""Lanczos iterations: several eigenpairs at once, each with its residual.

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
from jax.core import Tracer

from hero_jax import _check, _loop, _tree
from hero_jax.errors import ArgumentError
from hero_jax.operators import Operator, like_of
from hero_jax.spectrum import _basis
from hero_jax.spectrum.power import relative

__all__ = ["WHICH", "Eigenpairs", "Lanczos", "lanczos", "top_eigenpairs"]

PyTree = Any
WHICH = ("magnitude", "largest", "smallest")
# A length of at most this many eps ||H|| is rounding error.
ROUNDING = 64
# Where the space was invariant, the largest eigenvalue outside it is to be known to this relative residual.
OUTSIDE_RTOL = 0.1


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs, best known first in the order that was asked for, and how good each is.

    eigenvalues: (k,), float32 or wider; sign kept. NaN, with NaN residuals, where fewer than k products were taken.
    eigenvectors: pytree whose leaves have a new first axis of k; orthonormal, in the types of the parameters.
    residuals: (k,), ||H v - lambda v|| / |lambda|, or an upper bound of it after a restart with an operator that is not
      symmetric; 0 where both vanish.
    converged: (k,), whether the residual is at most `rtol`, or ||H v - lambda v|| is at the rounding error of the
      operator (64 eps ||H||), which is how an eigenvalue 0 is recognised.
    num_matvecs: int32, products taken.
    asymmetry: ||T - T^T|| / ||T||, Frobenius, of the operator projected onto the vectors tried. At rounding level for
      a symmetric operator; larger where the operator is not symmetric or not the same function every time.
    """

    eigenvalues: jax.Array
    eigenvectors: PyTree
    residuals: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array
    asymmetry: jax.Array


class Lanczos(NamedTuple):
    """Ritz pairs of a Krylov space: the operator as its start vector sees it.

    eigenvalues: (m,) ascending; NaN in the places that the space did not fill, which come last.
    eigenvectors: pytree whose leaves have a new first axis of m; orthonormal, zero in places not filled.
    components: (m,), c with v0 / ||v0|| = sum_i c_i y_i; so f(H) v0 is about ||v0|| sum_i c_i f(theta_i) y_i, and c^2
      are the weights of the Gauss quadrature for v0^T f(H) v0 / ||v0||^2.
    residuals: (m,), ||H y - theta y|| / |theta|; 0 where both vanish, NaN in places not filled.
    converged: (m,), as in `Eigenpairs`.
    num_matvecs: int32, products taken: the dimension of the space. Below m where the space is invariant already.
    asymmetry: as in `Eigenpairs`.
    """

    eigenvalues: jax.Array
    eigenvectors: PyTree
    components: jax.Array
    residuals: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array
    asymmetry: jax.Array


def top_eigenpairs(
    operator: Operator,
    key: jax.Array,
    *,
    k: int = 5,
    which: str = "magnitude",
    rtol: float = 1e-3,
    max_matvecs: int = 300,
    basis_size: int | None = None,
    v0: PyTree | None = None,
) -> Eigenpairs:
    """Finds k eigenpairs at an end of the spectrum by thick-restart Lanczos with full reorthogonalisation.

        Q <- [Q, orth(H q)],   T = Q^T H Q,   T s = theta s,   y = Q s

    until the k wanted Ritz pairs have ||H y - theta y|| <= rtol |theta|. When Q is full, it is replaced by its best
    Ritz vectors and the iteration goes on from there. Where the space becomes invariant (a start at an eigenvector, a
    low rank), its pairs are exact but need not be the wanted ones: a random vector orthogonal to it comes next, and the
    search ends when the largest eigenvalue out there is known to 10 % and changes nothing.

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's choice.
      key: for random vectors.
      k: number of eigenpairs. Static.
      which: "magnitude" (largest |lambda|), "largest" or "smallest" (algebraic). Static.
      rtol: relative residual at which to stop.
      max_matvecs: most products to take.
      basis_size: vectors kept beyond those of the start, more than k; default max(2 k, k + 60) or the dimension.
        Static.
      v0: start vectors, stacked along a new first axis of every leaf: the `eigenvectors` of an earlier result, to
        follow a spectrum in a few products (ask for one more than needed, so that one overtaking another is seen), or
        several random ones. Default one random vector.

    Returns:
      `Eigenpairs`. `converged` says of each that it is an eigenpair, not that none was missed: one start vector sees
      one eigenvector of an exactly repeated eigenvalue, and finds another only after the rest of the space. With b
      start vectors each eigenvalue is found up to b times.

    Raises:
      ArgumentError: k larger than the dimension, an unknown `which`, a start of the wrong shape, `operator` not
        shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: `num_matvecs` products; `basis_size` vectors in float32 or wider, and as many again during a step. Compiled
    and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> diagonal = jnp.array([1.0, -7.0, 3.0, 0.5, 6.0, -2.0])
    >>> operator = Operator(lambda v: diagonal * v, jnp.zeros(6))
    >>> result = top_eigenpairs(operator, jax.random.key(0), k=3)
    >>> [round(float(x), 3) for x in result.eigenvalues], result.converged
    ([-7.0, 6.0, 3.0], Array([ True,  True,  True], dtype=bool))

    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
    Appl. 2000; several start vectors as in Ruhe's band Lanczos (Bai et al., Templates for the solution of algebraic
    eigenvalue problems, section 4.6).
    """
    like = like_of("top_eigenpairs(operator=...)", operator)
    dimension = _tree.size(like)
    _check.integer("top_eigenpairs(k=...)", k, low=1, high=dimension)
    _check.one_of("top_eigenpairs(which=...)", which, WHICH)
    _check.positive("top_eigenpairs(rtol=...)", rtol)
    _check.integer("top_eigenpairs(max_matvecs=...)", max_matvecs, low=1)
    if basis_size is None:
        basis_size = max(2 * k, k + 60)
    else:
        _check.integer("top_eigenpairs(basis_size=...)", basis_size, low=min(k + 1, dimension))
    num_starts = 1 if v0 is None else _check_starts(v0, like)
    packing = _basis.Packing.of(like)
    solver = _TopEigenpairs(k, which, min(basis_size, dimension), num_starts, packing)
    carry = _loop.run(solver, operator, _start(solver, v0, key, rtol, max_matvecs))
    values, residuals = _marked(carry.ritz)
    return Eigenpairs(
        eigenvalues=values,
        eigenvectors=_ritz_vectors(packing, carry.ritz, carry.space, like),
        residuals=residuals,
        converged=carry.ritz.converged,
        num_matvecs=carry.space.num_matvecs,
        asymmetry=carry.space.asymmetry,
    )


def lanczos(
    operator: Callable[[PyTree], PyTree],
    v0: PyTree,
    *,
    num_steps: int = 64,
    rtol: float = 1e-3,
) -> Lanczos:
    """Projects an operator onto the Krylov space of a start vector.

        K_m = span(v0, H v0, ..., H^(m-1) v0),   T = Q^T H Q,   T s_i = theta_i s_i,   y_i = Q s_i

    with full reorthogonalisation, stopping early where K_m is invariant (to 64 eps ||H||): a start at an eigenvector
    gives that eigenvalue alone.

    Args:
      operator: an `Operator`, or any function `vector -> vector`: symmetric and linear, H, on pytrees shaped like `v0`;
        which loss, data and mean are the caller's.
      v0: start vector, pytree of floating-point arrays, not zero.
      num_steps: m, products to take at most; the dimension where that is smaller. Static.
      rtol: relative residual below which a Ritz pair counts as converged.

    Returns:
      `Lanczos`, leading axis m = min(num_steps, dimension).

    Raises:
      ArgumentError: `v0` zero or not finite, `num_steps` or `rtol` not positive, `operator` not shape-preserving.
      TypeError: a leaf of `v0` is not floating point.

    Cost: at most m products; m vectors in float32 or wider, and as many again during a step and for the result.
    Compiled and looped as `power_iteration` is.

    >>> import jax.numpy as jnp
    >>> result = lanczos(lambda v: jnp.array([2.0, -1.0, 5.0]) * v, jnp.array([3.0, 0.0, 4.0]))
    >>> [round(float(x), 3) for x in result.eigenvalues], [round(float(c**2), 3) for c in result.components]
    ([2.0, 5.0, nan], [0.36, 0.64, 0.0])

    Source: Golub and Meurant, Matrices, moments and quadrature with applications, chapters 4 and 6.
    """
    _check.floating_tree("v0", v0)
    _check.integer("lanczos(num_steps=...)", num_steps, low=1)
    _check.positive("lanczos(rtol=...)", rtol)
    length = jax.jit(_tree.norm)(v0)
    if not isinstance(length, Tracer) and not (jnp.isfinite(length) and length > 0):
        raise ArgumentError(f"`lanczos(v0=...)` must be finite and not zero; its norm is {length}.")
    space = krylov_space(operator, v0, num_steps)
    ritz = ritz_pairs(space, rtol)
    values, residuals = _marked(ritz)
    return Lanczos(
        eigenvalues=values,
        eigenvectors=_ritz_vectors(_basis.Packing.of(v0), ritz, space, v0),
        components=ritz.components[0],
        residuals=residuals,
        converged=ritz.converged,
        num_matvecs=space.num_matvecs,
        asymmetry=space.asymmetry,
    )


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
    return _loop.run(solver, operator, _empty(solver.num_steps, solver.packing, start))


def ritz_pairs(space: Space, rtol: Any, k: int | None = None, which: str = "smallest", first: Any = 0) -> Ritz:
    """The k wanted Ritz pairs (default all, ascending) of the rows from `first` on."""
    coefficients, j = space.coefficients, space.num_multiplied
    num_columns = coefficients.shape[1]
    k = num_columns if k is None else k
    is_set = (jnp.arange(num_columns) < j) & (jnp.arange(num_columns) >= first)
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
    lengths = jax.vmap(_tree.norm, 1)(_product(coefficients, components) - padded * values[None, :])
    residual_norms = jnp.where(is_real, lengths + _left_out(space, components), 0)
    # A comparison with NaN is False.
    converged = is_real & ((residual_norms <= rtol * jnp.abs(values)) | (residual_norms <= _rounding(space)))
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
        return _extend(carry, self.packing, product, 1, None)[0]


class _Carry(NamedTuple):
    """State of `top_eigenpairs`.

    random_row: the row of the random direction taken when the space was last invariant; -1 before it ever was.
    is_confirmed: whether nothing says that a wanted eigenvalue lies outside the space. An invariant space gives exact
      eigenpairs only, wanted or not: the Krylov space of a random direction outside it must have its own best pair
      known to `OUTSIDE_RTOL` and leave the wanted ones as they are.
    """

    space: Space
    ritz: Ritz
    random_row: jax.Array
    is_confirmed: jax.Array
    key: jax.Array
    limits: tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _TopEigenpairs:
    """Thick-restart Lanczos from `num_starts` vectors."""

    k: int
    which: str
    basis_size: int
    num_starts: int
    packing: _basis.Packing

    def is_running(self, carry: _Carry) -> jax.Array:
        _, max_matvecs = carry.limits
        space = carry.space
        is_found = carry.ritz.converged.all() & carry.is_confirmed & (space.num_matvecs >= self.num_starts)
        return ~is_found & ~space.is_invariant & jnp.isfinite(space.scale) & (space.num_matvecs < max_matvecs)

    def argument(self, carry: _Carry) -> PyTree:
        return self.packing.unpack(_basis.row(carry.space.basis, carry.space.num_multiplied))

    def advance(self, carry: _Carry, product: PyTree) -> _Carry:
        j, (rtol, _) = carry.space.num_multiplied, carry.limits
        key_random, key = jax.random.split(carry.key)
        space, has_ended = _extend(carry.space, self.packing, product, self.num_starts, key_random)
        ritz = ritz_pairs(space, rtol, self.k, self.which)
        change = jnp.abs(ritz.values - carry.ritz.values)
        is_same = (change <= rtol * jnp.abs(ritz.values)) | (change <= _rounding(space))
        is_stable = (is_same & ritz.is_set & carry.ritz.is_set).all()
        was_invariant = carry.random_row >= 0
        outside = ritz_pairs(space, OUTSIDE_RTOL, 1, self.which, first=carry.random_row)
        is_explored = (j >= carry.random_row) & outside.converged.all()
        carry = _Carry(
            space=space,
            ritz=ritz,
            random_row=jnp.where(has_ended & (j >= carry.random_row), j + self.num_starts, carry.random_row),
            is_confirmed=jnp.where(was_invariant, is_explored & is_stable, ~has_ended),
            key=key,
            limits=carry.limits,
        )
        is_full = (space.num_multiplied == self.basis_size) & self.is_running(carry)
        return jax.lax.cond(is_full, self._restart, lambda carry: carry, carry)

    def _restart(self, carry: _Carry) -> _Carry:
        """The space of the best Ritz vectors, followed by the rows not multiplied yet."""
        space, (rtol, _) = carry.space, carry.limits
        m, b = self.basis_size, self.num_starts
        num_kept = min(self.k + (m - self.k) // 2, m - 1)
        kept = ritz_pairs(space, rtol, num_kept, self.which)
        rotation = jnp.zeros_like(space.coefficients, shape=(m + b, m + b))
        rotation = rotation.at[:num_kept, :m].set(kept.components.T)
        rotation = rotation.at[num_kept + jnp.arange(b), m + jnp.arange(b)].set(1)
        coefficients = jnp.zeros_like(space.coefficients).at[:num_kept, :num_kept].set(jnp.diag(kept.values))
        coefficients = coefficients.at[num_kept : num_kept + b, :num_kept].set(
            _product(space.coefficients[m:], kept.components)
        )
        # Of H y, the part in the old span but not along y is what asymmetry and rounding leave.
        left_out = _product(space.coefficients[:m], kept.components) - kept.components * kept.values[None, :]
        lengths = jnp.stack([jax.vmap(_tree.norm, 1)(left_out), _left_out(space, kept.components)])
        defects = _added(space, lengths)
        space = space._replace(
            basis=_basis.combine(rotation, space.basis),
            coefficients=coefficients,
            defects=jnp.zeros_like(space.defects).at[:num_kept].set(defects),
            num_multiplied=jnp.full_like(space.num_multiplied, num_kept),
        )
        return carry._replace(
            space=space,
            ritz=ritz_pairs(space, rtol, self.k, self.which),
            # A space outside that was being explored goes on from the first row not multiplied.
            random_row=jnp.where(carry.random_row < 0, -1, num_kept + jnp.maximum(carry.random_row - m, 0)),
        )


@functools.partial(jax.jit, static_argnums=0)
def _start(solver: _TopEigenpairs, v0: PyTree | None, key: jax.Array, rtol: Any, max_matvecs: Any) -> _Carry:
    key_default, key_start, key = jax.random.split(key, 3)
    if v0 is None:
        v0 = jax.tree.map(lambda x: x[None], _tree.random_normal(key_default, solver.packing.like()))
    space = _empty(solver.basis_size, solver.packing, v0, key_start)
    limits = (jnp.asarray(rtol, space.scale.dtype), jnp.asarray(max_matvecs, jnp.int32))
    return _Carry(
        space=space,
        ritz=ritz_pairs(space, limits[0], solver.k, solver.which),
        random_row=jnp.full((), -1, jnp.int32),
        is_confirmed=jnp.zeros((), bool),
        key=key,
        limits=limits,
    )


def _marked(ritz: Ritz) -> tuple[jax.Array, jax.Array]:
    """Values and relative residuals, NaN in the places that are not set."""
    residuals = relative(ritz.residual_norms, ritz.values)
    return _tree.nan_where(~ritz.is_set, ritz.values), _tree.nan_where(~ritz.is_set, residuals)


@functools.partial(jax.jit, static_argnums=0)
def _stacked(packing: _basis.Packing, ritz: Ritz, space: Space) -> PyTree:
    """The vectors y = Q s, stacked."""
    num_columns = space.coefficients.shape[1]
    rows = _basis.combine(ritz.components.T, jax.tree.map(lambda q: q[:num_columns], space.basis))
    return jax.vmap(packing.unpack)(rows)


def _ritz_vectors(packing: _basis.Packing, ritz: Ritz, space: Space, like: PyTree) -> PyTree:
    """The vectors, in the types of `like`."""
    return jax.tree.map(lambda v, x: v.astype(jnp.result_type(x)), _stacked(packing, ritz, space), like)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(num_columns: int, packing: _basis.Packing, v0: PyTree, key: jax.Array | None = None) -> Space:
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


def _extend(
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
    has_ended = length <= _rounding(space)
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
    is_set = jnp.arange(num_columns) <= j
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


def _rounding(space: Space) -> jax.Array:
    """The length below which a vector is rounding error of the operator."""
    return ROUNDING * jnp.finfo(space.scale.dtype).eps * space.scale


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in full: accelerators round the factors to 8 or 11 bits by default."""
    return jnp.matmul(a, b, precision="highest")


def _left_out(space: Space, components: jax.Array) -> jax.Array:
    """The length that the defects of the rows add up to in each combination of rows."""
    return _added(space, jnp.abs(space.defects[:, None] * components))


def _added(space: Space, lengths: jax.Array) -> jax.Array:
    """The length of the sum, over the first axis, of vectors whose lengths alone are known.

    At most the sum of the lengths; the root of the sum of their squares where all are rounding errors, which are
    independent of each other.
    """
    most = lengths.sum(0)
    return jnp.where(most > _rounding(space), most, jax.vmap(_tree.norm, 1)(lengths))


def _check_starts(v0: PyTree, like: PyTree) -> int:
    """The number of start vectors; raises unless `v0` is like `like` with a new first axis."""
    leaves = jax.tree.leaves(v0)
    num_starts = jnp.shape(leaves[0])[0] if leaves and jnp.ndim(leaves[0]) else 0
    if num_starts == 0:
        raise ArgumentError(
            "`top_eigenpairs(v0=...)` must have the start vectors along a new first axis of every leaf."
        )
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_starts, *jnp.shape(x)), jnp.result_type(x)), like)
    _check.matching_tree("top_eigenpairs(v0=...)", v0, stacked, than="like with a new first axis")
    return num_starts

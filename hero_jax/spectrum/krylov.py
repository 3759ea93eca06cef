"""Lanczos iterations: several eigenpairs at once, each with its residual."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _loop, _tree, errors
from hero_jax._jax import Tracer
from hero_jax.errors import ArgumentError
from hero_jax.operators import Operator, like_of
from hero_jax.spectrum import _basis, _krylov

__all__ = ["WHICH", "Eigenpairs", "Lanczos", "lanczos", "top_eigenpairs"]

PyTree = Any
WHICH = ("magnitude", "largest", "smallest")
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
    errors.integer("top_eigenpairs(k=...)", k, low=1, high=dimension)
    errors.one_of("top_eigenpairs(which=...)", which, WHICH)
    errors.positive("top_eigenpairs(rtol=...)", rtol)
    errors.integer("top_eigenpairs(max_matvecs=...)", max_matvecs, low=1)
    if basis_size is None:
        basis_size = max(2 * k, k + 60)
    else:
        errors.integer("top_eigenpairs(basis_size=...)", basis_size, low=min(k + 1, dimension))
    num_starts = 1 if v0 is None else _check_starts(v0, like)
    packing = _basis.Packing.of(like)
    solver = _TopEigenpairs(k, which, min(basis_size, dimension), num_starts, packing)
    carry = _loop.run(solver, operator, _start(solver, v0, key, rtol, max_matvecs))
    values, residuals = _krylov.marked(carry.ritz)
    return Eigenpairs(
        eigenvalues=values,
        eigenvectors=_krylov.ritz_vectors(packing, carry.ritz, carry.space, like),
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
    errors.integer("lanczos(num_steps=...)", num_steps, low=1)
    errors.positive("lanczos(rtol=...)", rtol)
    length = jax.jit(_tree.norm)(v0)
    if not isinstance(length, Tracer) and not (jnp.isfinite(length) and length > 0):
        raise ArgumentError(f"`lanczos(v0=...)` must be finite and not zero; its norm is {length}.")
    space = _krylov.krylov_space(operator, v0, num_steps)
    ritz = _krylov.ritz_pairs(space, rtol)
    values, residuals = _krylov.marked(ritz)
    return Lanczos(
        eigenvalues=values,
        eigenvectors=_krylov.ritz_vectors(_basis.Packing.of(v0), ritz, space, v0),
        components=ritz.components[0],
        residuals=residuals,
        converged=ritz.converged,
        num_matvecs=space.num_matvecs,
        asymmetry=space.asymmetry,
    )


class _Carry(NamedTuple):
    """State of `top_eigenpairs`.

    random_row: the row of the random direction taken when the space was last invariant; -1 before it ever was.
    is_confirmed: whether nothing says that a wanted eigenvalue lies outside the space. An invariant space gives exact
      eigenpairs only, wanted or not: the Krylov space of a random direction outside it must have its own best pair
      known to `OUTSIDE_RTOL` and leave the wanted ones as they are.
    """

    space: _krylov.Space
    ritz: _krylov.Ritz
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
        space, has_ended = _krylov.extend(carry.space, self.packing, product, self.num_starts, key_random)
        ritz = _krylov.ritz_pairs(space, rtol, self.k, self.which)
        change = jnp.abs(ritz.values - carry.ritz.values)
        is_same = (change <= rtol * jnp.abs(ritz.values)) | (change <= _krylov.rounding(space))
        is_stable = (is_same & ritz.is_set & carry.ritz.is_set).all()
        was_invariant = carry.random_row >= 0
        outside = _krylov.ritz_pairs(space, OUTSIDE_RTOL, 1, self.which, first=carry.random_row)
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
        kept = _krylov.ritz_pairs(space, rtol, num_kept, self.which)
        rotation = jnp.zeros_like(space.coefficients, shape=(m + b, m + b))
        rotation = rotation.at[:num_kept, :m].set(kept.components.T)
        rotation = rotation.at[num_kept + jnp.arange(b), m + jnp.arange(b)].set(1)
        coefficients = jnp.zeros_like(space.coefficients).at[:num_kept, :num_kept].set(jnp.diag(kept.values))
        coefficients = coefficients.at[num_kept : num_kept + b, :num_kept].set(
            _krylov.product(space.coefficients[m:], kept.components)
        )
        # Of H y, the part in the old span but not along y is what asymmetry and rounding leave.
        left_out = _krylov.product(space.coefficients[:m], kept.components) - kept.components * kept.values[None, :]
        lengths = jnp.stack([jax.vmap(_tree.norm, 1)(left_out), _krylov.left_out(space, kept.components)])
        defects = _krylov.added(space, lengths)
        space = space._replace(
            basis=_basis.combine(rotation, space.basis),
            coefficients=coefficients,
            defects=jnp.zeros_like(space.defects).at[:num_kept].set(defects),
            num_multiplied=jnp.full_like(space.num_multiplied, num_kept),
        )
        return carry._replace(
            space=space,
            ritz=_krylov.ritz_pairs(space, rtol, self.k, self.which),
            # A space outside that was being explored goes on from the first row not multiplied.
            random_row=jnp.where(carry.random_row < 0, -1, num_kept + jnp.maximum(carry.random_row - m, 0)),
        )


@functools.partial(jax.jit, static_argnums=0)
def _start(solver: _TopEigenpairs, v0: PyTree | None, key: jax.Array, rtol: Any, max_matvecs: Any) -> _Carry:
    key_default, key_start, key = jax.random.split(key, 3)
    if v0 is None:
        v0 = jax.tree.map(lambda x: x[None], _tree.random_normal(key_default, solver.packing.like()))
    space = _krylov.empty(solver.basis_size, solver.packing, v0, key_start)
    limits = (jnp.asarray(rtol, space.scale.dtype), jnp.asarray(max_matvecs, jnp.int32))
    return _Carry(
        space=space,
        ritz=_krylov.no_pairs(space, solver.k),
        random_row=jnp.full((), -1, jnp.int32),
        is_confirmed=jnp.zeros((), bool),
        key=key,
        limits=limits,
    )


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

"""Averages over random probes: trace, diagonal, per-layer traces and Frobenius norm, each with its standard error.

For z with independent entries +-1 (E z z^T = I):

    E z^T H z = tr H,    E z * (H z) = diag H,    E ||H z||^2 = ||H||_F^2

The mean over n probes has the standard error s / sqrt(n), where s is the sample standard deviation (n - 1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _loop, _tree, errors
from hero_jax.operators import Operator, like_of
from hero_jax.spectrum import _basis

__all__ = ["Estimate", "Moments", "diagonal", "frobenius_norm", "layer_traces", "moments", "trace"]

PyTree = Any
# A standard error of fewer probes is too uncertain itself to stop on.
FEWEST_PROBES = 10
# Of a limit: no relative error was asked for.
NO_RTOL = -1.0


class Estimate(NamedTuple):
    """A mean over random probes.

    mean: the estimate: a scalar, or a pytree of arrays; float32 or wider.
    sem: its standard error, same structure; infinite for a single probe.
    num_probes: int32, independent probes averaged.
    num_matvecs: int32, products taken.
    converged: whether ||sem|| <= rtol ||mean||, norms over all entries; without an `rtol`, whether the mean is finite.
    """

    mean: PyTree
    sem: PyTree
    num_probes: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array


def trace(
    operator: Operator,
    key: jax.Array,
    *,
    num_probes: int = 100,
    rtol: float | None = None,
    sketch_size: int = 0,
) -> Estimate:
    """Estimates the trace, by Hutchinson's method or, with a sketch, by Hutch++.

        Hutchinson   mean of z^T H z
        Hutch++      tr(Q^T H Q) + mean of y^T H y,   y = z - Q Q^T z,   Q = orth(H S), S random signs

    Hutch++ computes the trace exactly on the span of `sketch_size` vectors that lean towards the largest eigenvalues,
    and averages over the rest: much the smaller standard error where few eigenvalues dominate, as they do in networks.

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes.
      num_probes: most probes to take.
      rtol: stop once sem <= rtol |mean|, after 10 probes at least; None takes all of them.
      sketch_size: vectors in Q; 0 is Hutchinson's method. At most the dimension. Static.

    Returns:
      `Estimate` of scalars, its error that of the averaged part. Unbiased, except that stopping early favours samples
      that happen to agree.

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: one product a probe and two a sketch vector; memory of `sketch_size` vectors in float32 or wider, and
    as many again during a step. The variance of one probe is
    2 (||H||_F^2 - ||diag H||^2). Compiled and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> operator = Operator(lambda v: matrix @ v, jnp.zeros(2))
    >>> result = trace(operator, jax.random.key(0), num_probes=400)
    >>> bool(abs(result.mean - 5) < 3 * result.sem), round(float(result.sem), 1)
    (True, 0.1)

    Source: Hutchinson 1990; Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation, SOSA 2021.
    """
    _check_arguments("trace", operator, num_probes, rtol)
    errors.integer("trace(sketch_size=...)", sketch_size, low=0, high=_tree.size(operator.like))
    if not sketch_size:
        return _rescaled(*_average(_quadratic_form, operator, key, num_probes, rtol))
    packing = _basis.Packing.of(operator.like)
    # Handed straight into the loop, so that nothing else holds its memory.
    basis = _loop.run(_SketchSolver(packing), operator, _empty_sketch(packing, sketch_size, key)).basis
    dtype = _tree.dot(basis, basis).dtype
    exact = _loop.run(
        _ExactSolver(packing), operator, _Exact(basis, jnp.zeros((), jnp.int32), jnp.zeros((), dtype))
    ).total
    rest = _rescaled(*_average(_quadratic_form, operator, key, num_probes, rtol, basis, exact))
    return rest._replace(num_matvecs=rest.num_matvecs + 2 * sketch_size)


def layer_traces(
    operator: Operator,
    key: jax.Array,
    *,
    num_probes: int = 100,
    rtol: float | None = None,
) -> Estimate:
    """Estimates the trace of every layer's diagonal block from the same probes.

        tr H_ii = E z_i^T (H z)_i,   i over leaves; their sum is z^T H z, a sample of the whole trace

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes.
      num_probes: most probes to take.
      rtol: stop once ||sem|| <= rtol ||mean|| over the layers, after 10 probes at least; None takes all of them.

    Returns:
      `Estimate` whose `mean` and `sem` are trees like those of the operator with a scalar for each leaf. A layer's
      error also has the products with all other layers in it: restrict the operator to one layer for the smallest error
      there.

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: one product a probe, for all layers together; memory of one product and two vectors. Compiled and looped as
    `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> diagonal = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-4.0])}
    >>> operator = Operator(lambda v: {k: diagonal[k] * v[k] for k in v}, diagonal)
    >>> result = layer_traces(operator, jax.random.key(0), num_probes=3)
    >>> {k: float(v) for k, v in result.mean.items()}, {k: float(v) for k, v in result.sem.items()}
    ({'a': 3.0, 'b': -4.0}, {'a': 0.0, 'b': 0.0})

    Source: Dong, Yao, Arfeen, Gholami, Mahoney and Keutzer, HAWQ-V2, NeurIPS 2020, section 3.
    """
    _check_arguments("layer_traces", operator, num_probes, rtol)
    return _rescaled(*_average(_layer_forms, operator, key, num_probes, rtol))


def diagonal(
    operator: Operator,
    key: jax.Array,
    *,
    num_probes: int = 100,
    rtol: float | None = None,
) -> Estimate:
    """Estimates the diagonal.

        diag H = E z * (H z)

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes.
      num_probes: most probes to take.
      rtol: stop once ||sem|| <= rtol ||mean|| over all entries, after 10 probes at least; None takes all of them.

    Returns:
      `Estimate` of trees like those of the operator: an error for every entry. That of entry i is the root of
      sum_(j != i) H_ij^2 / num_probes, often larger than the entry.

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: one product a probe; memory of four vectors. Compiled and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> operator = Operator(lambda v: matrix @ v, jnp.zeros(2))
    >>> result = diagonal(operator, jax.random.key(0), num_probes=400)
    >>> bool((abs(result.mean - jnp.array([2.0, 3.0])) < 3 * result.sem).all()), result.sem.round(2)
    (True, Array([0.05, 0.05], dtype=float32))

    Source: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Applied Numerical Mathematics 2007.
    """
    _check_arguments("diagonal", operator, num_probes, rtol)
    return _rescaled(*_average(_entry_forms, operator, key, num_probes, rtol))


def frobenius_norm(
    operator: Operator,
    key: jax.Array,
    *,
    num_probes: int = 100,
    rtol: float | None = None,
) -> Estimate:
    """Estimates the Frobenius norm, the root of the sum of the squared eigenvalues.

        ||H||_F = sqrt(E ||H z||^2),   sem = sem(||H z||^2) / (2 ||H||_F)

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes.
      num_probes: most probes to take.
      rtol: stop once sem <= rtol mean, after 10 probes at least; None takes all of them.

    Returns:
      `Estimate` of scalars. The square is unbiased; its root is low by about sem^2 / (2 mean).

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: one product a probe; memory of one product and two vectors. Compiled and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> operator = Operator(lambda v: jnp.array([3.0, -4.0]) * v, jnp.zeros(2))
    >>> result = frobenius_norm(operator, jax.random.key(0), num_probes=3)
    >>> float(result.mean), float(result.sem)
    (5.0, 0.0)

    Source: Hutchinson's estimator for H^2 (see `trace`); the quantity that the HERO authors plot as the Hessian norm.
    """
    _check_arguments("frobenius_norm", operator, num_probes, rtol)
    # A relative error of the root is half that of the square.
    square, unit = _average(_squared_length, operator, key, num_probes, None if rtol is None else 2 * rtol)
    return _rescaled(_root(square), unit)


class Moments(NamedTuple):
    """Estimates of the same probes: see the functions of these names."""

    trace: Estimate
    layer_traces: Estimate
    frobenius_norm: Estimate


def moments(operator: Operator, key: jax.Array, *, num_probes: int = 100) -> Moments:
    """Estimates trace, layer traces and Frobenius norm from the same probes, at the cost of one of them.

        mean of z^T H z,   of z_i^T (H z)_i,   and the root of the mean of ||H z||^2

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes: with the same key, `trace`, `layer_traces` and `frobenius_norm` alone give the same numbers.
      num_probes: probes to take.

    Returns:
      `Moments`. Each `num_matvecs` is that of all three together.

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: one product a probe; memory of one product and two vectors. Compiled and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> diagonal = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-4.0])}
    >>> operator = Operator(lambda v: {k: diagonal[k] * v[k] for k in v}, diagonal)
    >>> result = moments(operator, jax.random.key(0), num_probes=3)
    >>> float(result.trace.mean), float(result.layer_traces.mean["a"]), round(float(result.frobenius_norm.mean) ** 2, 3)
    (-1.0, 3.0, 21.0)

    Source: see `trace`.
    """
    _check_arguments("moments", operator, num_probes, None)
    every, unit = _average(_all_forms, operator, key, num_probes, None)
    parts = [every._replace(mean=mean, sem=sem) for mean, sem in zip(every.mean, every.sem, strict=True)]
    return Moments(_rescaled(parts[0], unit), _rescaled(parts[1], unit), _rescaled(_root(parts[2]), unit))


def _check_arguments(name: str, operator: Operator, num_probes: Any, rtol: Any) -> None:
    _check.not_empty(f"{name}(operator=...).like", like_of(f"{name}(operator=...)", operator))
    errors.integer(f"{name}(num_probes=...)", num_probes, low=1)
    if rtol is not None:
        errors.non_negative(f"{name}(rtol=...)", rtol)


def _quadratic_form(z: PyTree, product: PyTree) -> jax.Array:
    return _tree.dot(z, product)


def _layer_forms(z: PyTree, product: PyTree) -> PyTree:
    return jax.tree.map(_tree.dot, z, product)


def _entry_forms(z: PyTree, product: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: _tree.wide(x) * _tree.wide(y), z, product)


def _squared_length(z: PyTree, product: PyTree) -> jax.Array:
    del z
    return _tree.dot(product, product)


def _all_forms(z: PyTree, product: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
    return _quadratic_form(z, product), _layer_forms(z, product), _squared_length(z, product)


def _root(square: Estimate) -> Estimate:
    mean = jnp.sqrt(square.mean)
    # Where the norm is 0, so are all samples and their error.
    return square._replace(mean=mean, sem=square.sem / jnp.where(mean == 0, 1, 2 * mean))


def _rescaled(estimate: Estimate, unit: jax.Array) -> Estimate:
    return estimate._replace(mean=_tree.scale(unit, estimate.mean), sem=_tree.scale(unit, estimate.sem))


class _Running(NamedTuple):
    """Running mean and sum of squared deviations of `num_probes` samples, each a tree."""

    mean: PyTree
    squares: PyTree
    num_probes: jax.Array


class _Carry(NamedTuple):
    """unit: about the length of the first product; all are measured in it, so that no square over- or underflows."""

    moments: _Running
    unit: jax.Array
    basis: PyTree | None
    offset: jax.Array
    key: jax.Array
    limits: tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Average:
    """The mean over probes of `statistic(z, H z)`, a tree."""

    statistic: Callable[[PyTree, PyTree], PyTree]
    packing: _basis.Packing

    def is_running(self, carry: _Carry) -> jax.Array:
        rtol, most = carry.limits
        taken = carry.moments.num_probes
        is_precise = (taken >= FEWEST_PROBES) & (rtol >= 0) & ~self.is_above(carry)
        is_finite = jnp.isfinite(_tree.norm(carry.moments.mean))
        return (taken < most) & ~is_precise & is_finite

    def is_above(self, carry: _Carry) -> jax.Array:
        """Whether ||sem|| > rtol ||mean||, NaN counting as such."""
        mean = _shifted(carry)
        return ~(_tree.norm(_standard_error(carry.moments)) <= carry.limits[0] * _tree.norm(mean))

    def argument(self, carry: _Carry) -> PyTree:
        z = _tree.random_signs(jax.random.fold_in(carry.key, carry.moments.num_probes), self.packing.like())
        if carry.basis is None:
            return z
        return self.packing.unpack(_basis.orthogonalize(carry.basis, self.packing.pack(z))[0])

    def advance(self, carry: _Carry, product: PyTree) -> _Carry:
        z = self.argument(carry)
        _check.matching_tree("operator(z)", product, z, than="z")
        mean, squares, taken = carry.moments
        length = _tree.norm(product).astype(carry.unit.dtype)
        power_of_two = jnp.ldexp(jnp.ones_like(length), jnp.frexp(length)[1])
        unit = jnp.where((taken == 0) & (length > 0) & jnp.isfinite(length), power_of_two, carry.unit)
        sample = self.statistic(z, jax.tree.map(lambda x: _tree.wide(x) / _tree.scale_like(unit, x), product))
        # Welford: sums of squares would cancel.
        deviation = _tree.subtract(sample, mean)
        mean = jax.tree.map(lambda m, d: m + d / (taken + 1).astype(d.dtype), mean, deviation)
        squares = jax.tree.map(lambda s, d, x, m: s + d * (x - m), squares, deviation, sample, mean)
        return carry._replace(moments=_Running(mean, squares, taken + 1), unit=unit)


def _shifted(carry: _Carry) -> PyTree:
    """The mean with the offset, in units."""
    return jax.tree.map(lambda x: x + (carry.offset / carry.unit).astype(x.dtype), carry.moments.mean)


def _standard_error(moments: _Running) -> PyTree:
    n = moments.num_probes
    return jax.tree.map(
        lambda s: jnp.where(n > 1, jnp.sqrt(s / jnp.maximum(n * (n - 1), 1).astype(s.dtype)), jnp.inf), moments.squares
    )


def _average(
    statistic: Callable[[PyTree, PyTree], PyTree],
    operator: Operator,
    key: jax.Array,
    num_probes: Any,
    rtol: Any,
    basis: PyTree | None = None,
    offset: Any = 0.0,
) -> tuple[Estimate, jax.Array]:
    """The mean of `statistic(z, H z / unit)` over probes orthogonal to `basis`, plus `offset` / unit; and the unit."""
    packing = _basis.Packing.of(operator.like)
    zero = _zero(statistic, packing)
    dtype = _tree.wide_type(*jax.tree.leaves(zero))
    offset = jnp.asarray(offset, dtype)
    limits = (jnp.asarray(NO_RTOL if rtol is None else rtol, dtype), jnp.asarray(num_probes, jnp.int32))
    solver = _Average(statistic, packing)
    start = _Carry(_Running(zero, zero, jnp.zeros((), jnp.int32)), jnp.ones((), dtype), basis, offset, key, limits)
    return _finish(solver, _loop.run(solver, operator, start))


@functools.partial(jax.jit, static_argnums=0)
def _finish(solver: _Average, carry: _Carry) -> tuple[Estimate, jax.Array]:
    """The estimate in units, and the unit."""
    estimate = Estimate(
        mean=_shifted(carry),
        sem=_standard_error(carry.moments),
        num_probes=carry.moments.num_probes,
        num_matvecs=carry.moments.num_probes,
        converged=jnp.where(carry.limits[0] < 0, jnp.isfinite(_tree.norm(_shifted(carry))), ~solver.is_above(carry)),
    )
    return estimate, carry.unit


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zero(statistic: Callable[[PyTree, PyTree], PyTree], packing: _basis.Packing) -> PyTree:
    """The statistic of zeros, which are zeros split over devices as its other values are."""
    zeros = jax.tree.map(lambda x: _tree.place(jnp.zeros(x.shape, x.dtype), x.sharding), packing.like())
    return statistic(zeros, zeros)


class _Sketch(NamedTuple):
    basis: PyTree
    num_rows: jax.Array
    key: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_sketch(packing: _basis.Packing, num_rows: int, key: jax.Array) -> _Sketch:
    return _Sketch(packing.empty_basis(num_rows), jnp.zeros((), jnp.int32), jax.random.fold_in(key, 2**31))


@dataclasses.dataclass(frozen=True)
class _SketchSolver:
    """An orthonormal basis of H S."""

    packing: _basis.Packing

    def is_running(self, carry: _Sketch) -> jax.Array:
        return carry.num_rows < len(jax.tree.leaves(carry.basis)[0])

    def argument(self, carry: _Sketch) -> PyTree:
        return _tree.random_signs(jax.random.fold_in(carry.key, carry.num_rows), self.packing.like())

    def advance(self, carry: _Sketch, product: PyTree) -> _Sketch:
        _check.matching_tree("operator(z)", product, self.packing.like(), than="z")
        product = self.packing.pack(product)
        rest, _ = _basis.orthogonalize(carry.basis, product)
        length = _tree.norm(product)
        unit, left = _tree.normalize(rest)
        # A product in the span already (rank below the sketch) adds no vector: its rest is rounding error.
        is_new = left > 64 * jnp.finfo(left.dtype).eps * length
        unit, _ = _tree.normalize(_basis.orthogonalize(carry.basis, unit)[0])
        unit = _tree.scale(jnp.where(is_new | jnp.isnan(left), 1, 0), unit)
        return carry._replace(basis=_basis.with_row(carry.basis, carry.num_rows, unit), num_rows=carry.num_rows + 1)


class _Exact(NamedTuple):
    basis: PyTree
    num_rows: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class _ExactSolver:
    """tr(Q^T H Q), a product a row of the basis."""

    packing: _basis.Packing

    def is_running(self, carry: _Exact) -> jax.Array:
        return carry.num_rows < len(jax.tree.leaves(carry.basis)[0])

    def argument(self, carry: _Exact) -> PyTree:
        return self.packing.unpack(_basis.row(carry.basis, carry.num_rows))

    def advance(self, carry: _Exact, product: PyTree) -> _Exact:
        form = _tree.dot(self.argument(carry), product).astype(carry.total.dtype)
        return carry._replace(num_rows=carry.num_rows + 1, total=carry.total + form)

"""Pytree algebra that optax.tree lacks: every reduction and difference in float32 or wider.

"Wide" means the leaf's own type where that is float32 or float64, and float32 for bfloat16 and float16: a float16 norm
overflows at a few hundred entries, a bfloat16 difference of two close gradients has no correct digit.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hero_jax import _pool
from hero_jax._jax import Tracer

PyTree = Any


def wide_type(*xs: Any) -> Any:
    """The type of sums of arrays, or of shapes: float64 where one has it, float32 otherwise."""
    # Not by promotion, which `jax_numpy_dtype_promotion="strict"` refuses.
    return jnp.dtype(jnp.float64 if any(jnp.result_type(x) == jnp.float64 for x in xs) else jnp.float32)


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """`x` in float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(wide_type(x))


def add(a: PyTree, b: PyTree, scale: jax.typing.ArrayLike = 1.0) -> PyTree:
    """`a + scale * b`, wide."""
    return jax.tree.map(lambda x, y: wide(x) + scale_like(scale, y) * wide(y), a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, wide."""
    return jax.tree.map(lambda x, y: wide(x) - wide(y), a, b)


def scale(factor: jax.typing.ArrayLike, tree: PyTree) -> PyTree:
    """`factor * tree`, wide."""
    return jax.tree.map(lambda x: scale_like(factor, x) * wide(x), tree)


def scale_like(factor: jax.typing.ArrayLike, x: jax.typing.ArrayLike) -> jax.Array:
    """`factor` in the wide type of `x`, so that a float64 factor does not promote a float32 tree."""
    return jnp.asarray(factor).astype(wide(x).dtype)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """`sum_i <a_i, b_i>` over all leaves, a wide scalar."""
    return _pool.pooled(_dot, a, b)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(wide(x) * wide(y)), a, b))
    dtype = wide_type(*products)
    return sum((x.astype(dtype) for x in products), start=jnp.zeros((), dtype))


def largest(tree: PyTree) -> jax.Array:
    """The largest magnitude of any entry, a wide scalar; 0 for no entry, NaN where an entry is."""
    return _pool.pooled(_largest, tree)


def _largest(tree: PyTree) -> jax.Array:
    maxima = [jnp.max(jnp.abs(wide(x)), initial=0) for x in jax.tree.leaves(tree)]
    dtype = wide_type(*maxima)
    return functools.reduce(jnp.maximum, (x.astype(dtype) for x in maxima), jnp.zeros((), dtype))


def norm(tree: PyTree) -> jax.Array:
    """`sqrt(sum_i ||tree_i||^2)` over all leaves, a wide scalar; scaled, so that no square over- or underflows."""
    return _pool.pooled(_norm, tree)


def _norm(tree: PyTree) -> jax.Array:
    peak = _largest(tree)
    peak = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    scaled = jax.tree.map(lambda x: wide(x) / scale_like(peak, x), tree)
    return peak * jnp.sqrt(_dot(scaled, scaled))


def normalize(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """`(tree / ||tree||, ||tree||)`, wide; a tree of zeros stays zero."""
    length = norm(tree)
    return scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), tree), length


def peak_scaled(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """`(tree / m, m)` with m the largest magnitude, wide, so that entries neither under- nor overflow in 16 bits."""
    peak = largest(tree)
    return scale(jnp.where(peak > 0, 1 / jnp.where(peak > 0, peak, 1), 0), tree), peak


def nan_where(is_missing: jax.Array, x: jax.Array) -> jax.Array:
    """NaN where `is_missing`, `x` elsewhere: a mark, at which `jax_debug_nans` stops inside a jit only."""
    with jax.debug_nans(False):
        return jnp.where(is_missing, jnp.nan, x)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the leaf types of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.result_type(y)), tree, like)


def merge(selected: PyTree, others: PyTree | None) -> PyTree:
    """`selected`, with the leaves of `others` where it has None."""
    if others is None:
        return selected
    return jax.tree.map(lambda x, y: y if x is None else x, selected, others, is_leaf=lambda x: x is None)


def kernels(params: PyTree) -> PyTree:
    """The default selection R: True for leaves with two or more axes.

    In most networks those are the kernels, and never biases or normalisation scales; biases of attention heads and of
    layers stacked by a scan have two axes as well.
    """
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def random_normal(key: jax.Array, like: PyTree) -> PyTree:
    """Independent standard normal entries, wide, in the shapes of `like` and sharded as it says."""
    return _random(jax.random.normal, key, like)


def random_signs(key: jax.Array, like: PyTree) -> PyTree:
    """Independent entries +1 or -1 with equal probability, wide, in the shapes of `like` and sharded as it says."""
    return _random(jax.random.rademacher, key, like)


def _random(sample: Any, key: jax.Array, like: PyTree) -> PyTree:
    # One draw for all leaves: a generator a leaf would take minutes to compile for a deep network.
    leaves, structure = jax.tree.flatten(like)
    dtypes = [wide_type(x) for x in leaves]
    sizes = [math.prod(jnp.shape(x)) for x in leaves]
    flat = sample(key, (sum(sizes),), wide_type(*leaves))
    parts = [flat[end - n : end] for n, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    drawn = [x.reshape(jnp.shape(y)).astype(dtype) for x, y, dtype in zip(parts, leaves, dtypes, strict=True)]
    return structure.unflatten([place(x, sharding_of(y)) for x, y in zip(drawn, leaves, strict=True)])


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array, or the shape of one, is split over devices; None where it is not, or where that is not known."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    is_split = isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated
    return sharding if is_split else None


def place(x: jax.Array, sharding: NamedSharding | None, new_axes: int = 0) -> jax.Array:
    """`x` split over devices as `sharding` says, on all of them along `new_axes` axes before those it speaks of."""
    if sharding is None:
        return x
    spec = PartitionSpec(*[None] * new_axes, *sharding.spec)
    sharding = NamedSharding(sharding.mesh, spec)
    # A constraint on axes of an explicit mesh only asserts.
    return jax.sharding.reshard(x, sharding) if is_explicit(sharding) else jax.lax.with_sharding_constraint(x, sharding)


def is_explicit(sharding: Any) -> bool:
    """Whether shardings are a part of the types in a program (`jax.sharding.AxisType.Explicit`)."""
    return AxisType.Explicit in sharding.mesh.axis_types


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is a tracer."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def is_tracing() -> bool:
    """Whether operations are recorded here rather than run."""
    return is_traced(jnp.zeros(()))


def size(tree: PyTree) -> int:
    """The number of entries of all leaves."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))

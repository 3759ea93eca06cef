"""Pytree algebra that optax.tree lacks: every reduction and difference in float32 or wider.

"Wide" means the leaf's own type where that is float32 or float64, and float32 for bfloat16 and float16: a float16 norm
overflows at a few hundred entries, a bfloat16 difference of two close gradients has no correct digit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any


def wide(x: jax.typing.ArrayLike) -> jax.Array:
    """`x` in float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
    return _pooled(_dot, a, b)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.sum(wide(x) * wide(y)), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


def largest(tree: PyTree) -> jax.Array:
    """The largest magnitude of any entry, a wide scalar; 0 for no entry, NaN where an entry is."""
    return _pooled(_largest, tree)


def _largest(tree: PyTree) -> jax.Array:
    maxima = [jnp.max(jnp.abs(wide(x)), initial=0) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, maxima, jnp.zeros((), jnp.float32))


def norm(tree: PyTree) -> jax.Array:
    """`sqrt(sum_i ||tree_i||^2)` over all leaves, a wide scalar; scaled, so that no square over- or underflows."""
    return _pooled(_norm, tree)


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


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the leaf types of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(jnp.result_type(y)), tree, like)


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
    dtypes = [jnp.promote_types(jnp.result_type(x), jnp.float32) for x in leaves]
    sizes = [math.prod(jnp.shape(x)) for x in leaves]
    flat = sample(key, (sum(sizes),), functools.reduce(jnp.promote_types, dtypes))
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


def size(tree: PyTree) -> int:
    """The number of entries of all leaves."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))


# --- one kernel for all leaves ---


def _pooled(reduction: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    """`reduction(*trees)`, on a GPU of the leaves joined end to end.

    Leaf by leaf a reduction is a kernel per leaf there, which bounds the step of a small network. Where a leaf is split
    over devices, joining would gather it: leaves are joined only where each is whole on its device, which is known for
    certain when a program is lowered (types say nothing of `in_shardings`). On other platforms the program, and so the
    order of every sum, is that of `reduction(*trees)`.
    """
    leaves = [jax.tree.leaves(tree) for tree in trees]
    shapes = [[jnp.shape(x) for x in tree] for tree in leaves]
    may_join = len(leaves[0]) > 1 and all(s == shapes[0] for s in shapes)
    if not may_join or any(_may_be_split(x) for tree in leaves for x in tree):
        return reduction(*trees)
    holds_all = _holds_all.bind()
    if not isinstance(holds_all, Tracer):  # Operations that run one by one.
        return reduction(*trees)

    def on_gpu(holds_all: jax.Array, *trees: PyTree) -> jax.Array:
        return jax.lax.cond(holds_all, lambda *t: reduction(*_joined(*t)), reduction, *trees)

    def elsewhere(holds_all: jax.Array, *trees: PyTree) -> jax.Array:
        del holds_all
        return reduction(*trees)

    return jax.lax.platform_dependent(holds_all, *trees, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def _joined(*trees: PyTree) -> list[list[jax.Array]]:
    """Each tree as a list of vectors, one for all leaves of the same types."""
    groups: dict[tuple[Any, ...], list[tuple[jax.Array, ...]]] = {}
    for together in zip(*map(jax.tree.leaves, trees), strict=True):
        groups.setdefault(tuple(map(jnp.result_type, together)), []).append(together)
    columns = [list(zip(*group, strict=True)) for group in groups.values()]
    return [[jnp.concatenate([_raveled(x) for x in column[i]]) for column in columns] for i in range(len(trees))]


def _raveled(x: jax.Array) -> jax.Array:
    """The entries of `x` as a vector, in any order."""
    # Output channels, the last axis of a kernel, come first in what a convolution gives on a GPU: no transposition.
    return jnp.ravel(jnp.moveaxis(x, -1, 0) if jnp.ndim(x) > 2 else x)


def _may_be_split(x: jax.typing.ArrayLike) -> bool:
    """Whether the type of `x` speaks of several devices, outside of `shard_map` and `pmap` over all of them."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


# Whether a program holds every array whole: it runs on one device, or is that of one device (`shard_map`, `pmap`).
# False where nothing is lowered, as operations that run one by one may have split arguments.
_holds_all = Primitive("holds_all")
_holds_all.def_impl(lambda: False)
_holds_all.def_abstract_eval(lambda: ShapedArray((), jnp.bool_))


def _lower_holds_all(ctx: mlir.LoweringRuleContext) -> Any:
    match ctx.module_context.axis_context:
        case mlir.ShardingContext(num_devices=count):
            holds_all = count == 1
        case mlir.SPMDAxisContext(mesh=mesh, manual_axes=manual):
            holds_all = mesh.size == 1 or manual == frozenset(mesh.axis_names)
        case _:
            holds_all = False
    return mlir.ir_constants(np.bool_(holds_all))


mlir.register_lowering(_holds_all, _lower_holds_all)

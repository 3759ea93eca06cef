"""Reductions of all leaves of a tree in one kernel, where a kernel per leaf would bound the step: on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from hero_jax._jax import Primitive, ShapedArray, Tracer, mlir

PyTree = Any


def pooled(reduction: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
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
    holds_all = _HOLDS_ALL.bind()
    if not isinstance(holds_all, Tracer):  # Operations that run one by one.
        return reduction(*trees)

    def on_gpu(holds_all: jax.Array, *trees: PyTree) -> jax.Array:
        return jax.lax.cond(holds_all, lambda *t: reduction(*joined(*t)), reduction, *trees)

    def elsewhere(holds_all: jax.Array, *trees: PyTree) -> jax.Array:
        del holds_all
        return reduction(*trees)

    return jax.lax.platform_dependent(holds_all, *trees, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def joined(*trees: PyTree) -> list[list[jax.Array]]:
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
_HOLDS_ALL = Primitive("holds_all")
_HOLDS_ALL.def_impl(lambda: False)
_HOLDS_ALL.def_abstract_eval(lambda: ShapedArray((), jnp.bool_))


def _lower_holds_all(ctx: mlir.LoweringRuleContext) -> Any:
    match ctx.module_context.axis_context:
        case mlir.ShardingContext(num_devices=count):
            holds_all = count == 1
        case mlir.SPMDAxisContext(mesh=mesh, manual_axes=manual):
            holds_all = mesh.size == 1 or manual == frozenset(mesh.axis_names)
        case _:
            holds_all = False
    return mlir.ir_constants(np.bool_(holds_all))


mlir.register_lowering(_HOLDS_ALL, _lower_holds_all)

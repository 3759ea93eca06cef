"""Orthonormal vectors stacked along a new first axis: `basis[i]` is the i-th vector, or zero where unset.

Vectors are packed: the leaves of a parameter tree are joined to one flat array, since the matrix products of a deep
network's leaves, one by one, take minutes to compile. Parameters sharded over devices keep their leaves: joined, every
device would have to hold all of them. The functions below take either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hero_jax import _tree

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Packing:
    """How vectors shaped like a parameter tree are kept. Hashable.

    shardings: of the leaves, None where they are not split over devices.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    shardings: tuple[NamedSharding | None, ...]

    @classmethod
    def of(cls, params: PyTree) -> Packing:
        """The packing for vectors like `params`, wide."""
        leaves, structure = jax.tree.flatten(params)
        shapes = tuple(jnp.shape(x) for x in leaves)
        dtypes = tuple(map(_tree.wide_type, leaves))
        return cls(structure, shapes, dtypes, tuple(map(_tree.sharding_of, leaves)))

    @property
    def is_flat(self) -> bool:
        """Whether the leaves are joined."""
        return not any(self.shardings)

    def like(self) -> PyTree:
        """Shapes, types and shardings of a vector."""
        leaves = zip(self.shapes, self.dtypes, self.shardings, strict=True)
        return self.structure.unflatten([jax.ShapeDtypeStruct(*leaf[:2], sharding=leaf[2]) for leaf in leaves])

    def empty_basis(self, num_rows: int) -> PyTree:
        """A basis with no vector set."""
        if self.is_flat:
            return jnp.zeros((num_rows, sum(map(math.prod, self.shapes))), _tree.wide_type(*self.dtypes))
        leaves = zip(self.shapes, self.dtypes, self.shardings, strict=True)
        return [_tree.place(jnp.zeros((num_rows, *shape), dtype), s, new_axes=1) for shape, dtype, s in leaves]

    def pack(self, tree: PyTree) -> PyTree:
        """`tree` as it is kept."""
        leaves = [x.astype(dtype) for x, dtype in zip(jax.tree.leaves(tree), self.dtypes, strict=True)]
        if not self.is_flat:
            return leaves
        dtype = _tree.wide_type(*self.dtypes)
        return jnp.concatenate([x.astype(dtype).ravel() for x in leaves])

    def unpack(self, packed: PyTree) -> PyTree:
        """The tree, wide."""
        if not self.is_flat:
            return self.structure.unflatten(packed)
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [packed[end - n : end] for n, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
        return self.structure.unflatten(
            [x.reshape(s).astype(d) for x, s, d in zip(parts, self.shapes, self.dtypes, strict=True)]
        )


def row(basis: PyTree, i: Any) -> PyTree:
    """The i-th vector."""
    return jax.tree.map(lambda q: jax.lax.dynamic_index_in_dim(q, i, keepdims=False), basis)


def with_row(basis: PyTree, i: Any, vector: PyTree) -> PyTree:
    """The basis with its i-th vector replaced."""
    return jax.tree.map(lambda q, v: jax.lax.dynamic_update_index_in_dim(q, v.astype(q.dtype), i, 0), basis, vector)


def project(basis: PyTree, vector: PyTree) -> jax.Array:
    """Q v: the dot product of every row with `vector`, (rows,)."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(_project, basis, vector)))


def _project(q: jax.Array, v: jax.Array) -> jax.Array:
    # A sum over an axis that is split over devices ends up on all of them, which explicit types want said.
    sharding = jax.typeof(q).sharding
    out_sharding = NamedSharding(sharding.mesh, PartitionSpec(None)) if _tree.is_explicit(sharding) else None
    return jnp.tensordot(q, v.astype(q.dtype), v.ndim, precision="highest", out_sharding=out_sharding)


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """Sums of rows: `sum_i c_i q_i` for coefficients (rows,), and one such vector a row for coefficients (k, rows)."""
    return jax.tree.map(lambda q: jnp.tensordot(coefficients.astype(q.dtype), q, 1, precision="highest"), basis)


def orthogonalize(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """`(v - Q^T h, h)` with h = Q v: Gram-Schmidt twice, since the first pass leaves a rounding error as long as v."""
    first = project(basis, vector)
    vector = _tree.subtract(vector, combine(first, basis))
    second = project(basis, vector)
    return _tree.subtract(vector, combine(second, basis)), first + second


def random_direction(key: jax.Array, basis: PyTree, packing: Packing) -> PyTree:
    """A random unit vector orthogonal to the rows of `basis`, or zero where they span the whole space."""
    vector, length = _tree.normalize(packing.pack(_tree.random_normal(key, packing.like())))
    vector, _ = orthogonalize(basis, vector)
    left = _tree.norm(vector)
    unit, _ = _tree.normalize(vector)
    # What was left may be short: rounding is then a larger part of it.
    unit, _ = _tree.normalize(orthogonalize(basis, unit)[0])
    # In n dimensions at least one is missing: the part outside the span has a length near n^-1/2 or more.
    exhausted = left <= 1e-3 / jnp.sqrt(_tree.size(vector))
    return _tree.scale(jnp.where(exhausted | (length == 0), 0.0, 1.0), unit)

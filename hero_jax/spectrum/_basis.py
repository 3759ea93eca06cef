"""Orthonormal vectors stacked along a new first axis of every leaf: `basis[i]` is the i-th vector, or zero where unset.

The leaves keep their shapes (nothing is raveled), so that parameters sharded over devices stay sharded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree

PyTree = Any


def zeros(num_rows: int, like: PyTree) -> PyTree:
    """A basis with no vector set, wide."""
    return jax.tree.map(lambda x: jnp.zeros((num_rows, *jnp.shape(x)), _tree.wide(x).dtype), like)


def row(basis: PyTree, i: Any) -> PyTree:
    """The i-th vector."""
    return jax.tree.map(lambda q: jax.lax.dynamic_index_in_dim(q, i, keepdims=False), basis)


def with_row(basis: PyTree, i: Any, vector: PyTree) -> PyTree:
    """The basis with its i-th vector replaced."""
    return jax.tree.map(lambda q, v: jax.lax.dynamic_update_index_in_dim(q, v.astype(q.dtype), i, 0), basis, vector)


def project(basis: PyTree, vector: PyTree) -> jax.Array:
    """Q v: the dot product of every row with `vector`, (rows,)."""
    products = jax.tree.map(
        lambda q, v: jnp.tensordot(q, v.astype(q.dtype), v.ndim, precision="highest"), basis, vector
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """Sums of rows: `sum_i c_i q_i` for coefficients (rows,), and one such vector a row for coefficients (k, rows)."""
    return jax.tree.map(lambda q: jnp.tensordot(coefficients.astype(q.dtype), q, 1, precision="highest"), basis)


def orthogonalize(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """`(v - Q^T h, h)` with h = Q v: Gram-Schmidt twice, since the first pass leaves a rounding error as long as v."""
    first = project(basis, vector)
    vector = _tree.subtract(vector, combine(first, basis))
    second = project(basis, vector)
    return _tree.subtract(vector, combine(second, basis)), first + second


def random_direction(key: jax.Array, basis: PyTree) -> PyTree:
    """A random unit vector orthogonal to the rows of `basis`, or zero where they span the whole space."""
    like = jax.tree.map(lambda q: q[0], basis)
    vector, length = _tree.normalize(_tree.random_normal(key, like))
    vector, _ = orthogonalize(basis, vector)
    left = _tree.norm(vector)
    unit, _ = _tree.normalize(vector)
    # What was left may be short: rounding is then a larger part of it.
    unit, _ = _tree.normalize(orthogonalize(basis, unit)[0])
    # In n dimensions at least one is missing: the part outside the span has a length near n^-1/2 or more.
    exhausted = left <= 1e-3 / jnp.sqrt(_tree.size(like))
    return _tree.scale(jnp.where(exhausted | (length == 0), 0.0, 1.0), unit)

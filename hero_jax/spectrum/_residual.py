"""How good an approximate eigenpair is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree

PyTree = Any


def relative_residual(v: PyTree, product: PyTree, eigenvalue: jax.Array) -> jax.Array:
    """||H v - lambda v|| / |lambda| for a unit v, with 0 / 0 = 0: a vector that H maps to zero is an eigenvector."""
    return relative(_tree.norm(_tree.add(product, v, -eigenvalue)), eigenvalue)


def relative(residual_norm: jax.Array, eigenvalue: jax.Array) -> jax.Array:
    """||H v - lambda v|| / |lambda|, 0 where both vanish, infinite where lambda alone does."""
    magnitude = jnp.abs(eigenvalue)
    ratio = residual_norm / jnp.where(magnitude == 0, 1, magnitude)
    return jnp.where(residual_norm == 0, 0, jnp.where(magnitude == 0, jnp.inf, ratio))

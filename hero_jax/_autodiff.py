"""Products with a Jacobian, also of functions that have no forward mode.

A `jax.custom_vjp` has none. What `jax.jvp` makes of one fails at once outside a trace; in a trace it is an operation,
`custom_lin`, that fails later, when it is compiled or differentiated: there the program is looked at before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from hero_jax import _program, _tree

PyTree = Any


def jvp(fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree) -> tuple[PyTree, PyTree]:
    """`(fn(params), J vector)`, the vector taken in the types of `params`.

    Without a forward mode, by two reverse-mode passes: the product with J^T is linear in its vector u, so that its own
    transpose is the product with J,

        J v = d/du <J^T u, v>
    """
    tangent = _tree.cast_like(vector, params)
    found = _forward(fn, params, tangent)
    if found is not None:
        return found
    outputs, pullback = jax.vjp(fn, params)
    # Linear, so that any point will do; that of the outputs has their types and varies over the devices that they do.
    _, transposed = jax.vjp(lambda u: pullback(u)[0], outputs)
    return outputs, transposed(tangent)[0]


def second_order(fn: Callable[[PyTree], jax.Array], params: PyTree, direction: PyTree) -> tuple[jax.Array, ...]:
    """`(f, g^T d, d^T H d)` of a scalar function: forward over forward, which stores nothing, where there is one."""
    direction = _tree.cast_like(direction, params)

    def slope(params: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(fn, (params,), (direction,))

    found = _forward(slope, params, direction)
    if found is not None:
        (value, first), (_, second) = found
        return value, first, second
    grads, product = jvp(jax.grad(fn), params, direction)
    return fn(params), _tree.dot(grads, direction), _tree.dot(direction, product)


def _forward(fn: Callable[[PyTree], PyTree], params: PyTree, tangent: PyTree) -> tuple[PyTree, PyTree] | None:
    """`jax.jvp`, or None where a `custom_vjp` is met."""
    forward = functools.partial(jax.jvp, fn)
    try:
        if _tree.is_tracing():
            jaxpr = jax.make_jaxpr(forward)((params,), (tangent,)).jaxpr
            if any(equation.primitive.name == "custom_lin" for equation in _program.equations(jaxpr)):
                return None
        return forward((params,), (tangent,))
    except (TypeError, NotImplementedError) as error:
        # JAX has no class of its own for this.
        if not any(name in str(error) for name in ("custom_vjp", "custom_lin")):
            raise
        return None

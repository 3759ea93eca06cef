"""Products with a Jacobian, also of functions that have no forward mode.

A `jax.custom_vjp` has none. What `jax.jvp` makes of one fails at once outside a trace; in a trace it is an operation,
`custom_lin`, that fails later, when it is compiled or differentiated: there the program is looked at before it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree

PyTree = Any


def jvp(fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree) -> tuple[PyTree, PyTree]:
    """`(fn(params), J vector)`, the vector taken in the types of `params`.

    Without a forward mode, by two reverse-mode passes: the product with J^T is linear in its vector u, so that its own
    transpose is the product with J,

        J v = d/du <J^T u, v>
    """
    tangent = _tree.cast_like(vector, params)
    forward = functools.partial(jax.jvp, fn)
    try:
        if not _is_traced() or not _fails_later(jax.make_jaxpr(forward)((params,), (tangent,)).jaxpr):
            return forward((params,), (tangent,))
    except (TypeError, NotImplementedError) as error:
        if not _lacks_forward_mode(error):
            raise
    outputs, pullback = jax.vjp(fn, params)
    # Linear, so that any point will do; that of the outputs has their types and varies over the devices that they do.
    _, transposed = jax.vjp(lambda u: pullback(u)[0], outputs)
    return outputs, transposed(tangent)[0]


def second_order(fn: Callable[[PyTree], jax.Array], params: PyTree, direction: PyTree) -> tuple[jax.Array, ...]:
    """`(f, g^T d, d^T H d)` of a scalar function: forward over forward, which stores nothing, where there is one."""
    direction = _tree.cast_like(direction, params)

    def slope(params: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(fn, (params,), (direction,))

    forward = functools.partial(jax.jvp, slope)
    try:
        if not _is_traced() or not _fails_later(jax.make_jaxpr(forward)((params,), (direction,)).jaxpr):
            (value, first), (_, second) = forward((params,), (direction,))
            return value, first, second
    except (TypeError, NotImplementedError) as error:
        if not _lacks_forward_mode(error):
            raise
    grads, product = jvp(jax.grad(fn), params, direction)
    return fn(params), _tree.dot(grads, direction), _tree.dot(direction, product)


def _is_traced() -> bool:
    """Whether operations are recorded here rather than run."""
    return _tree.is_traced(jnp.zeros(()))


def _fails_later(jaxpr: Any) -> bool:
    """Whether a program holds the forward mode of a `custom_vjp`."""
    return "custom_lin" in set(_operations(jaxpr))


def _lacks_forward_mode(error: Exception) -> bool:
    """Whether it is the forward mode of a `custom_vjp` that failed. JAX has no class of its own for this."""
    return any(name in str(error) for name in ("custom_vjp", "custom_lin"))


def _operations(jaxpr: Any) -> Iterator[str]:
    """The names of all operations in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _operations(inner)

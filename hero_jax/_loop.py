"""Loops that compile once: on the device inside a trace, on the host outside one.

XLA:CPU rewrites a convolution into the form it has a fast kernel for only where it stands outside every loop
(https://github.com/jax-ml/jax/issues/12868): a Hessian-vector product of ResNet20 on 64 images takes 0.6 s on two cores
by itself and 22 s inside `jax.lax.while_loop`. So outside a trace the loop runs on the host, around one compiled body.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer, eval_jaxpr

PyTree = Any


def while_loop(
    is_running: Callable[[PyTree], Any],
    body: Callable[[Callable[[PyTree], PyTree], PyTree], PyTree],
    fn: Callable[[PyTree], PyTree],
    example: PyTree,
    carry: PyTree,
) -> PyTree:
    """`while is_running(carry): carry = body(fn, carry)`, with `body` compiled.

    Args:
      is_running: `carry -> bool`.
      body: `(fn, carry) -> carry`.
      fn: function of one tree. A `jax.tree_util.Partial` is compiled once over all calls with the same function, its
        arrays being arguments; what is compiled for a plain function is dropped at the end of the call.
      example: an argument of `fn`, for its shapes.
      carry: the first carry.
    """
    is_shared = isinstance(fn, jax.tree_util.Partial)
    hoisted = fn if is_shared else _hoist(fn, example)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((hoisted, carry))):
        return jax.lax.while_loop(is_running, lambda carry: body(hoisted, carry), carry)
    step = functools.partial(_shared_step, body) if is_shared else jax.jit(lambda fn, carry: body(fn, carry))
    while is_running(carry):
        carry = step(hoisted, carry)
    return carry


def _hoist(fn: Callable[[PyTree], PyTree], example: PyTree) -> jax.tree_util.Partial:
    """`fn` as a pytree whose leaves are the arrays it closes over, so that jit takes them as arguments.

    A closure handed to `jax.jit` bakes its arrays into the program as constants, which XLA then folds for minutes.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(example)
    # The function below becomes a key of jit's cache: it must not hold the arrays.
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)

    def evaluate(constants: list[Any], argument: PyTree) -> PyTree:
        return structure.unflatten(eval_jaxpr(jaxpr, constants, *jax.tree.leaves(argument)))

    return jax.tree_util.Partial(evaluate, closed.consts)


@functools.partial(jax.jit, static_argnums=0)
def _shared_step(body: Callable[..., PyTree], fn: Any, carry: PyTree) -> PyTree:
    return body(fn, carry)

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
    if isinstance(fn, jax.tree_util.Partial):
        arrays, call = fn, _call
        step = functools.partial(_shared_step, body)
    else:
        arrays, call = _hoist(fn, example)
        # The call must not become a part of an argument's structure, which jit's cache keeps.
        step = jax.jit(lambda arrays, carry: body(functools.partial(call, arrays), carry))
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((arrays, carry))):
        return jax.lax.while_loop(is_running, lambda carry: body(functools.partial(call, arrays), carry), carry)
    while is_running(carry):
        carry = step(arrays, carry)
    return carry


def _call(fn: Callable[[PyTree], PyTree], argument: PyTree) -> PyTree:
    return fn(argument)


def _hoist(fn: Callable[[PyTree], PyTree], example: PyTree) -> tuple[list[Any], Callable[[list[Any], PyTree], PyTree]]:
    """The arrays that `fn` closes over, and `fn` as a function of them and of its argument.

    A closure handed to `jax.jit` bakes its arrays into the program as constants, which XLA then folds for minutes.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(example)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)

    def call(constants: list[Any], argument: PyTree) -> PyTree:
        return structure.unflatten(eval_jaxpr(jaxpr, constants, *jax.tree.leaves(argument)))

    return closed.consts, call


@functools.partial(jax.jit, static_argnums=0)
def _shared_step(body: Callable[..., PyTree], fn: Any, carry: PyTree) -> PyTree:
    return body(fn, carry)

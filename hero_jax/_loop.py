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
    is_running: Callable[[PyTree], Any], body: Callable[[Callable[..., Any], PyTree], PyTree], fn: Any, carry: PyTree
) -> PyTree:
    """`while is_running(carry): carry = body(fn, carry)`, where `fn` is a `jax.tree_util.Partial` (see `hoist`).

    `body` is compiled once for each (body, function in `fn`, shapes), over all calls.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((fn, carry))):
        return jax.lax.while_loop(is_running, lambda carry: body(fn, carry), carry)
    while is_running(carry):
        carry = _compiled(body, fn, carry)
    return carry


def hoist(fn: Callable[..., Any], *example: PyTree) -> jax.tree_util.Partial:
    """`fn` as a pytree whose leaves are the arrays it closes over, so that jit takes them as arguments.

    A closure handed to `jax.jit` bakes its arrays into the program as constants, which XLA then folds for minutes. A
    `jax.tree_util.Partial` is such a pytree already and is returned as it is; its function is traced once over all
    calls.
    """
    if isinstance(fn, jax.tree_util.Partial):
        return fn
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*example)
    structure = jax.tree.structure(shapes)

    def evaluate(constants: list[Any], *arguments: PyTree) -> PyTree:
        return structure.unflatten(eval_jaxpr(jaxpr.jaxpr, constants, *jax.tree.leaves(arguments)))

    return jax.tree_util.Partial(evaluate, jaxpr.consts)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(body: Callable[..., PyTree], fn: Any, carry: PyTree) -> PyTree:
    return body(fn, carry)

"""Loops around an operator that compile once: on the device inside a trace, on the host outside one.

XLA:CPU rewrites a convolution into the form it has a fast kernel for only where it stands outside every loop
(https://github.com/jax-ml/jax/issues/12868): a Hessian-vector product of ResNet20 on 64 images takes 0.6 s on two cores
by itself and 22 s inside `jax.lax.while_loop`. So outside a trace the loop runs on the host, around one compiled
product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from hero_jax import _tree
from hero_jax._jax import eval_jaxpr
from hero_jax._mean import StreamedMean
from hero_jax.operators import HostOperator, Operator, refuse_tracing

PyTree = Any


class Solver(Protocol):
    """An iteration that takes one product of the operator a step. Hashable: it is a key of jit's cache."""

    def is_running(self, carry: Any) -> jax.Array:
        """Whether another step is to be taken."""
        ...

    def argument(self, carry: Any) -> PyTree:
        """The vector to multiply next."""
        ...

    def advance(self, carry: Any, product: PyTree) -> Any:
        """The carry after a step, from the product of the operator with `argument(carry)`."""
        ...


def run(solver: Solver, operator: Callable[[PyTree], PyTree], carry: Any) -> Any:
    """`while solver.is_running(carry): carry = solver.advance(carry, operator(solver.argument(carry)))`, compiled.

    Args:
      solver: what to iterate.
      operator: an `Operator` or a function of one tree. A `jax.tree_util.Partial` (also as the `matvec` of an operator)
        is compiled once over all calls with the same function, its arrays being arguments; what is compiled for a plain
        function is dropped at the end of the call. A `HostOperator` or `StreamedMean` is not compiled. The solver is
        compiled by itself, once over all operators.
      carry: the first carry.
    """
    matvec = operator.matvec if isinstance(operator, Operator) else operator
    if isinstance(operator, HostOperator | StreamedMean):
        refuse_tracing(carry)
        product = operator
    elif isinstance(matvec, jax.tree_util.Partial):
        product = functools.partial(_product, matvec)
        if _tree.is_traced((matvec, carry)):
            return _device_loop(solver, matvec, carry)
    else:
        arrays, call = _hoist(matvec, solver.argument(carry))
        if _tree.is_traced((arrays, carry)):
            return _device_loop(solver, functools.partial(call, arrays), carry)
        # The call must not become a part of an argument's structure, which jit's cache keeps.
        product = functools.partial(jax.jit(call), arrays)
    # Compiled too: operations one by one on arrays split over devices would put many collectives in flight at once,
    # which can starve each other of threads on simulated devices.
    while _is_running(solver, carry):
        carry = _advance(solver, carry, product(_argument(solver, carry)))
    return carry


def _device_loop(solver: Solver, operator: Callable[[PyTree], PyTree], carry: Any) -> Any:
    def body(carry: Any) -> Any:
        return solver.advance(carry, operator(solver.argument(carry)))

    return jax.lax.while_loop(solver.is_running, body, carry)


def _hoist(fn: Callable[[PyTree], PyTree], example: PyTree) -> tuple[list[Any], Callable[[list[Any], PyTree], PyTree]]:
    """The arrays that `fn` closes over, and `fn` as a function of them and of its argument.

    A closure handed to `jax.jit` bakes its arrays into the program as constants, which XLA then folds for minutes.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(example)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)

    def call(constants: list[Any], argument: PyTree) -> PyTree:
        return structure.unflatten(eval_jaxpr(jaxpr, constants, *jax.tree.leaves(argument)))

    return closed.consts, call


@jax.jit
def _product(operator: Callable[[PyTree], PyTree], vector: PyTree) -> PyTree:
    return operator(vector)


@functools.partial(jax.jit, static_argnums=0)
def _is_running(solver: Solver, carry: Any) -> jax.Array:
    return solver.is_running(carry)


@functools.partial(jax.jit, static_argnums=0)
def _argument(solver: Solver, carry: Any) -> PyTree:
    return solver.argument(carry)


@functools.partial(jax.jit, static_argnums=0)
def _advance(solver: Solver, carry: Any, product: PyTree) -> Any:
    return solver.advance(carry, product)

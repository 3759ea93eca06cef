"""Linear operators on pytrees: a product, and the tree that it works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree, errors

__all__ = ["HostOperator", "Operator"]

PyTree = Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A product `vector -> H vector` that knows the tree it works on.

    Called with a vector it is the product. A pytree: where `matvec` is a `jax.tree_util.Partial`, as in the operators
    of `hero_jax.curvature`, the arrays that it holds are arguments of what is compiled, and calls with the same
    function share one compilation. Any other function is compiled anew wherever it goes.

    Args:
      matvec: `vector -> H vector`, linear, on trees like `like`.
      like: pytree of floating-point arrays or `jax.ShapeDtypeStruct`: the structure, shapes, types and shardings of a
        vector. Kept as shapes; arrays are let go.

    Raises:
      ArgumentError: `like` without an array; at a call, a vector that does not match it.
      TypeError: `matvec` that is no function, `like` with leaves that are not floating point.

    >>> import jax, jax.numpy as jnp
    >>> from hero_jax import spectrum
    >>> operator = Operator(lambda v: jnp.array([2.0, -1.0, 5.0]) * v, jnp.zeros(3))
    >>> operator.like
    ShapeDtypeStruct(shape=(3,), dtype=float32)
    >>> float(spectrum.trace(operator, jax.random.key(0), num_probes=2).mean)
    6.0
    """

    matvec: Callable[[PyTree], PyTree]
    like: PyTree

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check.function(f"{name}(matvec=...)", self.matvec)
        if isinstance(self.matvec, HostOperator):
            raise TypeError(f"`{name}(matvec=...)` must not be a HostOperator: it is an operator already.")
        _check.floating_tree(f"{name}(like=...)", self.like)
        object.__setattr__(self, "like", jax.tree.map(_shape_of, self.like))

    def __call__(self, vector: PyTree) -> PyTree:
        """`H vector`."""
        _check.matching_tree("vector", vector, self.like, than="like")
        return self.matvec(vector)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arrays that a `Partial` holds; the rest is static."""
        leaves, structure = jax.tree.flatten(self.like)
        is_tree = isinstance(self.matvec, jax.tree_util.Partial)
        return (self.matvec if is_tree else None,), (None if is_tree else self.matvec, tuple(leaves), structure)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> Operator:
        """From what `tree_flatten` gave; leaves may be placeholders, so nothing is checked."""
        matvec, leaves, structure = static
        made = object.__new__(cls)
        object.__setattr__(made, "matvec", children[0] if matvec is None else matvec)
        object.__setattr__(made, "like", structure.unflatten(leaves))
        return made


class HostOperator(Operator):
    """An operator whose product Python has to run: solvers call it between their compiled parts and never trace it.

    Wrap in it whatever reads data, talks to another library or shows progress. It is no pytree. A solver that is itself
    traced (called under `jax.jit` or `vmap`) refuses it.

    Args:
      matvec, like: as in `Operator`.

    Raises:
      TypeError: a traced vector; otherwise as `Operator`.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> HostOperator(lambda v: 3 * np.asarray(v), jnp.zeros(2))(jnp.array([1.0, 2.0]))
    array([3., 6.], dtype=float32)
    """

    def __call__(self, vector: PyTree) -> PyTree:
        """`H vector`."""
        refuse_tracing(vector)
        return super().__call__(vector)


def refuse_tracing(tree: PyTree) -> None:
    """Raises where a leaf is traced, which a product on the host cannot be."""
    if _tree.is_traced(tree):
        raise TypeError("A `HostOperator` runs on the host and cannot be traced; call the solver outside jax.jit.")


def like_of(argument: str, operator: Any) -> PyTree:
    """The tree that an operator works on; raises unless it is one that knows."""
    if not isinstance(operator, Operator):
        raise TypeError(
            f"`{argument}` must be an Operator, which knows the tree that it works on; got {errors.brief(operator)}."
            " Wrap a function in hero_jax.Operator(matvec, like)."
        )
    return operator.like


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=_tree.sharding_of(x))

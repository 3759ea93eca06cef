"""The data that a mean loss is taken over: examples at hand, or batches that pass by.

    mean = sum_b weight_b fn(b) / sum_b weight_b,   weight_b = weight_fn(b), the number of examples by default

so that where `fn` is itself a mean over its batch, batches of any sizes give the mean over all examples exactly.

Examples   one batch, whole or in microbatches, on one device or split over several
Stream     batches that do not fit together, handed over by the host

Functions that take `data` take a bare batch (a pytree of arrays) as well: it is `Examples(batch)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _check, errors, parallel
from hero_jax.errors import ArgumentError

__all__ = ["Examples", "Stream"]

PyTree = Any
Batches = Iterable[PyTree] | Callable[[], Iterable[PyTree]]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples at hand: a batch, and how the mean over it is taken.

    A pytree whose leaves are those of `batch`: it goes through `jax.jit` as an argument.

    Args:
      batch: pytree of arrays with the examples along the first axis, which may be sharded over devices. Under
        `axis_name`, the local examples.
      microbatch_size: examples to take at a time, in a loop on the device; the rest, if any, comes first. Where it
        divides the number of examples, each microbatch takes every n-th example, n the number of microbatches, which
        keeps a sharded first axis sharded; otherwise they are taken in order. XLA:CPU runs convolutions inside a loop
        some forty times slower: for convolutional networks on CPU use `Stream`.
      weight_fn: needed where the loss does not divide by the number of examples, as with padded or masked ones.
        `batch -> scalar`, what the loss has divided by: the number of valid tokens, say. Default the number of
        examples.
      axis_name: mapped axis, or a tuple of them (pmap, shard_map, vmap), to average over, weights included. All other
        arguments of the mean are then the same on every device.

    Raises:
      ArgumentError: no examples, or leaves of different lengths.
      TypeError: an argument of the wrong kind.

    Cost: the memory of a mean is that of one microbatch.

    >>> import jax.numpy as jnp
    >>> from hero_jax import curvature
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> operator = curvature.hessian_operator(
    ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.zeros(2), Examples(x, microbatch_size=2)
    ... )
    >>> operator(jnp.array([1.0, -1.0]))
    Array([ -8., -10.], dtype=float32)
    """

    batch: PyTree
    _: dataclasses.KW_ONLY
    microbatch_size: int | None = None
    weight_fn: Callable[[PyTree], Any] | None = None
    axis_name: parallel.AxisName | None = None

    def __post_init__(self) -> None:
        check_batch("Examples(batch=...)", self.batch)
        if self.microbatch_size is not None:
            errors.integer("Examples(microbatch_size=...)", self.microbatch_size, low=1)
            if isinstance(self.microbatch_size, jax.Array):
                raise TypeError("`Examples(microbatch_size=...)` must be a Python integer; got an array.")
        _check.optional_function("Examples(weight_fn=...)", self.weight_fn)
        _check.axis_name("Examples(axis_name=...)", self.axis_name)

    def tree_flatten(self) -> tuple[tuple[PyTree], tuple[Any, ...]]:
        """The batch, and the rest, which is static."""
        return (self.batch,), (self.microbatch_size, self.weight_fn, self.axis_name)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[PyTree]) -> Examples:
        """From what `tree_flatten` gave; leaves may be placeholders, so nothing is checked."""
        made = object.__new__(cls)
        for name, value in zip(
            ("batch", "microbatch_size", "weight_fn", "axis_name"), (*children, *static), strict=True
        ):
            object.__setattr__(made, name, value)
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Batches that pass by: more data than fit together, handed over by the host batch after batch.

    A mean over a stream takes one pass over it, one compiled call per batch, and cannot be traced.

    Args:
      batches: an iterable that can be passed over again and again, or a function that returns a new iterator; of
        batches as in `Examples`. They may differ in size (each size is compiled once).
      weight_fn: as in `Examples`. Where the last batch is filled up with examples that the loss masks, it is needed.

    Raises:
      TypeError: what ends after one pass, such as a generator; an argument of the wrong kind.

    Cost: one batch in flight while the next is read.

    >>> import jax.numpy as jnp
    >>> from hero_jax import curvature
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> operator = curvature.hessian_operator(
    ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.zeros(2), Stream([x[:3], x[3:]])
    ... )
    >>> operator(jnp.array([1.0, -1.0]))
    Array([ -8., -10.], dtype=float32)
    """

    batches: Batches
    _: dataclasses.KW_ONLY
    weight_fn: Callable[[PyTree], Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.batches):
            self._check_iterable(self.batches)
        _check.optional_function("Stream(weight_fn=...)", self.weight_fn)

    def __iter__(self) -> Iterator[PyTree]:
        """A new pass over the batches."""
        made = self.batches() if callable(self.batches) else self.batches
        if callable(self.batches) and not isinstance(made, Iterable):
            raise TypeError(f"`Stream(batches=...)` must return an iterable; it returned {errors.brief(made)}.")
        return iter(made)

    def _check_iterable(self, batches: Any) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                "`Stream(batches=...)` must be an iterable, or a function that returns one; got"
                f" {errors.brief(batches)}."
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                "`Stream(batches=...)` must be iterable more than once, since every product takes a pass; got a"
                f" {type(batches).__name__}, which ends after one. Give a list, or a function that returns a new"
                " iterator."
            )


def check_batch(argument: str, batch: PyTree) -> None:
    """Raises unless all leaves of `batch` are arrays with the same, positive length."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ArgumentError(f"`{argument}` must have at least one array; got {errors.brief(batch)}.")
    lengths = {jax.tree_util.keystr(path): jnp.shape(x)[0] if jnp.ndim(x) else None for path, x in leaves}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        found = ", ".join(f"batch{path}: {n if n is not None else 'a scalar'}" for path, n in list(lengths.items())[:4])
        raise ArgumentError(f"`{argument}` must have the examples along the first axis of every leaf; got {found}.")
    if 0 in lengths.values():
        raise ArgumentError(f"`{argument}` must have at least one example; got none.")

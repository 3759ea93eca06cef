"""The mean over data of a function of one batch: at once, in microbatches on the device, or streamed by the host.

    mean = sum_b weight_b fn(*args, b) / sum_b weight_b,   weight_b = weight_fn(b), the number of examples by default

so that where `fn` is itself a mean over its batch, batches of any sizes give the mean over all data exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from hero_jax import _check, _tree, parallel

PyTree = Any
# Losses of the same examples grouped in two ways differ by rounding only, unless their examples are coupled.
COUPLING_RTOL = 1e-4


@dataclasses.dataclass(frozen=True)
class BatchMean:
    """`(batch, *args) -> mean of fn(*args, batch)` on the device. Hashable: what is compiled for it is shared.

    fn: `(*args, batch) -> pytree`, a mean over its batch.
    weight_fn: `batch -> scalar`, or None for the number of examples.
    microbatch_size: examples to take at a time; None takes all at once.
    axis_name: mapped axis over which to average as well; `args` are then replicated and `batch` is local.
    """

    fn: Callable[..., PyTree]
    weight_fn: Callable[[PyTree], Any] | None = None
    microbatch_size: int | None = None
    axis_name: parallel.AxisName | None = None

    def __call__(self, batch: PyTree, *args: PyTree) -> PyTree:
        """The mean, compiled."""
        return _mean(self, batch, args)

    def mean(self, batch: PyTree, args: tuple[PyTree, ...]) -> PyTree:
        """The mean."""
        if self.axis_name is not None:
            args = parallel.vary(args, self.axis_name)
            batch = parallel.vary(batch, self.axis_name)
        total, weight = self._sums(batch, args)
        if self.axis_name is not None:
            total, weight = jax.lax.psum((total, weight), self.axis_name)
        return jax.tree.map(lambda x: x / weight.astype(x.dtype), total)

    def weighted(self, batch: PyTree, *args: PyTree) -> tuple[PyTree, jax.Array]:
        """`(weight fn(*args, batch), weight)`, wide."""
        weight = jnp.asarray(weight_of(self.weight_fn, batch), float)
        scaled = _tree.scale(weight, self.fn(*args, batch))
        # The mean over no example (all of them padding) is 0 / 0.
        return jax.tree.map(lambda x: jnp.where(weight == 0, 0, x), scaled), weight

    def _sums(self, batch: PyTree, args: tuple[PyTree, ...]) -> tuple[PyTree, jax.Array]:
        size, m = num_examples(batch), self.microbatch_size
        if m is None or m >= size:
            return self.weighted(batch, *args)
        num_whole, rest = divmod(size, m)

        def microbatch(i: Any) -> PyTree:
            if rest:
                return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * m, m), batch)
            # Every num_whole-th example: a first axis sharded over devices stays sharded in each microbatch.
            return jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(
                    x.reshape(m, num_whole, *x.shape[1:]), i, axis=1, keepdims=False
                ),
                batch,
            )

        def add(i: Any, sums: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, sums, self.weighted(microbatch(i), *args))

        # The first one, or the smaller rest, gives the sums their types.
        first = jax.tree.map(lambda x: x[num_whole * m :], batch) if rest else microbatch(0)
        return jax.lax.fori_loop(0 if rest else 1, num_whole, add, self.weighted(first, *args))


@functools.partial(jax.jit, static_argnums=0)
def _mean(mean: BatchMean, batch: PyTree, args: tuple[PyTree, ...]) -> PyTree:
    return mean.mean(batch, args)


class StreamedMean:
    """`(*args) -> mean of fn(*args, batch)` over batches that the host hands in, one compiled call a batch."""

    def __init__(self, name: str, mean: BatchMean, batches: Iterable[PyTree] | Callable[[], Iterable[PyTree]]) -> None:
        self._name, self.mean, self._batches = name, mean, batches
        self._weight: float | None = None
        self._last: Iterator[PyTree] | None = None
        self.iterate()

    def iterate(self) -> Iterator[PyTree]:
        """A fresh pass over the batches."""
        batches = iterate(self._name, self._batches)
        if batches is self._last:
            raise ValueError(
                f"`{self._name}(batches=...)` must give a new iterator at every call; it gave the same"
                f" {type(batches).__name__} twice."
            )
        self._last = batches
        return batches

    def __call__(self, *args: PyTree) -> PyTree:
        """The mean, after one pass over the batches."""
        sums = previous = None
        for batch in self.iterate():
            _check_examples(self._name, batch)
            if sums is None:
                # Zeros rather than a first call without sums, for which all would be compiled once more.
                sums = _no_sums(self.mean, batch, args)
            sums = _add_weighted(self.mean, sums, batch, args)
            # One batch in flight while the next is read: more would hold all their inputs.
            jax.block_until_ready(previous)
            previous = sums[1]
        if sums is None:
            raise ValueError(f"`{self._name}(batches=...)` must give at least one batch; got none.")
        total, weight = sums
        self._check_weight(float(weight))
        return jax.tree.map(lambda x: x / weight.astype(x.dtype), total)

    def _check_weight(self, weight: float) -> None:
        if weight == 0:
            raise ValueError(f"`{self._name}(batches=...)` must have a total weight other than 0.")
        if self._weight is None:
            self._weight = weight
        if not np.isclose(weight, self._weight, rtol=1e-5):
            raise ValueError(
                f"`{self._name}(batches=...)` must give the same data on every pass; the first had a total weight of"
                f" {self._weight:g}, a later one {weight:g}."
            )


@functools.partial(jax.jit, static_argnums=0)
def _no_sums(mean: BatchMean, batch: PyTree, args: tuple[PyTree, ...]) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.zeros_like, mean.weighted(batch, *args))


@functools.partial(jax.jit, static_argnums=0)
def _add_weighted(
    mean: BatchMean, sums: tuple[PyTree, jax.Array], batch: PyTree, args: tuple[PyTree, ...]
) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.add, sums, mean.weighted(batch, *args))


def iterate(name: str, batches: Iterable[PyTree] | Callable[[], Iterable[PyTree]]) -> Iterator[PyTree]:
    """A fresh pass over `batches`; raises where it can be passed over once only."""
    made = batches() if callable(batches) else batches
    if not isinstance(made, Iterable):
        raise TypeError(
            f"`{name}(batches=...)` must be an iterable, or a function that returns one; got {_check.brief(batches)}."
        )
    if made is batches and isinstance(made, Iterator):
        raise TypeError(
            f"`{name}(batches=...)` must be iterable more than once, since every product takes a pass; got a"
            f" {type(batches).__name__}, which ends after one. Give a list, or a function that returns a new iterator."
        )
    return iter(made)


def num_examples(batch: PyTree) -> int:
    """The length of the first axis, shared by all leaves."""
    return jnp.shape(jax.tree.leaves(batch)[0])[0]


def weight_of(weight_fn: Callable[[PyTree], Any] | None, batch: PyTree) -> Any:
    """The weight of a batch."""
    return num_examples(batch) if weight_fn is None else weight_fn(batch)


def mean_over(
    name: str,
    fn: Callable[..., PyTree],
    batch: PyTree | None,
    batches: Any,
    *,
    microbatch_size: int | None,
    weight_fn: Callable[[PyTree], Any] | None,
    axis_name: parallel.AxisName | None,
) -> jax.tree_util.Partial | StreamedMean:
    """`(*args) -> mean of fn(*args, batch)` over either `batch` or `batches`, after checking what was given.

    Of one batch, a `jax.tree_util.Partial` that holds it; of several, a `StreamedMean`, which cannot be traced.
    """
    if (batch is None) == (batches is None):
        given = "neither" if batch is None else "both"
        raise TypeError(f"`{name}` needs one of `batch` and `batches`; got {given}.")
    _check.axis_name(f"{name}(axis_name=...)", axis_name)
    if batches is None:
        _check_examples(name, batch)
        if microbatch_size is not None:
            _check.integer(f"{name}(microbatch_size=...)", microbatch_size, low=1)
        return jax.tree_util.Partial(BatchMean(fn, weight_fn, microbatch_size, axis_name), batch)
    for argument, value in (("microbatch_size", microbatch_size), ("axis_name", axis_name)):
        if value is not None:
            raise TypeError(f"`{name}({argument}=...)` goes with `batch`, not with `batches`; got {value!r}.")
    return StreamedMean(name, BatchMean(fn, weight_fn), batches)


def check_uncoupled(name: str, loss_fn: Callable[[PyTree, PyTree], Any], params: PyTree, mean: Any) -> None:
    """Raises where the loss of four examples is not the mean of the losses of one and three.

    Such a loss (batch normalisation in training mode) is another function for every size of batch, and the mean over
    microbatches is not the loss of the whole. Nothing is checked of traced values, or where nothing is split.
    """
    if isinstance(mean, StreamedMean):
        batch, weight_fn = next(mean.iterate(), None), mean.mean.weight_fn
        if batch is None:
            raise ValueError(f"`{name}(batches=...)` must give at least one batch; got none.")
        _check_examples(name, batch)
    else:
        (batch,), weight_fn = mean.args, mean.func.weight_fn
        if mean.func.microbatch_size is None or mean.func.microbatch_size >= num_examples(batch):
            return
    if num_examples(batch) < 2 or any(isinstance(x, Tracer) for x in jax.tree.leaves((batch, params))):
        return
    count = min(4, num_examples(batch))
    # What lies on the host is cut there, so that no more is sent.
    batch = jax.tree.map(lambda x: x[:count] if isinstance(x, np.ndarray) else x, batch)
    losses = _grouped_losses(loss_fn, weight_fn, params, _first(batch, count))
    whole, split, size = (float(x) for x in losses)
    rtol = max(COUPLING_RTOL, 4 * float(jnp.finfo(losses[0].dtype).eps))
    # Two NaN are no sign of coupling, one is.
    if not np.isclose(whole, split, rtol=0, atol=rtol * np.nan_to_num(size), equal_nan=True):
        raise ValueError(
            f"`{name}` needs a loss whose batches can be split, or `coupled=True`; of {count} examples together it is"
            f" {whole:.6g}, of 1 and {count - 1} {split:.6g}. Batch normalisation in training mode couples a batch:"
            " give it running statistics, or say that the mean over batches is what you want."
        )


@functools.partial(jax.jit, static_argnums=1)
def _first(batch: PyTree, count: int) -> PyTree:
    """The first examples, on all devices where the axis is split over them by explicit types."""

    def first(x: jax.Array) -> jax.Array:
        sharding = _tree.sharding_of(x)
        if sharding is None:
            return x[:count]
        return x.at[jnp.arange(count)].get(
            out_sharding=NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
        )

    return jax.tree.map(first, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grouped_losses(
    loss_fn: Callable[[PyTree, PyTree], Any], weight_fn: Any, params: PyTree, batch: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of all examples, the mean of the losses of one and the others, and the size of what is compared."""
    parts = [jax.tree.map(lambda x: x[:1], batch), jax.tree.map(lambda x: x[1:], batch)]
    weights = [weight_of(weight_fn, part) for part in parts]
    losses = [jnp.mean(jnp.asarray(loss_fn(params, part))) for part in parts]
    whole = jnp.mean(jnp.asarray(loss_fn(params, batch)))
    total = jnp.asarray(sum(weights), whole.dtype)
    shares = [jnp.where(w == 0, 0, w * x / total) for w, x in zip(weights, losses, strict=True)]
    # Where these examples have no weight, nothing can be said. Shares that cancel leave their rounding errors.
    size = jnp.maximum(jnp.abs(whole), sum(map(jnp.abs, shares)))
    return whole, jnp.where(total == 0, whole, sum(shares)), size


def _check_examples(name: str, batch: PyTree) -> None:
    """Raises unless all leaves of `batch` are arrays with the same, positive length."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"`{name}(batch=...)` must have at least one array; got {_check.brief(batch)}.")
    lengths = {jax.tree_util.keystr(path): jnp.shape(x)[0] if jnp.ndim(x) else None for path, x in leaves}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        found = ", ".join(f"batch{path}: {n if n is not None else 'a scalar'}" for path, n in list(lengths.items())[:4])
        raise ValueError(f"`{name}(batch=...)` must have the examples along the first axis of every leaf; got {found}.")
    if 0 in lengths.values():
        raise ValueError(f"`{name}(batch=...)` must have at least one example; got none.")

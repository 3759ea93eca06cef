"""The mean over data of a function of one batch: at once, in microbatches on the device, or streamed by the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hero_jax import _program, _tree, parallel
from hero_jax.errors import ArgumentError
from hero_jax.examples import Examples, Stream, check_batch

PyTree = Any
WeightFn = Callable[[PyTree], Any] | None
LossFn = Callable[[PyTree, PyTree], Any]
# Losses of the same examples grouped in two ways differ by rounding only, unless their examples are coupled.
COUPLING_RTOL = 1e-4
# How many examples of a batch are looked at.
COUPLING_EXAMPLES = 4


def over(
    name: str, fn: Callable[..., PyTree], loss_fn: LossFn, params: PyTree, data: PyTree, coupled: bool
) -> jax.tree_util.Partial | StreamedMean:
    """`(*args) -> mean of fn(*args, batch)` over the data of the argument `data` of function `name`.

    Of examples at hand, a `jax.tree_util.Partial` that holds them; of a stream, a `StreamedMean`, which cannot be
    traced. Unless `coupled`, raises where `loss_fn` couples the examples of a batch that is split.
    """
    if isinstance(data, Stream):
        check = None if coupled else functools.partial(check_uncoupled, name, loss_fn, params)
        return StreamedMean(fn, data, check)
    if not isinstance(data, Examples):
        check_batch(f"{name}(data=...)", data)
        data = Examples(data)
    is_split = data.microbatch_size is not None and data.microbatch_size < num_examples(data.batch)
    if is_split and not coupled:
        check_uncoupled(name, loss_fn, params, data.weight_fn, data.batch)
    return jax.tree_util.Partial(BatchMean(fn), data)


@dataclasses.dataclass(frozen=True)
class BatchMean:
    """`(data, *args) -> mean of fn(*args, batch)` on the device. Hashable: what is compiled for it is shared.

    fn: `(*args, batch) -> pytree`, a mean over its batch.
    """

    fn: Callable[..., PyTree]

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, data: Examples, *args: PyTree) -> PyTree:
        """The mean, compiled."""
        batch, size, m = data.batch, num_examples(data.batch), data.microbatch_size
        if data.axis_name is not None:
            batch, args = parallel.vary((batch, args), data.axis_name)
        if m is None or m >= size:
            sums = _weighted(self.fn, data.weight_fn, batch, args)
        else:
            sums = _summed(self.fn, data.weight_fn, batch, args, *divmod(size, m), m)
        total, weight = sums if data.axis_name is None else jax.lax.psum(sums, data.axis_name)
        return jax.tree.map(lambda x: x / weight.astype(x.dtype), total)


def _summed(
    fn: Callable[..., PyTree],
    weight_fn: WeightFn,
    batch: PyTree,
    args: tuple[PyTree, ...],
    num_whole: int,
    rest: int,
    m: int,
) -> tuple[PyTree, jax.Array]:
    """The sum over microbatches of m examples, and a rest, of weighted values, and of weights."""

    def microbatch(i: Any) -> PyTree:
        if rest:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * m, m), batch)
        # Every num_whole-th example: a first axis sharded over devices stays sharded in each microbatch.
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x.reshape(m, num_whole, *x.shape[1:]), i, axis=1, keepdims=False),
            batch,
        )

    def add(i: Any, sums: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, sums, _weighted(fn, weight_fn, microbatch(i), args))

    # The first one, or the smaller rest, gives the sums their types.
    first = jax.tree.map(lambda x: x[num_whole * m :], batch) if rest else microbatch(0)
    return jax.lax.fori_loop(0 if rest else 1, num_whole, add, _weighted(fn, weight_fn, first, args))


def _weighted(
    fn: Callable[..., PyTree], weight_fn: WeightFn, batch: PyTree, args: tuple[PyTree, ...]
) -> tuple[PyTree, jax.Array]:
    """`(weight fn(*args, batch), weight)`, wide."""
    weight = jnp.asarray(weight_of(weight_fn, batch), float)
    scaled = _tree.scale(weight, fn(*args, batch))
    # The mean over no example (all of them padding) is 0 / 0.
    return jax.tree.map(lambda x: jnp.where(weight == 0, 0, x), scaled), weight


class StreamedMean:
    """`(*args) -> mean of fn(*args, batch)` over a stream, one compiled call per batch.

    check: called with the stream's `weight_fn` and each batch of the first pass, with the first one at once.
    """

    def __init__(
        self, fn: Callable[..., PyTree], stream: Stream, check: Callable[[WeightFn, PyTree], None] | None
    ) -> None:
        self._fn, self._stream, self._check = fn, stream, check
        self._weight: float | None = None
        self._last: Iterator[PyTree] | None = None
        if check is not None:
            batch = next(self._iterate(), None)
            if batch is None:
                raise ArgumentError("`Stream(batches=...)` must give at least one batch; got none.")
            check_batch("Stream(batches=...)", batch)
            check(stream.weight_fn, batch)

    def _iterate(self) -> Iterator[PyTree]:
        """A new pass over the batches."""
        batches = iter(self._stream)
        if batches is self._last:
            raise ArgumentError(
                f"`Stream(batches=...)` must give a new iterator at every call; it gave the same"
                f" {type(batches).__name__} twice."
            )
        self._last = batches
        return batches

    def __call__(self, *args: PyTree) -> PyTree:
        """The mean, after one pass over the batches."""
        if _tree.is_traced(args) or _tree.is_tracing():
            raise TypeError("A mean over a `Stream` runs on the host and cannot be traced; call it outside jax.jit.")
        weight_fn, sums, previous = self._stream.weight_fn, None, None
        is_first_pass = self._weight is None
        for batch in self._iterate():
            check_batch("Stream(batches=...)", batch)
            if sums is None:
                # Zeros rather than a first call without sums, for which all would be compiled once more.
                sums = _no_sums(self._fn, weight_fn, batch, args)
            elif is_first_pass and self._check is not None:
                # A mask may be in the last batch alone, where it was filled up.
                self._check(weight_fn, batch)
            sums = _add_weighted(self._fn, weight_fn, sums, batch, args)
            # One batch in flight while the next is read: more would hold all their inputs.
            jax.block_until_ready(previous)
            previous = sums[1]
        if sums is None:
            raise ArgumentError("`Stream(batches=...)` must give at least one batch; got none.")
        total, weight = sums
        self._check_weight(float(weight))
        return jax.tree.map(lambda x: x / weight.astype(x.dtype), total)

    def _check_weight(self, weight: float) -> None:
        if weight == 0:
            raise ArgumentError("`Stream(batches=...)` must have a total weight other than 0.")
        if self._weight is None:
            self._weight = weight
        if not np.isclose(weight, self._weight, rtol=1e-5):
            raise ArgumentError(
                "`Stream(batches=...)` must give the same data on every pass; the first had a total weight of"
                f" {self._weight:g}, a later one {weight:g}."
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _no_sums(
    fn: Callable[..., PyTree], weight_fn: WeightFn, batch: PyTree, args: tuple[PyTree, ...]
) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.zeros_like, _weighted(fn, weight_fn, batch, args))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_weighted(
    fn: Callable[..., PyTree],
    weight_fn: WeightFn,
    sums: tuple[PyTree, jax.Array],
    batch: PyTree,
    args: tuple[PyTree, ...],
) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.add, sums, _weighted(fn, weight_fn, batch, args))


def num_examples(batch: PyTree) -> int:
    """The length of the first axis, shared by all leaves."""
    return jnp.shape(jax.tree.leaves(batch)[0])[0]


def weight_of(weight_fn: WeightFn, batch: PyTree) -> Any:
    """The weight of a batch."""
    return num_examples(batch) if weight_fn is None else weight_fn(batch)


def check_uncoupled(name: str, loss_fn: LossFn, params: PyTree, weight_fn: WeightFn, batch: PyTree) -> None:
    """Raises where the loss of four examples is not the weighted mean of the losses of one and three.

    Such a loss is another function for every size of batch (batch normalisation in training mode), or has another
    weight (masked examples): the mean over batches is not the loss of the whole. The examples are spread over the
    batch, its last one included, where padding is. Nothing is checked of traced values.
    """
    size = num_examples(batch)
    if size < 2 or _tree.is_tracing() or _tree.is_traced((batch, params)):
        return
    indices = np.linspace(0, size - 1, min(COUPLING_EXAMPLES, size)).round().astype(int)
    # What lies on the host is picked there, so that no more is sent.
    batch = jax.tree.map(lambda x: x[indices] if isinstance(x, np.ndarray) else _picked(x, indices), batch)
    losses = _grouped_losses(loss_fn, weight_fn, params, batch)
    whole, split, compared = (float(x) for x in losses)

    def differ(rtol: float) -> bool:
        # Two NaN are no sign of coupling, one is.
        return not np.isclose(whole, split, rtol=0, atol=rtol * np.nan_to_num(compared), equal_nan=True)

    # The types that the loss is computed in are asked for last: that takes a trace of it.
    if differ(COUPLING_RTOL) and differ(4 * _precision(loss_fn, params, batch)):
        raise ArgumentError(
            f"`{name}` needs a loss whose batches can be split, or `coupled=True`; of {len(indices)} examples together"
            f" it is {whole:.6g}, of 1 and {len(indices) - 1} {split:.6g}. Batch normalisation in training mode couples"
            " a batch: give it running statistics, or say that the mean over batches is what you want. A loss that"
            " leaves out masked examples, or divides by tokens, needs a `weight_fn`."
        )


def _precision(loss_fn: LossFn, params: PyTree, batch: PyTree) -> float:
    """The rounding of the narrowest type that a loss is computed in."""
    program = jax.make_jaxpr(loss_fn)(params, batch).jaxpr
    types = {v.aval.dtype for e in _program.equations(program) for v in e.outvars if hasattr(v.aval, "dtype")}
    rounding = max((float(jnp.finfo(t).eps) for t in types if jnp.issubdtype(t, jnp.floating)), default=0.0)
    # Accelerators take the factors of a float32 product in TF32 or bfloat16.
    return rounding if jax.default_backend() == "cpu" else max(rounding, float(jnp.finfo(jnp.bfloat16).eps))


@jax.jit
def _picked(x: jax.Array, indices: np.ndarray) -> jax.Array:
    """These examples, on all devices where the axis is split over them by explicit types."""
    sharding = _tree.sharding_of(x)
    if sharding is None:
        return x[indices]
    return x.at[indices].get(out_sharding=NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grouped_losses(
    loss_fn: Callable[[PyTree, PyTree], Any], weight_fn: Any, params: PyTree, batch: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of all examples, the mean of the losses of one and the others, and the size of what is compared."""
    parts = [jax.tree.map(lambda x: x[:1], batch), jax.tree.map(lambda x: x[1:], batch)]
    weights = [weight_of(weight_fn, part) for part in parts]
    losses = [jnp.mean(_tree.wide(loss_fn(params, part))) for part in parts]
    whole = jnp.mean(_tree.wide(loss_fn(params, batch)))
    total = jnp.asarray(sum(weights), whole.dtype)
    shares = [jnp.where(w == 0, 0, w * x / total) for w, x in zip(weights, losses, strict=True)]
    # Where these examples have no weight, nothing can be said. Shares that cancel leave their rounding errors.
    size = jnp.maximum(jnp.abs(whole), sum(map(jnp.abs, shares)))
    return whole, jnp.where(total == 0, whole, sum(shares)), size

"""How good a network is: accuracy and loss of a classifier on a data set, and means over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _tree, errors
from hero_jax.errors import ArgumentError

__all__ = ["Spread", "aggregate", "classifier"]

if TYPE_CHECKING:
    from hero_jax.quantize import QuantizedScore

PyTree = Any


class Spread(NamedTuple):
    """Mean and sample standard deviation over n runs; the deviation of one run is NaN."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one number a run; NaN where one is not finite."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def aggregate(runs: Sequence[Sequence[QuantizedScore]], value: Callable[[QuantizedScore], float]) -> list[Spread]:
    """Mean and spread over runs (seeds) of one number of each row.

    Args:
      runs: the rows of `quantize_and_evaluate` for every run, with the same bit widths and specification.
      value: `row -> number`, such as `lambda row: row.metrics["accuracy"]`.

    Returns:
      One `Spread` a row.

    Raises:
      ArgumentError: no run, or rows that do not belong together.

    >>> import jax.numpy as jnp
    >>> from hero_jax.quantize import quantize_and_evaluate
    >>> runs = [quantize_and_evaluate(jnp.sum, jnp.array([[x], [0.3]]), bits=(2,)) for x in (1.0, 2.0, 4.0)]
    >>> [(round(s.mean, 3), round(s.std, 3), s.n) for s in aggregate(runs, lambda row: row.metrics["value"])]
    [(2.633, 1.528, 3), (2.333, 1.528, 3)]
    """
    if not runs:
        raise ArgumentError("`aggregate(runs=...)` must have at least one run; got none.")
    kinds = [[(row.bits, row.spec) for row in rows] for rows in runs]
    for kind in kinds:
        if kind != kinds[0]:
            raise ArgumentError(
                "`aggregate(runs=...)` must have the same bit widths and specification in every run; got"
                f" {kinds[0]} and {kind}."
            )
    columns = zip(*([value(row) for row in rows] for rows in runs), strict=True)
    return [Spread.of(column) for column in columns]


def classifier(
    apply_fn: Callable[[PyTree, jax.Array], jax.Array],
    *,
    batch_size: int = 500,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[..., dict[str, Any]]:
    """Makes a function that evaluates a classifier on a data set, in batches of one shape.

    The last batch is filled up and masked, so that one program serves all; the host waits once, at the end.

    Args:
      apply_fn: `(params, inputs) -> logits` of shape (N, classes), evaluation mode.
      batch_size: examples at a time; no more than the data set has are used.
      sharding: a sharding of the examples, such as `NamedSharding(mesh, P("data"))`; it must divide the batch. Weights
        that are on other devices are copied to each of its devices.

    Returns:
      `(params, inputs, labels, report=None) -> {"accuracy": fraction, "loss": mean cross-entropy, "predictions": (N,)
      integers}`; inputs and integer labels are arrays with the examples along the first axis, on the host or not, and
      `report(done, total)` is called after every batch. An empty data set, or a label that is no class, raises
      ArgumentError, labels that are not integers TypeError.

    Cost: one forward pass; memory of one batch. What is compiled is kept with the function: make it once.

    >>> import jax.numpy as jnp
    >>> evaluate = classifier(lambda w, x: x @ w, batch_size=2)
    >>> found = evaluate(jnp.eye(2), jnp.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), jnp.array([0, 1, 1]))
    >>> print(round(found["accuracy"], 3), round(found["loss"], 3), found["predictions"])
    0.667 3.0 [0 1 0]
    """
    errors.integer("classifier(batch_size=...)", batch_size, low=1)

    @jax.jit
    def score(params: PyTree, inputs: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        logits = apply_fn(params, inputs)
        found, classes, wide = logits.argmax(-1), logits.shape[-1], labels.astype(int)
        # The loss takes -1 for the last class; the accuracy does not.
        wrong = mask & ((wide < 0) | (wide >= classes))
        losses = optax.softmax_cross_entropy_with_integer_labels(_tree.wide(logits), jnp.clip(wide, 0, classes - 1))
        first_wrong = jnp.where(wrong.any(), wrong.argmax(), -1)
        hits, total = jnp.sum(mask & (found == wide)), jnp.sum(jnp.where(mask, losses, 0))
        return hits, total, found, first_wrong, jnp.asarray(classes)

    def evaluate(
        params: PyTree, inputs: Any, labels: Any, report: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        if len(inputs) != len(labels) or not len(labels):
            raise ArgumentError(
                f"`inputs` and `labels` must be as many, and some; got {len(inputs)} and {len(labels)}."
            )
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(f"`labels` must be integers; got {jnp.result_type(labels)}.")
        size = len(labels)
        batch = min(batch_size, size)
        if sharding is not None:
            batch, params = _fitted(batch, batch_size, sharding), _placed(params, sharding)
        results = []
        for chosen, mask in _masked_batches(size, batch):
            part = inputs[chosen], labels[chosen], mask
            results.append(score(params, *(part if sharding is None else jax.device_put(part, sharding))))
            if report is not None:
                jax.block_until_ready(results[-1])
                report(min(batch * len(results), size), size)
        hits, losses, found, wrong, classes = zip(*jax.device_get(results), strict=True)
        for i, place in enumerate(wrong):
            if place >= 0:
                at = i * batch + int(place)
                raise ArgumentError(f"`labels` must be in 0..{classes[0] - 1}; at {at} it is {int(labels[at])}.")
        return {
            "accuracy": sum(int(x) for x in hits) / size,
            "loss": math.fsum(float(x) for x in losses) / size,
            "predictions": np.concatenate(found)[:size],
        }

    return evaluate


def _masked_batches(size: int, batch: int) -> Iterator[tuple[Any, np.ndarray]]:
    for start in range(0, size, batch):
        indices = np.arange(start, start + batch)
        # A slice where the batch is whole: no copy of a host array.
        chosen = slice(start, start + batch) if start + batch <= size else np.minimum(indices, size - 1)
        yield chosen, indices < size


def _fitted(batch: int, batch_size: int, sharding: jax.sharding.NamedSharding) -> int:
    """The batch, made a multiple of the shards where the data set is the smaller one."""
    shards = sharding.num_devices // max(1, math.prod(_unused_axes(sharding)))
    if batch_size % shards:
        raise ArgumentError(f"`classifier(batch_size=...)` must be divided by the {shards} shards; got {batch_size}.")
    return -(-batch // shards) * shards


def _unused_axes(sharding: jax.sharding.NamedSharding) -> list[int]:
    used = sharding.spec[0] if len(sharding.spec) else ()
    names = (used,) if isinstance(used, str) else used or ()
    return [size for name, size in sharding.mesh.shape.items() if name not in names]


def _placed(params: PyTree, sharding: jax.sharding.NamedSharding) -> PyTree:
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def place(x: Any) -> jax.Array:
        is_there = isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set
        return x if is_there else jax.device_put(x, replicated)

    return jax.tree.map(place, params)

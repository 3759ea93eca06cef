"""What a network is worth after its weights were quantized."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _check, _tree
from hero_jax.quantize import weights
from hero_jax.quantize.spec import QuantSpec, paths_of

PyTree = Any


class QuantizedScore(NamedTuple):
    """One row of `quantize_and_evaluate`.

    bits: bit width; of a tree of widths their mean over the quantized weights; None for full precision.
    metrics: what `eval_fn` returned, as floats, without its predictions.
    fraction: of the parameters, those that were quantized; 0 for full precision.
    spec: name of the specification.
    drop: metric at full precision minus metric here.
    flipped: fraction of predictions that differ from those at full precision; None where `eval_fn` gives none.
    sqnr_db: 10 log10(sum of w^2 / sum of (w_hat - w)^2) over the quantized weights; inf for full precision.
    ideal_bytes: size of the weights with codes of exactly `bits` bits and nothing else: what is usually quoted.
    stored_bytes: size of the tensors that `save` writes, with scales and zero points.
    """

    bits: int | float | None
    metrics: dict[str, float]
    fraction: float
    spec: str
    drop: dict[str, float]
    flipped: float | None
    sqnr_db: float
    ideal_bytes: float
    stored_bytes: float


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


def quantize_and_evaluate(
    eval_fn: Callable[[PyTree], Mapping[str, Any] | jax.typing.ArrayLike],
    params: PyTree,
    bits: Iterable[PyTree] = (8, 6, 5, 4, 3, 2),
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    quantizer: Callable[[PyTree, PyTree], PyTree] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[QuantizedScore]:
    """Evaluates a network at full precision and with its weights at each bit width.

        rows = [eval_fn(w)] + [eval_fn(fake_quantize(w, b)) for b in bits]

    Args:
      eval_fn: `params -> {name: scalar}`, or one scalar, which is named "value". An entry "predictions", an array, is
        not a metric: those that change are counted. `classifier` makes such a function for a data set. It may loop on
        the host; give it a jitted forward pass that takes the data as an argument: that compiles once for the sweep.
      params: pytree of floating-point arrays; model state, such as BatchNorm statistics, is closed over by `eval_fn`.
      bits: bit widths in 2..16, or trees of them as `fake_quantize` takes, in the order of the rows.
      spec, mask: as in `fake_quantize`.
      quantizer: `(params, bits) -> weights` in place of `fake_quantize` with `spec` and `mask`, which still say what is
        counted. Its weights must be on the grid of `spec` for the sizes to be true.
      report: called with the number of evaluations done, and their total.

    Returns:
      A list of `QuantizedScore`, full precision first.

    Raises:
      ValueError: an empty `bits`, a weight that is not finite (named), metrics whose names, or predictions whose
        shape, differ between calls, or what `fake_quantize` raises.
      TypeError: `bits` is not a sequence; a metric that is not a scalar.

    Cost: `len(bits) + 1` evaluations; quantizing compiles once, since the bit width is traced.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[1.0], [-0.4]])
    >>> for row in quantize_and_evaluate(lambda p: {"sum": p.sum()}, w, bits=(8, 2)):
    ...     print(row.bits, round(row.metrics["sum"], 3), row.fraction, row.spec, round(row.sqnr_db, 1))
    None 0.6 0.0 channel-narrow inf
    8 0.598 1.0 channel-narrow 56.7
    2 1.0 1.0 channel-narrow 8.6
    """
    if not isinstance(bits, Iterable) or isinstance(bits, Mapping):
        raise TypeError(f"`quantize_and_evaluate(bits=...)` must be a sequence of bit widths; got {bits!r}.")
    widths = tuple(bits)
    if not widths:
        raise ValueError("`quantize_and_evaluate(bits=...)` must name at least one bit width; got none.")
    plans = [weights.plan_of("quantize_and_evaluate", params, width, spec, mask) for width in widths]
    _check_finite(params)
    if report is not None:
        report(0, len(widths) + 1)

    rows = []
    full: dict[str, float] = {}
    full_predictions = None
    for i, (width, plan) in enumerate(zip((None, *widths), (None, *plans), strict=True)):
        if plan is None:
            quantized, ratio = params, math.inf
        else:
            traced = weights.traced(plan)
            if quantizer is None:
                quantized, energies = _rounded(params, traced, spec)
            else:
                quantized = quantizer(params, width)
                energies = _energies(params, quantized, traced)
            signal, noise = (float(x) for x in energies)
            ratio = signal / noise if noise else math.inf if signal else math.nan
        metrics, predictions = _metrics(eval_fn(quantized))
        if plan is None:
            full, full_predictions = metrics, predictions
        elif (kinds := _kinds(metrics, predictions)) != (first := _kinds(full, full_predictions)):
            raise ValueError(
                "`quantize_and_evaluate(eval_fn=...)` must return the same metrics in every call; got"
                f" {', '.join(first)}, then {', '.join(kinds)}."
            )
        size = weights.sizes(params, plan or [None] * len(plans[0]), spec)
        mean_bits = size.pop("mean_bits")
        rows.append(
            QuantizedScore(
                bits=None if plan is None else int(mean_bits) if mean_bits.is_integer() else mean_bits,
                metrics=metrics,
                spec=spec.name,
                drop={name: full[name] - value for name, value in metrics.items()},
                flipped=None if predictions is None else float(np.mean(predictions != full_predictions)),
                sqnr_db=10 * math.log10(ratio) if math.isfinite(ratio) else ratio,
                **size,
            )
        )
        if report is not None:
            report(i + 1, len(widths) + 1)
    return rows


def aggregate(runs: Sequence[Sequence[QuantizedScore]], value: Callable[[QuantizedScore], float]) -> list[Spread]:
    """Mean and spread over runs (seeds) of one number of each row.

    Args:
      runs: the rows of `quantize_and_evaluate` for every run, with the same bit widths and specification.
      value: `row -> number`, such as `lambda row: row.metrics["accuracy"]`.

    Returns:
      One `Spread` a row.

    Raises:
      ValueError: no run, or rows that do not belong together.

    >>> import jax.numpy as jnp
    >>> runs = [quantize_and_evaluate(jnp.sum, jnp.array([[x], [0.3]]), bits=(2,)) for x in (1.0, 2.0, 4.0)]
    >>> [(round(s.mean, 3), round(s.std, 3), s.n) for s in aggregate(runs, lambda row: row.metrics["value"])]
    [(2.633, 1.528, 3), (2.333, 1.528, 3)]
    """
    if not runs:
        raise ValueError("`aggregate(runs=...)` must have at least one run; got none.")
    kinds = [[(row.bits, row.spec) for row in rows] for rows in runs]
    for kind in kinds:
        if kind != kinds[0]:
            raise ValueError(
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
      `report(done, total)` is called after every batch. An empty data set raises ValueError.

    Cost: one forward pass; memory of one batch. What is compiled is kept with the function: make it once.

    >>> import jax.numpy as jnp
    >>> evaluate = classifier(lambda w, x: x @ w, batch_size=2)
    >>> found = evaluate(jnp.eye(2), jnp.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), jnp.array([0, 1, 1]))
    >>> print(round(found["accuracy"], 3), round(found["loss"], 3), found["predictions"])
    0.667 3.0 [0 1 0]
    """
    _check.integer("classifier(batch_size=...)", batch_size, low=1)

    @jax.jit
    def score(params: PyTree, inputs: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        logits = apply_fn(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(_tree.wide(logits), labels)
        found = logits.argmax(-1)
        return jnp.sum(mask & (found == labels)), jnp.sum(jnp.where(mask, losses, 0)), found

    def evaluate(
        params: PyTree, inputs: Any, labels: Any, report: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        if len(inputs) != len(labels) or not len(labels):
            raise ValueError(f"`inputs` and `labels` must be as many, and some; got {len(inputs)} and {len(labels)}.")
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
        hits, losses, found = zip(*jax.device_get(results), strict=True)
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
        raise ValueError(f"`classifier(batch_size=...)` must be divided by the {shards} shards; got {batch_size}.")
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


# Compiled once for all sweeps over one network: `plan` has a traced bit width for each leaf, or None.
_energies = jax.jit(weights.error_energy)


@functools.partial(jax.jit, static_argnums=2)
def _rounded(params: PyTree, plan: list[Any], spec: QuantSpec) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
    quantized = weights.on_plan(params, plan, spec)
    return quantized, weights.error_energy(params, quantized, plan)


@jax.jit
def _are_finite(leaves: list[Any]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in leaves]


def _check_finite(params: PyTree) -> None:
    for path, is_finite in zip(paths_of(params), _are_finite(jax.tree.leaves(params)), strict=True):
        if not is_finite:
            raise ValueError(f"`params` must be finite; {path!r} has a NaN or an infinity.")


def _metrics(result: Mapping[str, Any] | jax.typing.ArrayLike) -> tuple[dict[str, float], np.ndarray | None]:
    if not isinstance(result, Mapping):
        result = {"value": result}
    predictions = result.get("predictions")
    metrics = {}
    for name, value in result.items():
        if name != "predictions":
            _check.scalar(f"eval_fn(...)[{name!r}]", value)
            metrics[name] = float(value)
    return metrics, None if predictions is None else np.asarray(predictions)


def _kinds(metrics: dict[str, float], predictions: np.ndarray | None) -> list[str]:
    """What every row must have alike."""
    return sorted(metrics) + ([] if predictions is None else [f"predictions of shape {predictions.shape}"])

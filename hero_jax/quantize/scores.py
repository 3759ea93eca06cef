"""What a network is worth after its weights were quantized."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import errors
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _plan, weights
from hero_jax.quantize.spec import QuantSpec

__all__ = ["QuantizedScore", "quantize_and_evaluate"]

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


def quantize_and_evaluate(
    eval_fn: Callable[[PyTree], Mapping[str, Any] | jax.typing.ArrayLike],
    params: PyTree,
    bits: Iterable[PyTree] = (8, 6, 5, 4, 3, 2),
    spec: QuantSpec = QuantSpec(),
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    quantizer: Callable[[PyTree, PyTree], PyTree] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[QuantizedScore]:
    """Evaluates a network at full precision and with its weights at each bit width.

        rows = [eval_fn(w)] + [eval_fn(fake_quantize(w, b)) for b in bits]

    Args:
      eval_fn: `params -> {name: scalar}`, or one scalar, which is named "value". An entry "predictions", an array, is
        not a metric: those that change are counted. `evaluate.classifier` makes such a function for a data set. It may
        loop on the host; give it a jitted forward pass that takes the data as an argument: that compiles once for the
        sweep.
      params: pytree of floating-point arrays; model state, such as BatchNorm statistics, is closed over by `eval_fn`.
      bits: bit widths in 2..16, or trees of them as `fake_quantize` takes, in the order of the rows.
      spec, mask: as in `fake_quantize`.
      quantizer: `(params, bits) -> weights` in place of `fake_quantize` with `spec` and `mask`, which still say what is
        counted. Its weights must be on the grid of `spec` for the sizes to be true.
      report: called with the number of evaluations done, and their total.

    Returns:
      A list of `QuantizedScore`, full precision first.

    Raises:
      ArgumentError: an empty `bits`, a weight that is not finite (named), metrics whose names, or predictions whose
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
        raise ArgumentError("`quantize_and_evaluate(bits=...)` must name at least one bit width; got none.")
    plans = [_plan.plan_of("quantize_and_evaluate", params, width, spec, mask) for width in widths]
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
            traced = _plan.traced(plan)
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
            raise ArgumentError(
                "`quantize_and_evaluate(eval_fn=...)` must return the same metrics in every call; got"
                f" {', '.join(first)}, then {', '.join(kinds)}."
            )
        size = _plan.sizes(params, plan or [None] * len(plans[0]), spec)
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
    for path, is_finite in zip(_plan.paths_of(params), _are_finite(jax.tree.leaves(params)), strict=True):
        if not is_finite:
            raise ArgumentError(f"`params` must be finite; {path!r} has a NaN or an infinity.")


def _metrics(result: Mapping[str, Any] | jax.typing.ArrayLike) -> tuple[dict[str, float], np.ndarray | None]:
    if not isinstance(result, Mapping):
        result = {"value": result}
    predictions = result.get("predictions")
    metrics = {}
    for name, value in result.items():
        if name != "predictions":
            errors.scalar(f"eval_fn(...)[{name!r}]", value)
            metrics[name] = float(value)
    return metrics, None if predictions is None else np.asarray(predictions)


def _kinds(metrics: dict[str, float], predictions: np.ndarray | None) -> list[str]:
    """What every row must have alike."""
    return sorted(metrics) + ([] if predictions is None else [f"predictions of shape {predictions.shape}"])

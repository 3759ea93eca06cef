"""Which layers suffer from quantization, and what the Hessian predicts of it.

With d_l = w_hat_l - w_l in leaf l and zero elsewhere, n_l its entries and H_ll its block of the Hessian:

    measured         L(w + d_l) - L(w)
    by the Hessian   d_l^T H_ll d_l / 2
    by the trace     tr H_ll / (2 n_l) ||d_l||^2

The term of first order, g^T d_l, is in neither prediction: they are those of a minimum, where g = 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _check, _loop, _tree, errors
from hero_jax.errors import ArgumentError
from hero_jax.operators import Operator
from hero_jax.quantize import _plan, weights
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS, QuantSpec

__all__ = ["Correlation", "Sensitivity", "correlation", "predicted_costs", "sensitivities"]

PyTree = Any


class Sensitivity(NamedTuple):
    """One leaf quantized alone.

    layer: its path, such as "conv1/kernel".
    size: entries, n.
    bits: bit width.
    error_energy: ||d||^2, d = w_hat - w.
    increase: L(w + d) - L(w), measured; rounded at about eps |L|.
    by_trace: tr H_ll / (2 n) ||d||^2, exact where H_ll is a multiple of the identity.
    by_hessian: d^T H d / 2; None without an `operator`.
    """

    layer: str
    size: int
    bits: int
    error_energy: float
    increase: float
    by_trace: float
    by_hessian: float | None


class Correlation(NamedTuple):
    """Pearson's and Spearman's coefficient of n pairs; NaN where one of the two is constant, or holds a NaN."""

    pearson: float
    spearman: float
    n: int


def sensitivities(
    mean_loss: Callable[[PyTree], jax.typing.ArrayLike],
    params: PyTree,
    bits: int,
    traces: PyTree,
    *,
    operator: Callable[[PyTree], PyTree] | None = None,
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Quantizes each leaf alone, the others at full precision, and compares the loss with its prediction.

        increase   = L(w + d_l) - L(w)
        by_trace   = tr H_ll / (2 n_l) ||d_l||^2
        by_hessian = d_l^T H d_l / 2

    The predictions are of second order only: where w is no minimum of L, `increase` also has g^T d_l, which neither
    contains. `sharpness.increase_along` gives that term.

    Args:
      mean_loss: `params -> scalar`, the loss over all data, evaluation mode: a `hero_jax.MeanLoss`, say. It may loop on
        the host; what it calls should be compiled.
      params: pytree of floating-point arrays, w.
      bits: bit width in 2..16; leaves that `spec.overrides` names have theirs.
      traces: tree like `params` with a scalar for each leaf, tr H_ll: `spectrum.layer_traces(...).mean`. Leaves that
        are not quantized may be None, as those of a restricted operator are.
      operator: `vector -> H vector`: the Hessian of the same loss at w, `hessian_operator`; it may be restricted to
        leaves that include all quantized ones.
      spec, mask: as in `fake_quantize`.
      report: called with the number of evaluations done, and their total.

    Returns:
      A `Sensitivity` for each leaf that is quantized, in the order of `params`.

    Raises:
      ArgumentError: `traces` without the structure of `params`, or what `fake_quantize` raises.
      TypeError: `bits` is not an integer; a loss or a trace that is not a scalar.

    Cost: one evaluation of the loss a leaf and one more; one product a leaf with `operator`; memory of the quantized
    tree. All leaves are quantized by one program; products are compiled and looped as in `power_iteration`.

    >>> import jax.numpy as jnp
    >>> w, h = {"a": jnp.array([[1.0], [0.4]]), "b": jnp.array([[-2.0], [0.5]])}, {"a": 3.0, "b": 5.0}
    >>> def mean_loss(p):
    ...     return sum(h[k] * jnp.sum((p[k] - w[k]) ** 2) / 2 for k in h)
    >>> traces = {k: 2 * h[k] for k in h}
    >>> for s in sensitivities(mean_loss, w, 2, traces, operator=lambda v: {k: h[k] * v[k] for k in v}):
    ...     print(s.layer, s.size, round(s.error_energy, 3), *(round(x, 3) for x in s[4:]))
    a 2 0.16 0.24 0.24 0.24
    b 2 0.25 0.625 0.625 0.625

    Source: Dong, Yao, Arfeen, Gholami, Mahoney and Keutzer, HAWQ-V2, NeurIPS 2020, section 3.
    """
    errors.integer("sensitivities(bits=...)", bits, low=MIN_BITS, high=MAX_BITS)
    plan = _plan.plan_of("sensitivities", params, bits, spec, mask)
    layer_traces = _layer_traces("sensitivities", traces, params, plan)
    quantized, energies = _quantized(params, _plan.traced(plan), spec)
    leaves, structure = jax.tree.flatten(params)
    chosen = tuple(i for i, width in enumerate(plan) if width is not None)
    forms: list[Any] = [None] * len(leaves)
    if operator is not None:
        kept = _kept("sensitivities(operator=...)", operator.like if isinstance(operator, Operator) else params, params)
        _check_covers("sensitivities(operator=...)", kept, params, chosen)
        start = _Forms(params, quantized, jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, energies))
        forms = _loop.run(_OneLeaf(chosen, kept), operator, start).values
    paths, total = _plan.paths_of(params), len(chosen) + 1
    _report(report, 0, total)
    full = _loss(mean_loss, params)
    _report(report, 1, total)
    rows = []
    for done, i in enumerate(chosen):
        swapped = [*leaves[:i], jax.tree.leaves(quantized)[i], *leaves[i + 1 :]]
        n, energy = math.prod(jnp.shape(leaves[i])), float(energies[i])
        rows.append(
            Sensitivity(
                layer=paths[i],
                size=n,
                bits=int(plan[i]),
                error_energy=energy,
                increase=_loss(mean_loss, structure.unflatten(swapped)) - full,
                by_trace=_by_trace(layer_traces[i], n, energy),
                by_hessian=None if operator is None else float(forms[i]) / 2,
            )
        )
        _report(report, done + 2, total)
    return rows


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation:
    """Correlates two lists of numbers, by value and by rank; equal numbers share the average of their ranks.

        pearson = sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)
        spearman = that of the ranks

    Args:
      xs, ys: as many numbers each, such as the measured increase and its prediction for every layer.

    Returns:
      `Correlation`.

    Raises:
      ArgumentError: fewer than two pairs, or lists of different lengths.

    >>> correlation([1.0, 2.0, 3.0], [1.0, 4.0, 9.0]).spearman, correlation([1.0, 2.0], [5.0, 5.0]).pearson
    (1.0, nan)

    Source: Spearman, The proof and measurement of association between two things, 1904.
    """
    x, y = (np.asarray(values, np.float64) for values in (xs, ys))
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ArgumentError(
            f"`correlation(xs, ys)` must be two lists of n >= 2 numbers; got shapes {x.shape}, {y.shape}."
        )
    if np.isnan(x).any() or np.isnan(y).any():
        return Correlation(math.nan, math.nan, x.size)
    return Correlation(_pearson(x, y), _pearson(_ranks(x), _ranks(y)), x.size)


def predicted_costs(
    params: PyTree,
    traces: PyTree,
    bits: Iterable[int] = (2, 3, 4, 5, 6, 8),
    *,
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> dict[str, dict[int, float]]:
    """Predicts the increase of the loss for each layer and bit width, by the layer's trace.

        cost_l(b) = max(tr H_ll, 0) / (2 n_l) ||fake_quantize(w_l, b) - w_l||^2

    A negative trace, which an indefinite Hessian may have and an estimate may be by chance, costs nothing: as it
    stands it would reward errors. The gradient term is left out; see `sensitivities`.

    Args:
      params: pytree of floating-point arrays, w.
      traces: as in `sensitivities`.
      bits: bit widths in 2..16.
      spec, mask: as in `fake_quantize`. A leaf with a bit width in `spec.overrides` has that one only.

    Returns:
      {path: {bits: cost}} of the leaves that are quantized; NaN where the trace or a weight is.

    Raises:
      ArgumentError: no bit width, `traces` without the structure of `params`, or what `fake_quantize` raises.
      TypeError: a trace that is not a scalar.

    Cost: `len(bits)` quantizations, compiled once.

    >>> import jax.numpy as jnp
    >>> costs = predicted_costs({"a": jnp.array([[1.0], [0.4]]), "bias": jnp.ones(1)}, {"a": 6.0, "bias": 1.0}, (2, 3))
    >>> {b: round(cost, 3) for b, cost in costs["a"].items()}
    {2: 0.24, 3: 0.007}

    Source: Dong et al., HAWQ-V2, NeurIPS 2020, section 3.
    """
    widths = tuple(bits)
    if not widths:
        raise ArgumentError("`predicted_costs(bits=...)` must name at least one bit width; got none.")
    costs: dict[str, dict[int, float]] = {}
    for width in widths:
        errors.integer("predicted_costs(bits=...)", width, low=MIN_BITS, high=MAX_BITS)
        plan = _plan.plan_of("predicted_costs", params, width, spec, mask)
        layer_traces = _layer_traces("predicted_costs", traces, params, plan)
        energies = _quantized(params, _plan.traced(plan), spec)[1]
        rows = zip(_plan.paths_of(params), jax.tree.leaves(params), plan, layer_traces, energies, strict=True)
        for path, w, b, trace, energy in rows:
            if b is not None:
                cost = _by_trace(0.0 if trace < 0 else trace, math.prod(jnp.shape(w)), float(energy))
                costs.setdefault(path, {})[int(b)] = cost
    return costs


class _Forms(NamedTuple):
    """values: d_l^T H d_l, an entry a leaf, 0 where not yet taken; done: products taken."""

    params: PyTree
    quantized: PyTree
    done: jax.Array
    values: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class _OneLeaf:
    """One product for each of the `chosen` leaves, with the error of that leaf alone, on the leaves that are `kept`."""

    chosen: tuple[int, ...]
    kept: tuple[bool, ...]

    def is_running(self, carry: _Forms) -> jax.Array:
        return carry.done < len(self.chosen)

    def argument(self, carry: _Forms) -> PyTree:
        leaf = jnp.array(self.chosen)[carry.done]
        errors, structure = jax.tree.flatten(_tree.subtract(carry.quantized, carry.params))
        one = [jnp.where(leaf == i, d, 0) for i, d in enumerate(errors)]
        return structure.unflatten([d if keep else None for d, keep in zip(one, self.kept, strict=True)])

    def advance(self, carry: _Forms, product: PyTree) -> _Forms:
        d = self.argument(carry)
        _check.matching_tree("operator(v)", product, d, than="v")
        form, leaf = _tree.dot(d, product), jnp.array(self.chosen)[carry.done]
        values = [jnp.where(leaf == i, form.astype(x.dtype), x) for i, x in enumerate(carry.values)]
        return carry._replace(done=carry.done + 1, values=values)


@functools.partial(jax.jit, static_argnames="spec")
def _quantized(params: PyTree, plan: list[Any], spec: QuantSpec) -> tuple[PyTree, list[jax.Array]]:
    """The quantized tree, and the energy of the error of every leaf."""
    quantized = weights.on_plan(params, plan, spec)
    errors = jax.tree.leaves(_tree.subtract(quantized, params))
    return quantized, [_tree.dot(d, d) for d in errors]


def _layer_traces(name: str, traces: PyTree, params: PyTree, plan: list[Any]) -> list[float]:
    """The trace of every leaf, NaN where it has none."""
    argument = f"{name}(traces=...)"
    kept = _kept(argument, traces, jax.tree.map(lambda _: 0.0, params))
    _check_covers(argument, kept, params, [i for i, width in enumerate(plan) if width is not None])
    rest = iter(jax.tree.leaves(traces))
    found = [next(rest) if keep else math.nan for keep in kept]
    for path, trace in zip(_plan.paths_of(params), found, strict=True):
        errors.scalar(f"{argument}[{path!r}]", trace)
    return [float(trace) for trace in found]


def _kept(argument: str, tree: PyTree, params: PyTree) -> tuple[bool, ...]:
    """Which leaves of `params` a tree has that may have None in place of some."""

    def is_none(x: Any) -> bool:
        return x is None

    has_leaf = [x is not None for x in jax.tree.leaves(params, is_leaf=is_none)]
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    if structure != jax.tree.structure(params, is_leaf=is_none):
        _check.matching_tree(argument, tree, params)
    wanted = jax.tree.leaves(params, is_leaf=is_none)
    filled = [y if x is None else x for x, y in zip(leaves, wanted, strict=True)]
    _check.matching_tree(argument, structure.unflatten(filled), params)
    return tuple(x is not None for x, is_there in zip(leaves, has_leaf, strict=True) if is_there)


def _check_covers(argument: str, kept: tuple[bool, ...], params: PyTree, chosen: Iterable[int]) -> None:
    paths = _plan.paths_of(params)
    for i in chosen:
        if not kept[i]:
            raise ArgumentError(f"`{argument}` must have every leaf that is quantized; it has no {paths[i]!r}.")


def _by_trace(trace: float, n: int, energy: float) -> float:
    return trace / n * energy / 2 if n else 0.0


def _loss(mean_loss: Callable[[PyTree], jax.typing.ArrayLike], params: PyTree) -> float:
    value: Any = mean_loss(params)
    errors.scalar("mean_loss(params)", value)
    return float(value)


def _report(report: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if report is not None:
        report(done, total)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = (values - values.mean() for values in (x, y))
    # The largest is 1, so that no square under- or overflows.
    x, y = (values / np.abs(values).max() for values in (x, y))
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]

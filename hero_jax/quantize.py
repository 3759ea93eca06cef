"""Post-training quantization of weights, simulated in floating point, and the accuracy it leaves.

Symmetric uniform quantization: with the absolute maximum m of a tensor (or of each output channel) and b bits,

    scale = m / steps(b),   code = clip(round(w / scale), lowest, highest),   w_hat = scale * code

A low-bit accuracy means nothing without the name of its grid. With L = 2^(b - 1):

    grid         steps      codes               at 2 bits, m = 1
    narrow       L - 1      -(L - 1) .. L - 1   -1, 0, 1
    full         L          -L .. L - 1         -1, -0.5, 0, 0.5              (the largest weights are clipped)
    stretched    L - 1/2    -L .. L - 1         -1.33, -0.67, 0, 0.67         (qwix and torchao)

Rounding is half to even, scales are float32, zero is a code of every grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree

PyTree = Any

GRANULARITIES = ("tensor", "channel")
GRIDS = ("narrow", "full", "stretched")
MIN_BITS, MAX_BITS = 2, 16


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Everything that decides a quantized weight besides the bit width; `name` belongs beside every number.

    Args:
      granularity: "channel" has one scale for each entry of the last axis, the output channel of Flax Dense, Conv,
        depthwise and grouped kernels; "tensor" has one scale. A leaf with fewer than two axes always has one scale.
      grid: "narrow", "full" or "stretched"; see the table at the top of this module.

    >>> QuantSpec(granularity="tensor").name
    'tensor-narrow'
    """

    granularity: str = "channel"
    grid: str = "narrow"

    def __post_init__(self) -> None:
        _check.one_of("QuantSpec(granularity=...)", self.granularity, GRANULARITIES)
        _check.one_of("QuantSpec(grid=...)", self.grid, GRIDS)

    @property
    def name(self) -> str:
        """Short name of the specification, such as "channel-narrow"."""
        return f"{self.granularity}-{self.grid}"


class QuantizedScore(NamedTuple):
    """One row of `quantize_and_evaluate`.

    bits: bit width, None for full precision.
    metrics: what `eval_fn` returned, as floats.
    fraction: fraction of the parameters that was quantized, 0 for full precision.
    spec: name of the specification.
    """

    bits: int | None
    metrics: dict[str, float]
    fraction: float
    spec: str


def fake_quantize(
    params: PyTree,
    bits: jax.typing.ArrayLike,
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Rounds weights to the grid of `spec`, keeping the tree and its types.

        w_hat = scale * clip(round(w / scale), lowest, highest),   scale = max |w| / steps(bits)

    Args:
      params: pytree of floating-point arrays.
      bits: integer in 2..16; may be traced, so that a sweep over bit widths compiles once. A traced value out of range
        gives NaN weights.
      spec: granularity and grid. Static.
      mask: bool tree, prefix of one, or callable from params to one, naming the leaves to quantize; the others pass
        through. Default: leaves with two or more axes. In most networks those are the kernels; biases of attention
        heads and of layers stacked by a scan have two axes as well: name a mask there.

    Returns:
      The tree with w_hat in place of w. A leaf (or channel) of zeros stays zero; a NaN makes its channel NaN.

    Raises:
      ValueError: `bits` outside 2..16; a mask that does not match `params` or selects nothing.
      TypeError: `bits` is not an integer; a leaf is not floating point.

    Cost: element-wise; pure, works under jit and vmap.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([[1.0, 4.0], [-0.4, 2.5]]), 3)
    Array([[ 1.        ,  4.        ],
           [-0.33333334,  2.6666667 ]], dtype=float32)

    Source: Jacob et al., Quantization and training of neural networks, CVPR 2018, section 2, with zero point 0.
    """
    _check.integer("fake_quantize(bits=...)", bits, low=MIN_BITS, high=MAX_BITS)
    chosen = _selected("fake_quantize", params, spec, mask)
    return jax.tree.map(lambda w, selected: _fake_quantize_leaf(w, bits, spec) if selected else w, params, chosen)


def quantize_and_evaluate(
    eval_fn: Callable[[PyTree], Mapping[str, Any] | jax.typing.ArrayLike],
    params: PyTree,
    bits: Iterable[int] = (8, 6, 5, 4, 3, 2),
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> list[QuantizedScore]:
    """Evaluates a network at full precision and with its weights at each bit width.

        rows = [eval_fn(w)] + [eval_fn(fake_quantize(w, b)) for b in bits]

    Args:
      eval_fn: `params -> {name: scalar}`, or one scalar, which is named "value". It may loop over a data set on the
        host; give it a jitted forward pass that takes the data as an argument: that compiles once for the whole sweep.
      params: pytree of floating-point arrays; model state, such as BatchNorm statistics, is closed over by `eval_fn`.
      bits: bit widths in 2..16, in the order of the rows.
      spec: granularity and grid.
      mask: leaves to quantize, as in `fake_quantize`.

    Returns:
      A list of `QuantizedScore`, full precision first.

    Raises:
      ValueError: a bit width outside 2..16, an empty `bits`, or what `fake_quantize` raises.

    Cost: `len(bits) + 1` evaluations; quantizing compiles once, since the bit width is traced.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[1.0], [-0.4]])
    >>> for row in quantize_and_evaluate(lambda p: {"sum": p.sum()}, w, bits=(8, 2)):
    ...     print(row.bits, round(row.metrics["sum"], 3), row.fraction, row.spec)
    None 0.6 0.0 channel-narrow
    8 0.598 1.0 channel-narrow
    2 1.0 1.0 channel-narrow
    """
    if not isinstance(bits, Iterable):
        raise TypeError(f"`quantize_and_evaluate(bits=...)` must be a sequence of bit widths; got {bits!r}.")
    widths = tuple(bits)
    if not widths:
        raise ValueError("`quantize_and_evaluate(bits=...)` must name at least one bit width; got none.")
    for width in widths:
        _check.integer("quantize_and_evaluate(bits=...)", width, low=MIN_BITS, high=MAX_BITS)
    chosen = _selected("quantize_and_evaluate", params, spec, mask)
    sizes = jax.tree.map(jnp.size, params)
    quantized = sum(jax.tree.leaves(jax.tree.map(lambda size, selected: size * selected, sizes, chosen)))
    fraction = quantized / sum(jax.tree.leaves(sizes))

    at_bits = jax.jit(lambda params, width: fake_quantize(params, width, spec, chosen))
    rows = [QuantizedScore(None, _as_floats(eval_fn(params)), 0.0, spec.name)]
    for width in widths:
        metrics = _as_floats(eval_fn(at_bits(params, width)))
        rows.append(QuantizedScore(int(width), metrics, fraction, spec.name))
    return rows


def _selected(name: str, params: PyTree, spec: QuantSpec, mask: PyTree | Callable[[PyTree], PyTree] | None) -> PyTree:
    """The mask as a tree of bools, after checking the arguments that both functions share."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"`{name}(spec=...)` must be a QuantSpec; got {_check.brief(spec)}.")
    _check.floating_tree("params", params)
    return _check.bool_tree(f"{name}(mask=...)", _tree.kernels if mask is None else mask, params)


def _fake_quantize_leaf(w: jax.Array, bits: jax.typing.ArrayLike, spec: QuantSpec) -> jax.Array:
    steps, lowest, highest = _grid(bits, spec.grid)
    values = _tree.wide(w)
    axes = tuple(range(values.ndim - 1)) if spec.granularity == "channel" and values.ndim >= 2 else None
    absmax = jnp.max(jnp.abs(values), axis=axes, keepdims=True, initial=0.0)
    scale = (absmax / steps).astype(jnp.float32)
    # max |w| so small that the scale rounds to zero: nothing to divide by, and w is zero to float32.
    safe = jnp.where(scale == 0, 1, scale).astype(values.dtype)
    codes = jnp.clip(jnp.round(values / safe), lowest, highest)
    return (codes * scale.astype(values.dtype)).astype(w.dtype)


def _grid(bits: jax.typing.ArrayLike, grid: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps from 0 to max |w|, lowest and highest code, as float32 (exact: an integer shift, no exponential).

    NaN where a traced `bits` is out of range, so that the weights say so.
    """
    bits = jnp.asarray(bits).astype(jnp.int32)
    is_valid = (bits >= MIN_BITS) & (bits <= MAX_BITS)
    half = jnp.where(is_valid, jnp.left_shift(jnp.int32(1), bits - 1).astype(jnp.float32), jnp.nan)
    if grid == "narrow":
        return half - 1, 1 - half, half - 1
    return half if grid == "full" else half - 0.5, -half, half - 1


def _as_floats(metrics: Mapping[str, Any] | jax.typing.ArrayLike) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        metrics = {"value": metrics}
    return {name: float(value) for name, value in metrics.items()}

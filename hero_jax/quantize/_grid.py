"""The arithmetic of one leaf: range -> scale and zero point -> codes -> weights.

    code = clip(round(w / scale + zero_point), lowest, highest),     w_hat = scale * (code - zero_point)

`QuantSpec` has the table of grids. Scales and zero points have as many axes as the leaf, each of a length that divides
the leaf's: (1, ..., 1, O) by channel, (..., I / n, O) by group, ones by tensor; for a stack of L layers, L of these
along the first axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree
from hero_jax.errors import ArgumentError
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS, QuantSpec

# Fractions of the largest weight that the "mse" rule tries: steps of 1/80, up to 100/80. 80/80, the "max" rule, is one.
MSE_STEP, MSE_LAST = 80, 100


def check_groups(path: str, shape: tuple[int, ...], spec: QuantSpec, is_stacked: bool) -> None:
    """Raises ArgumentError unless the groups of `spec` divide the input channels of a leaf."""
    n, layer = spec.group_size, shape[1:] if is_stacked else shape
    if n is not None and len(layer) >= 2 and math.prod(layer) and layer[-2] > n and layer[-2] % n:
        raise ArgumentError(
            f"`QuantSpec(group_size=...)` must divide the input channels of every leaf, or exceed them; got {n} for"
            f" {path!r} of shape {shape}."
        )


def levels(bits: jax.typing.ArrayLike, spec: QuantSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps that divide the range, lowest and highest code, as float32 (exact: an integer shift, no exponential).

    NaN where a traced `bits` is out of range, so that the weights say so.
    """
    bits = jnp.asarray(bits).astype(jnp.int32)
    is_valid = (bits >= MIN_BITS) & (bits <= MAX_BITS)
    half = jnp.where(is_valid, jnp.left_shift(jnp.int32(1), bits - 1).astype(jnp.float32), jnp.nan)
    if not spec.symmetric:
        return 2 * half - 1, -half, half - 1
    if spec.grid == "narrow":
        return half - 1, 1 - half, half - 1
    return half if spec.grid == "full" else half - 0.5, -half, half - 1


def fit(
    w: jax.Array, bits: jax.typing.ArrayLike, spec: QuantSpec, is_stacked: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scale (float32) and zero point (an integer as float32) of a leaf."""
    if is_stacked:
        # Layer by layer: one operation on all of them, or a loop of XLA, would round quotients in another way.
        empty = jnp.zeros(scale_shape(w.shape, spec, is_stacked), jnp.float32)
        layers = [fit(layer, bits, spec) for layer in w]
        return jax.tree.map(lambda *x: jnp.stack(x), *layers) if layers else (empty, empty)
    view, axes = _groups(_tree.wide(w), spec)
    reduce = functools.partial(jnp.max, axis=axes, keepdims=True, initial=0.0)
    if spec.range_rule == "percentile" and w.size:
        assert spec.percentile is not None
        quantile = functools.partial(jnp.quantile, axis=axes, keepdims=True)
        high = quantile(jnp.abs(view) if spec.symmetric else view, spec.percentile / 100)
        low = -high if spec.symmetric else quantile(view, 1 - spec.percentile / 100)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    elif spec.symmetric:
        high = reduce(jnp.abs(view))
        low = -high
    else:
        low, high = -reduce(-view), reduce(view)
    if spec.range_rule == "mse":
        fraction = _least_error(view, low, high, bits, spec, axes)
        low, high = low * fraction, high * fraction
    scale, zero_point = affine(low, high, bits, spec)
    # What is not finite has no grid, and a range too large for float32 has no scale: NaN says so.
    is_finite = jnp.isfinite(view).all(axis=axes, keepdims=True) & jnp.isfinite(scale)
    scale = jnp.where(is_finite, scale, jnp.nan)
    shape = scale_shape(w.shape, spec)
    return scale.reshape(shape), zero_point.reshape(shape)


def nearest(position: jax.Array, lowest: jax.Array, highest: jax.Array) -> jax.Array:
    """The code next to a position on the grid."""
    return jnp.clip(jnp.round(position), lowest, highest)


@jax.custom_jvp
def straight_through(position: jax.Array, lowest: jax.Array, highest: jax.Array) -> jax.Array:
    """`nearest`, with the derivative 1 where it does not clip and 0 where it does."""
    return nearest(position, lowest, highest)


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    position, lowest, highest = primals
    rounded = jnp.round(position)
    is_inside = (rounded >= lowest) & (rounded <= highest)
    return jnp.clip(rounded, lowest, highest), jnp.where(is_inside, tangents[0], 0)


def encode(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    bits: jax.typing.ArrayLike,
    spec: QuantSpec,
    snap: Callable[..., jax.Array] = nearest,
) -> jax.Array:
    """The codes of a leaf, as wide floats; `snap(position, lowest, highest)` makes a code of a position."""
    values = _tree.wide(w)
    scale, zero_point = (_expand(x, w.shape).astype(values.dtype) for x in (scale, zero_point))
    return _codes(values, scale, zero_point, bits, spec, snap)


def decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """The weights of floating-point codes, in their type."""
    shape = codes.shape
    if zero_point is not None:
        codes = codes - _expand(zero_point, shape).astype(codes.dtype)
    return codes * _expand(scale, shape).astype(codes.dtype)


def _codes(
    values: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: Any, spec: QuantSpec, snap: Any
) -> jax.Array:
    _, lowest, highest = levels(bits, spec)
    # A range so small that the scale rounds to zero: nothing to divide by, and w is zero to float32.
    return snap(values / jnp.where(scale == 0, 1, scale) + zero_point, lowest, highest)


def affine(low: jax.Array, high: jax.Array, bits: Any, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of a range that holds 0."""
    steps, lowest, _ = levels(bits, spec)
    if spec.symmetric:
        scale = (high / steps).astype(jnp.float32)
        return scale, jnp.zeros_like(scale)
    scale = ((high - low) / steps).astype(jnp.float32)
    return scale, jnp.round(lowest - (low / jnp.where(scale == 0, 1, scale)).astype(jnp.float32))


def _least_error(
    view: jax.Array, low: jax.Array, high: jax.Array, bits: Any, spec: QuantSpec, axes: tuple[int, ...]
) -> jax.Array:
    """The fraction of the range [low, high] whose grid has the least sum of squared errors, for each scale."""
    # In units of the range, so that no square leaves float32.
    unit = jnp.maximum(high, -low)
    unit = jnp.where(unit > 0, unit, 1)

    def error(fraction: jax.Array) -> jax.Array:
        scale, zero_point = (x.astype(view.dtype) for x in affine(low * fraction, high * fraction, bits, spec))
        codes = _codes(view, scale, zero_point, bits, spec, nearest)
        return jnp.sum(((scale * (codes - zero_point) - view) / unit) ** 2, axis=axes, keepdims=True)

    def better(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        fraction = (jnp.asarray(i) / MSE_STEP).astype(view.dtype)
        found = error(fraction)
        return jnp.where(found < best[1], fraction, best[0]), jnp.minimum(found, best[1])

    whole = jnp.ones_like(low)
    last = MSE_LAST if spec.symmetric else MSE_STEP
    return jax.lax.fori_loop(1, last + 1, better, (whole, error(jnp.ones((), view.dtype))))[0]


def _groups(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, tuple[int, ...]]:
    """A view of a leaf, and the axes of it that share a scale."""
    if w.ndim < 2 or spec.granularity == "tensor":
        return w, tuple(range(w.ndim))
    if spec.granularity == "channel":
        return w, tuple(range(w.ndim - 1))
    groups = scale_shape(w.shape, spec)[-2]
    size = w.shape[-2] // groups if groups else 0
    return w.reshape(*w.shape[:-2], groups, size, w.shape[-1]), (w.ndim - 1,)


def scale_shape(shape: tuple[int, ...], spec: QuantSpec, is_stacked: bool = False) -> tuple[int, ...]:
    """The shape of the scales of a leaf."""
    if is_stacked:
        return (shape[0], *scale_shape(shape[1:], spec))
    if len(shape) < 2 or spec.granularity == "tensor":
        return (1,) * len(shape)
    if spec.granularity == "channel":
        return (*(1,) * (len(shape) - 1), shape[-1])
    assert spec.group_size is not None
    return (*shape[:-2], -(-shape[-2] // spec.group_size) if math.prod(shape) else 1, shape[-1])


def _expand(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales repeated over the members of their groups, so that they broadcast against a leaf of this shape."""
    if len(shape) < 2 or scale.shape[-2] in (0, 1, shape[-2]):
        return scale
    return jnp.repeat(scale, shape[-2] // scale.shape[-2], axis=-2)

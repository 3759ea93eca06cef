"""Rounding weights to a grid: in floating point (`fake_quantize`), or as integer codes (`quantize`, `dequantize`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree, errors
from hero_jax.quantize import _grid, _plan
from hero_jax.quantize.spec import QuantSpec

__all__ = ["QuantizedArray", "dequantize", "fake_quantize", "quantize", "rounding_noise"]

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero_point"], meta_fields=["bits", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A leaf as integers: w_hat = scale * (codes - zero_point), in `dtype`.

    A pytree with the fields codes, scale and zero_point.

    codes: int8 (int16 above 8 bits), in the shape of the leaf.
    scale: float32, as many axes as the leaf: ones by tensor, (1, ..., 1, O) by channel, (..., I / n, O) by group;
      (L, ...) for a stack of L layers.
    zero_point: of the type of `codes`, in the shape of `scale`; None for a symmetric grid.
    bits: bit width of the codes. Static.
    dtype: name of the type of the leaf, such as "float32". Static.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    bits: int
    dtype: str


def fake_quantize(
    params: PyTree,
    bits: PyTree,
    spec: QuantSpec = QuantSpec(),
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    straight_through: bool = False,
) -> PyTree:
    """Rounds weights to the grid of `spec`, keeping the tree and its types.

        w_hat = scale * (clip(round(w / scale + zero_point), lowest, highest) - zero_point)

    Args:
      params: pytree of floating-point arrays.
      bits: integer in 2..16; may be traced, so that a sweep over bit widths compiles once. A traced value out of range
        gives NaN weights. Or a tree of such integers, that of `params` or a prefix of it, for a width a leaf; those of
        leaves that are not quantized are ignored.
      spec: scale, grid, range, leaves and their exceptions; see `QuantSpec`. Static.
      mask: bool tree, prefix of one, or callable from params to one, naming the leaves to quantize; the others pass
        through. Default: those of `spec`, which by default are the leaves with two or more axes.
      straight_through: differentiate as if rounding were the identity: d w_hat / d w = 1 inside the range and 0 where
        w is clipped, the scale held constant. Otherwise derivatives are those of the function as it is: zero, except
        for what flows through the scale.

    Returns:
      The tree with w_hat in place of w. A leaf (or channel, or group) of zeros stays zero; a NaN or an infinity makes
      its channel NaN; a leaf without entries stays as it is.

    Raises:
      ArgumentError: `bits` outside 2..16; a mask, a pattern or a tree of bits that does not match `params` or selects
        nothing; a group size that does not divide the input channels.
      TypeError: `bits` is not an integer; a leaf is not floating point.

    Cost: element-wise; a hundred times that for range_rule "mse". Pure, works under jit, vmap and grad.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([[1.0, 4.0], [-0.4, 2.5]]), 3)
    Array([[ 1.        ,  4.        ],
           [-0.33333334,  2.6666667 ]], dtype=float32)

    Source: Jacob et al., Quantization and training of neural networks, CVPR 2018, section 2; Bengio et al., Estimating
    or propagating gradients through stochastic neurons, 2013 (straight-through).
    """
    errors.boolean("fake_quantize(straight_through=...)", straight_through)
    return on_plan(params, _plan.plan_of("fake_quantize", params, bits, spec, mask), spec, straight_through)


def quantize(
    params: PyTree,
    bits: PyTree,
    spec: QuantSpec = QuantSpec(),
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Turns weights into integer codes, scales and zero points.

    `dequantize(quantize(params, bits, spec))` is `fake_quantize(params, bits, spec)`, bit for bit where both are
    compiled with static `bits`, or neither is; otherwise to the rounding of the scale.

    Args:
      params, spec, mask: as in `fake_quantize`.
      bits: as in `fake_quantize`, but Python integers, since the type of the codes depends on them.

    Returns:
      The tree with a `QuantizedArray` in place of each leaf that is quantized. A channel with a NaN has scale NaN.

    Raises:
      As `fake_quantize`; TypeError where `bits` is traced.

    Cost: as `fake_quantize`. Pure; works under jit with static `bits`.

    >>> import jax.numpy as jnp
    >>> q = quantize({"kernel": jnp.array([[1.0, 4.0], [-0.4, 2.5]]), "bias": jnp.ones(2)}, 3)
    >>> q["kernel"].codes
    Array([[ 3,  3],
           [-1,  2]], dtype=int8)
    >>> q["kernel"].scale
    Array([[0.33333334, 1.3333334 ]], dtype=float32)
    """
    plan = _plan.static("quantize", _plan.plan_of("quantize", params, bits, spec, mask), "fake_quantize")

    def leaf(w: jax.Array, width: int, is_stacked: bool) -> QuantizedArray:
        scale, zero_point = _grid.fit(w, width, spec, is_stacked)
        return packed(w, width, spec, _grid.encode(w, scale, zero_point, width, spec), scale, zero_point)

    return _plan.map_selected(leaf, params, plan, spec)


def dequantize(tree: PyTree) -> PyTree:
    """Gives weights back: scale * (codes - zero_point) in place of each `QuantizedArray`; the rest passes through.

    Args:
      tree: what `quantize` returned, or `load`.

    Returns:
      The tree of weights, in their first types.

    >>> import jax.numpy as jnp
    >>> dequantize(quantize(jnp.array([[1.0, 4.0], [-0.4, 2.5]]), 3))
    Array([[ 1.        ,  4.        ],
           [-0.33333334,  2.6666667 ]], dtype=float32)
    """

    def leaf(q: Any) -> Any:
        if not isinstance(q, QuantizedArray):
            return q
        wide = _tree.wide_type(q.dtype)
        return _grid.decode(q.codes.astype(wide), q.scale, q.zero_point).astype(q.dtype)

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, QuantizedArray))


def rounding_noise(
    params: PyTree,
    bits: PyTree,
    key: jax.Array,
    *,
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Draws noise of the size of rounding errors, to train with: uniform within a bin of the grid.

        u = scale * U,   U ~ uniform[-1/2, 1/2) for each weight alone,   scale that of `fake_quantize(params, bits)`

    What rounding to nearest does to weights whose place in a bin is uniform. With `grad_fn = lambda p:
    jax.grad(loss_fn)(optax.tree.add(p, u))` every pass of a step is taken around the noisy weights, and any of the
    transformations sees their gradient; the weights themselves stay without noise.

    Args:
      params, bits, spec, mask: as in `fake_quantize`.
      key: of this draw: a new one each step.

    Returns:
      A tree like `params`: u, and zeros where nothing is quantized. NaN in the channels where the scale is.

    Raises:
      As `fake_quantize`.

    Cost: element-wise. Pure, works under jit and vmap; derivatives flow through the scale.

    >>> import jax, jax.numpy as jnp
    >>> w = {"kernel": jnp.array([[3.0, 0.0], [-1.0, 0.0]]), "bias": jnp.ones(2)}
    >>> u = rounding_noise(w, 3, jax.random.key(0))
    >>> [bool(jnp.all(jnp.abs(x) <= most)) for x, most in ((u["kernel"], jnp.array([0.5, 0.0])), (u["bias"], 0.0))]
    [True, True]

    Source: Baskin et al., UNIQ: uniform noise injection for non-uniform quantization of neural networks, ACM
    Transactions on Computer Systems 2021 (there with a grid of quantiles, a few layers at a time).
    """
    plan = _plan.plan_of("rounding_noise", params, bits, spec, mask)
    leaves, structure = jax.tree.flatten(params)

    def leaf(key: jax.Array, w: jax.Array, width: Any, is_stacked: bool) -> jax.Array:
        if width is None:
            return jnp.zeros_like(w)
        scale, _ = _grid.fit(w, width, spec, is_stacked)
        draw = jax.random.uniform(key, w.shape, scale.dtype, -0.5, 0.5)
        return _grid.decode(draw, scale, None).astype(w.dtype)

    keys = jax.random.split(key, len(leaves))
    stacks = _plan.stacked_leaves(params, spec)
    each = zip(keys, map(jnp.asarray, leaves), plan, stacks, strict=True)
    return structure.unflatten([leaf(*arguments) for arguments in each])


def packed(
    w: jax.Array, bits: int, spec: QuantSpec, codes: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> QuantizedArray:
    """The leaf `w` as integers, from codes and a zero point in floating point."""
    dtype = jnp.int8 if bits <= 8 else jnp.int16
    # NaN has no code; its scale is NaN and says so.
    codes, zeros = (jnp.nan_to_num(x, nan=0.0).astype(dtype) for x in (codes, zero_point))
    return QuantizedArray(codes, scale, None if spec.symmetric else zeros, bits, w.dtype.name)


def on_plan(params: PyTree, plan: list[Any], spec: QuantSpec, straight_through: bool = False) -> PyTree:
    """`fake_quantize` with the bit width of every leaf, None where it passes through."""

    def leaf(w: jax.Array, width: Any, is_stacked: bool) -> jax.Array:
        scale, zero_point = _grid.fit(w, width, spec, is_stacked)
        if straight_through:
            scale, zero_point = jax.lax.stop_gradient((scale, zero_point))
        snap = _grid.straight_through if straight_through else _grid.nearest
        codes = _grid.encode(w, scale, zero_point, width, spec, snap)
        return _grid.decode(codes, scale, zero_point).astype(w.dtype)

    return _plan.map_selected(leaf, params, plan, spec)


def error_energy(params: PyTree, quantized: PyTree, plan: list[Any]) -> tuple[jax.Array, jax.Array]:
    """(sum of w^2, sum of (w_hat - w)^2) over the leaves whose entry of `plan` is not None."""
    before, after = (
        [x for x, width in zip(jax.tree.leaves(tree), plan, strict=True) if width is not None]
        for tree in (params, quantized)
    )
    rest = _tree.subtract(after, before)
    return _tree.dot(before, before), _tree.dot(rest, rest)

"""Rounding optimised for a layer's output: which of its two neighbours on the grid each weight goes to.

Of a layer y = W^T x with inputs x from a few batches, the mean squared error of the outputs is a quadratic form,

    E ||(W_hat - W)^T x||^2 = tr((W_hat - W)^T G (W_hat - W)),      G = E[x x^T]   (K x K, K inputs of a weight column)

so that the inputs are needed once, for G. Rounding to nearest minimises it for G = I only. The K inputs are the first
axes of a kernel: all but the last of most; in an attention the first of (inputs, heads, head_dim) and the first two of
(heads, head_dim, outputs). K itself says how many axes they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _tree, errors
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _grid, _plan, weights
from hero_jax.quantize.spec import QuantSpec

__all__ = ["optimized", "output_error", "quantized"]

PyTree = Any


def optimized(
    params: PyTree,
    bits: PyTree,
    grams: Mapping[str, jax.Array],
    spec: QuantSpec = QuantSpec(),
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    num_sweeps: int = 10,
) -> PyTree:
    """Rounds each weight up or down so that the layer's outputs change least, in place of to nearest.

        minimise tr(D^T G D), D = W_hat - W, over w_hat in {scale * floor(w / scale), scale * ceil(w / scale)}

    by coordinate descent: from the nearest codes, weight after weight takes the better of its two values given the
    others, for `num_sweeps` passes over the weights. The objective never increases. Scales and zero points are those of
    `fake_quantize`.

    Args:
      params, bits, spec, mask: as in `fake_quantize`; `bits` may be traced.
      grams: by path of a kernel ("conv/kernel"), G of shape (g, K, K): the mean of x x^T over examples and positions
        for each of the g groups of output channels (1 unless the convolution is grouped), x in the order of the
        kernel's first axes, whose product is K. For leaves that `spec.stacked` names, (L, g, K, K). Leaves without one
        are rounded to nearest. `linen.input_grams` measures them, except of stacks.
      num_sweeps: passes over the weights.

    Returns:
      The tree with the rounded weights, in the types of `params`. To keep them, take `quantized`: `quantize` would fit
      a scale to them anew, which gives the same weights only where the largest code is in use.

    Raises:
      ArgumentError: no path in `grams` is that of a quantized leaf, a matrix does not fit its kernel, or what
        `fake_quantize` raises.

    Cost: `num_sweeps + 1` products with G for each layer; no forward pass.

    Two inputs that always agree: the errors of their weights should cancel.

    >>> import jax.numpy as jnp
    >>> w = {"kernel": jnp.array([[1.0], [0.4], [0.4]])}
    >>> g = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]])
    >>> optimized(w, 2, {"kernel": g})["kernel"][:, 0]
    Array([1., 1., 0.], dtype=float32)

    Source: Nagel et al., Up or down? Adaptive rounding for post-training quantization, ICML 2020, equation 13, here
    minimised by coordinate descent on the codes in place of their continuous relaxation.
    """
    errors.integer("optimized(num_sweeps=...)", num_sweeps, low=1)
    plan = _plan.plan_of("optimized", params, bits, spec, mask)

    def leaf(w: jax.Array, entry: tuple[Any, jax.Array | None], is_stacked: bool) -> jax.Array:
        return _grid.decode(*_codes(w, *entry, spec, is_stacked, num_sweeps)).astype(w.dtype)

    return _plan.map_selected(leaf, params, _with_grams("optimized", params, plan, grams, spec), spec)


def quantized(
    params: PyTree,
    bits: PyTree,
    grams: Mapping[str, jax.Array],
    spec: QuantSpec = QuantSpec(),
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    num_sweeps: int = 10,
) -> PyTree:
    """Turns weights into the integer codes of `optimized`, with scales and zero points, as `quantize` does to nearest.

    `dequantize(quantized(...))` is `optimized(...)`, bit for bit where both are compiled with static `bits`, or neither
    is; otherwise to the rounding of the scale, which may tip a weight between its neighbours.

    Args:
      params, grams, spec, mask, num_sweeps: as in `optimized`.
      bits: as in `optimized`, but Python integers, since the type of the codes depends on them.

    Returns:
      The tree with a `QuantizedArray` in place of each leaf that is quantized, which `save` writes.

    Raises:
      As `optimized`; TypeError where `bits` is traced.

    Cost: as `optimized`.

    >>> import jax.numpy as jnp
    >>> w = {"kernel": jnp.array([[1.0], [0.4], [0.4]])}
    >>> g = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]])
    >>> quantized(w, 2, {"kernel": g})["kernel"].codes[:, 0]
    Array([1, 1, 0], dtype=int8)
    """
    errors.integer("quantized(num_sweeps=...)", num_sweeps, low=1)
    plan = _plan.static("quantized", _plan.plan_of("quantized", params, bits, spec, mask), "optimized")

    def leaf(w: jax.Array, entry: tuple[int, jax.Array | None], is_stacked: bool) -> weights.QuantizedArray:
        return weights.packed(w, entry[0], spec, *_codes(w, *entry, spec, is_stacked, num_sweeps))

    return _plan.map_selected(leaf, params, _with_grams("quantized", params, plan, grams, spec), spec)


def output_error(w: jax.Array, w_hat: jax.Array, gram: jax.Array) -> jax.Array:
    """The objective: tr((w_hat - w)^T G (w_hat - w)), summed over groups.

    Args:
      w, w_hat: a kernel, before and after; not a stack of them.
      gram: (g, K, K) as in `optimized`.

    Returns:
      A scalar: the mean over examples and positions of the squared change of the outputs, summed over channels.

    >>> import jax.numpy as jnp
    >>> output_error(jnp.array([[1.0], [0.4]]), jnp.array([[1.0], [0.0]]), jnp.diag(jnp.array([1.0, 3.0]))[None])
    Array(0.48000002, dtype=float32)
    """
    rest = _columns(_tree.wide(w_hat) - _tree.wide(w), gram)
    return jnp.einsum("gko,gkj,gjo->", rest, gram.astype(rest.dtype), rest, precision="highest")


def _codes(
    w: jax.Array, bits: Any, gram: jax.Array | None, spec: QuantSpec, is_stacked: bool, num_sweeps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes in floating point, scale and zero point of a leaf."""
    wide = _tree.wide(w)
    scale, zero_point = _grid.fit(wide, bits, spec, is_stacked)
    codes = _grid.encode(wide, scale, zero_point, bits, spec)
    if gram is None:
        return codes, scale, zero_point
    position = _grid.encode(wide, scale, zero_point, bits, spec, jnp.clip)  # not rounded
    step = jnp.broadcast_to(_grid.decode(jnp.ones_like(wide), scale, None), w.shape)
    rest = _grid.decode(codes, scale, zero_point) - wide

    def descend(gram: jax.Array, *leaves: jax.Array) -> jax.Array:
        columns = [_columns(x, gram) for x in leaves]
        codes = jax.vmap(functools.partial(_descend, num_sweeps=num_sweeps))(gram, *columns)
        return _from_columns(codes, leaves[0].shape)

    descend = jax.vmap(descend) if is_stacked else descend
    codes = descend(gram.astype(wide.dtype), step, rest, codes, jnp.floor(position), jnp.ceil(position))
    return codes, scale, zero_point


def _descend(
    gram: jax.Array,
    step: jax.Array,
    rest: jax.Array,
    codes: jax.Array,
    low: jax.Array,
    high: jax.Array,
    *,
    num_sweeps: int,
) -> jax.Array:
    """Codes (K, O) after coordinate descent; `step` is the scale of each weight, `rest` is W_hat - W."""

    def visit(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, pull = state  # pull = G (W_hat - W)
        # The unconstrained minimiser along weight i, in codes; the nearer of the two values is the better one.
        change = jnp.where((gram[i, i] > 0) & (step[i] > 0), -pull[i] / (gram[i, i] * step[i]), 0)
        new = jnp.where(codes[i] + change > (low[i] + high[i]) / 2, high[i], low[i])
        new = jnp.where(change == 0, codes[i], new)
        pull = pull + gram[:, i, None] * ((new - codes[i]) * step[i])[None]
        return codes.at[i].set(new), pull

    def sweep(_: Any, codes: jax.Array) -> jax.Array:
        # Computed anew for each sweep, so that rounding errors do not add up.
        pull = jnp.matmul(gram, rest + (codes - first) * step, precision="highest")
        return jax.lax.fori_loop(0, codes.shape[0], visit, (codes, pull))[0]

    first = codes
    return jax.lax.fori_loop(0, num_sweeps, sweep, codes)


def _columns(w: jax.Array, gram: jax.Array) -> jax.Array:
    """A kernel as (groups, K, outputs / groups); output channels of a group are neighbours."""
    groups, inputs = gram.shape[:2]
    outputs = math.prod(w.shape[_input_axes(w.shape, inputs) :])
    return w.reshape(inputs, groups, outputs // groups).transpose(1, 0, 2)


def _from_columns(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return columns.transpose(1, 0, 2).reshape(shape)


def _input_axes(shape: tuple[int, ...], inputs: int) -> int:
    """How many of a kernel's first axes make its inputs, the last never; 0 where none do."""
    return next((n for n in range(len(shape) - 1, 0, -1) if math.prod(shape[:n]) == inputs), 0)


def _with_grams(
    name: str, params: PyTree, plan: list[Any], grams: Mapping[str, jax.Array], spec: QuantSpec
) -> list[tuple[Any, jax.Array | None] | None]:
    """For each leaf its bit width and its matrix, or None; None where it passes through."""
    paths = _plan.paths_of(params)
    if not any(path in grams for path, width in zip(paths, plan, strict=True) if width is not None):
        raise ArgumentError(f"`{name}(grams=...)` must have a path that is quantized; got {sorted(grams)[:3]}.")
    stacks = _plan.stacked_leaves(params, spec)
    for path, w, width, is_stacked in zip(paths, jax.tree.leaves(params), plan, stacks, strict=True):
        if width is not None and path in grams:
            _check_gram(name, path, grams[path], w, is_stacked)
    return [None if width is None else (width, grams.get(path)) for path, width in zip(paths, plan, strict=True)]


def _check_gram(name: str, path: str, gram: jax.Array, w: jax.Array, is_stacked: bool) -> None:
    stack, shape = (w.shape[:1], w.shape[1:]) if is_stacked else ((), w.shape)
    each = gram.shape[len(stack) :]
    # Only the last axis has groups: K is then all the others.
    fits = len(each) == 3 and each[1] == each[2] and _input_axes(shape, each[1]) > 0
    fits = fits and (each[0] == 1 or (math.prod(shape[:-1]) == each[1] and each[0] > 0 and shape[-1] % each[0] == 0))
    if not fits or gram.shape[: len(stack)] != stack:
        sizes = " or ".join(dict.fromkeys(str(math.prod(shape[:n])) for n in range(len(shape) - 1, 0, -1)))
        raise ArgumentError(
            f"`{name}(grams=...)[{path!r}]` must be {f'({stack[0]}, groups' if stack else '(groups'}, K, K) with K ="
            f" {sizes} and groups that divide the output channels; got {gram.shape} for a kernel of shape {w.shape}."
        )

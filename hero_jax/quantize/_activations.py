"""Rounded inputs and outputs of the layers of an ONNX graph.

    y_hat = scale * (clip(round(y / scale) + z, 0, 255) - z)      one `QuantizeLinear`, one `DequantizeLinear`

A layer is each node that multiplies by its kernel and, where that is another, the one that adds its bias. A runtime
takes `DequantizeLinear -> layer -> relu -> QuantizeLinear` for one operator on integers. Therefore what is left of a
folded BatchNorm, a shift, becomes a bias, and outputs that go nowhere but to rounded inputs are not rounded themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hero_jax import errors
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _grid, _onnx
from hero_jax.quantize.spec import QuantSpec

# What inputs and outputs of layers are rounded to, and to how many bits in a file.
SPEC, BITS = QuantSpec("tensor", "full", symmetric=False), 8
# What follows the path of a module in the key of a range of its inputs.
INPUTS = ":inputs"
# Before the path of a leaf of another collection than the parameters.
OTHER = ":"
STATS = f"{OTHER}batch_stats"
_PRODUCTS = ("Conv", "Einsum", "Gemm", "MatMul")
_SUMS = ("Add", "Conv", "Gemm")
# After these, values are still on the grid of the first input, which holds 0. onnxruntime looks past them for the pair
# behind a layer; past a Reshape it does not.
_KEEP = ("Identity", "MaxPool", "Relu", "Transpose")
# How far the factor of a folded BatchNorm is from 1: its variance is rounded.
_FOLDED = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """What `linen.quantized_activations` makes: `(variables, inputs) -> outputs`, and what it was made of."""

    apply_fn: Callable[..., Any]
    ranges: Mapping[str, Any]
    bits: Any
    run: Callable[..., Any] = dataclasses.field(repr=False)

    def __call__(self, variables: Any, inputs: Any) -> Any:
        return self.run(variables, inputs)


class Grid(NamedTuple):
    """As they are in the file: float32 and uint8, without axes."""

    scale: np.ndarray
    zero_point: np.ndarray


class _Layer(NamedTuple):
    """The names of the leaves by which a layer, or a BatchNorm, is found in the graph."""

    kernel: str
    bias: str
    mean: str

    @classmethod
    def of(cls, key: str) -> _Layer:
        """That of the key of a range."""
        path = key.removesuffix(INPUTS)
        kernel, bias, mean = (f"{path}/{name}" if path else name for name in cls._fields)
        return cls(kernel, bias, f"{STATS}/{mean}")


def grids(ranges: Mapping[str, Any]) -> dict[str, Grid]:
    """The grid of 8 bits of each range, (lowest, highest), by key; 0 alone has none."""
    made = {}
    for key, given in ranges.items():
        try:
            low, high = given
            ends = np.asarray([low, high], np.float32).reshape(2)
        except (TypeError, ValueError):
            rule = "must have ranges (lowest, highest)"
            raise ArgumentError(f"`save(apply_fn=...)` {rule}; got {errors.brief(given)} for {key!r}.") from None
        if not (np.isfinite(ends).all() and ends[0] <= 0 <= ends[1]):
            rule = "must have finite ranges that hold 0"
            raise ArgumentError(f"`save(apply_fn=...)` {rule}; got {ends[0]:g} to {ends[1]:g} for {key!r}.")
        if ends[0] == ends[1]:
            continue
        scale, zero_point = _grid.affine(jnp.asarray(ends[0]), jnp.asarray(ends[1]), BITS, SPEC)
        made[key] = Grid(np.asarray(scale), np.asarray(zero_point + 2 ** (BITS - 1)).astype(np.uint8))
    return made


def leaves(ranges: Mapping[str, Any]) -> set[str]:
    """The names of leaves that `place` looks for in the graph."""
    return {name for key in ranges for name in _Layer.of(key)}


def place(onnx: Any, graph: Any, grids: Mapping[str, Grid], values: Mapping[str, str]) -> list[str]:
    """Rounds inputs and outputs of layers to their grids; nodes have to be sorted after that.

    Args:
      grids: by key of a range.
      values: the value in the graph that is a leaf, by the name of the leaf; those of `leaves` that the network has.

    Returns:
      The keys that have a place: all but the outputs that need none.
    """
    places = {key: list(_places(graph, key, values)) for key in grids}
    for key, found in places.items():
        if not found:
            rule = "must round layers with a kernel that the graph multiplies by as it is"
            raise ArgumentError(f"`save(apply_fn=...)` {rule}; {key!r} is none.")
    inputs = {key: found for key, found in places.items() if key.endswith(INPUTS)}
    outputs = {key: [node.output[0] for node, _ in found] for key, found in places.items() if key not in inputs}
    made: dict[tuple[str, bytes], str] = {}
    for key, found in inputs.items():
        for node, i in found:
            x, grid = node.input[i], grids[key]
            same = x, grid.scale.tobytes() + grid.zero_point.tobytes()
            if same not in made:
                made[same] = f"{key}.rounded.{len(made)}"
                _pair(onnx, graph, x, made[same], key)
            node.input[i] = made[same]
    # From here on nodes go: what was found above is found again, by its output.
    _merge_shifts(onnx, graph, {value for found in outputs.values() for value in found})
    needed = [key for key, found in outputs.items() if any(_is_needed(graph, value) for value in found)]
    for key in needed:
        for value in outputs[key]:
            node = _maker(graph, value)
            node.output[list(node.output).index(value)] = f"{value}.exact"
            _pair(onnx, graph, f"{value}.exact", value, key)
    for key, grid in grids.items():
        graph.initializer.extend(map(onnx.numpy_helper.from_array, grid, _constants(key)))
    return [key for key in grids if key in inputs or key in needed]


def _places(graph: Any, key: str, values: Mapping[str, str]) -> Iterator[tuple[Any, int]]:
    """The nodes whose output is that of a layer; or those that have its inputs, and which of theirs these are."""
    layer = _Layer.of(key)
    if layer.kernel not in values:
        found = _readers(graph, values[layer.mean]) if layer.mean in values else ()
        yield from ((node, 0) for node, _ in found if node.op_type == "BatchNormalization")
    elif key.endswith(INPUTS) or layer.bias not in values:
        found = _readers(graph, values[layer.kernel])
        yield from ((node, 1 - i) for node, i in found if node.op_type in _PRODUCTS and i < 2)
    else:
        found = _readers(graph, values[layer.bias])
        yield from ((node, 0) for node, _ in found if node.op_type in _SUMS)


def _readers(graph: Any, value: str) -> Iterator[tuple[Any, int]]:
    """The nodes that compute with a value, behind those that move it, and the numbers of their inputs that it is."""
    for node in graph.node:
        for i, x in enumerate(node.input):
            if x == value and node.op_type in (*_onnx.MOVES, "Cast"):
                yield from _readers(graph, node.output[0])
            elif x == value:
                yield node, i


def _maker(graph: Any, value: str) -> Any:
    """The node whose output is a value."""
    return next((node for node in graph.node if value in node.output), None)


def _merge_shifts(onnx: Any, graph: Any, kept: set[str]) -> None:
    """Makes each BatchNorm whose factor is 1 a bias of the layer before it, unless that layer's output is in `kept`."""
    arrays = {x.name: x for x in graph.initializer}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        x, *parameters = norm.input
        node = _maker(graph, x)
        if node is None or node.op_type not in ("Conv", "Gemm") or x in kept or not set(parameters) <= set(arrays):
            continue
        scale, shift, mean, var = (onnx.numpy_helper.to_array(arrays[x]).astype(np.float64) for x in parameters)
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        read = [*(name for each in _onnx.nodes(graph) for name in each.input), *(each.name for each in graph.output)]
        is_alone = read.count(x) == 1
        if not is_alone or np.abs(scale / np.sqrt(var + epsilon) - 1).max() > _FOLDED:
            continue
        name, bias = f"{norm.output[0]}.bias", shift - mean
        if len(node.input) > 2:
            if node.input[2] not in arrays:
                continue
            bias = bias + onnx.numpy_helper.to_array(arrays[node.input[2]])
        graph.initializer.append(onnx.numpy_helper.from_array(bias.astype(np.float32), name))
        del node.input[2:]
        node.input.append(name)
        node.output[0] = norm.output[0]
        graph.node.remove(norm)


def _is_needed(graph: Any, value: str, *, is_reshaped: bool = False) -> bool:
    """Whether a value goes elsewhere than out of the graph and, not reshaped before, to rounded inputs."""
    for node in _onnx.nodes(graph):
        if value not in node.input or node.op_type == "Shape":
            continue
        if node.op_type not in (*_KEEP, *_onnx.MOVES):
            if is_reshaped or node.op_type != "QuantizeLinear":
                return True
        elif _is_needed(graph, node.output[0], is_reshaped=is_reshaped or node.op_type not in _KEEP):
            return True
    return False


def _constants(key: str) -> list[str]:
    """The names of a grid in the graph."""
    return [f"{key}.{part}" for part in Grid._fields]


def _pair(onnx: Any, graph: Any, value: str, rounded: str, key: str) -> None:
    """Makes `rounded` of `value`, by the grid of a key."""
    codes, make = f"{rounded}.codes", onnx.helper.make_node
    for operator, x, y in (("QuantizeLinear", value, codes), ("DequantizeLinear", codes, rounded)):
        graph.node.append(make(operator, [x, *_constants(key)], [y], f"{rounded}:{operator}"))

"""Integers in place of the weights of an ONNX graph: their layout, the smallest DequantizeLinear, the surgery.

A weight reaches the operator that multiplies by it through nodes that only move its entries: a Flax kernel is
(height, width, in, out), that of an ONNX `Conv` (out, in, height, width). Where it goes to one place alone, its codes
are moved once, when the file is written. With index[i] the number of the scale of entry i, moved like the codes,

    w_hat[i] = scale[index[i]] * (code[i] - zero_point[index[i]])

is one `DequantizeLinear`: with one scale; with one for each entry of an axis; or, where neither fits, with one for each
block of entries of an axis at every position of the others ("blocked").
"""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# Nodes that only move entries of their first input.
MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_INT = 2  # onnx.AttributeProto.INT


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight as integers, in one layout.

    codes, index: in its shape; the code of every entry, and the number of the scale that it has.
    scale, zero_point: one axis.
    """

    codes: np.ndarray
    index: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None

    @classmethod
    def of(cls, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None) -> Weight:
        """From the arrays of a `QuantizedArray`: scales have as many axes as codes, and are repeated over groups."""
        index = np.arange(scale.size).reshape(scale.shape)
        if codes.ndim >= 2 and scale.shape[-2] not in (1, codes.shape[-2]):
            index = np.repeat(index, codes.shape[-2] // scale.shape[-2], -2)
        index = np.broadcast_to(index, codes.shape)
        return cls(codes, index, scale.ravel(), None if zero_point is None else zero_point.ravel())


@dataclasses.dataclass(frozen=True)
class Form:
    """The inputs of a DequantizeLinear and its attributes; `axis` is None with one scale, `block` 0 where not blocked.

    scale, zero_point: no axis, one, or those of `codes`.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    axis: int | None
    block: int


def form(weight: Weight, *, is_blocked: bool = False) -> Form:
    """The DequantizeLinear of a weight that has the fewest scales; or that with blocks along its second axis."""
    axis, block, pick = _blocked(weight.index, 1) if is_blocked else _scales(weight.index)
    zero_point = None if weight.zero_point is None else weight.zero_point[pick]
    return Form(weight.codes, weight.scale[pick], zero_point, axis, block)


def _scales(index: np.ndarray) -> tuple[int | None, int, np.ndarray]:
    """The axis, the block and the numbers of the scales, in the shape that DequantizeLinear takes them."""
    if np.all(index == index.flat[0]):
        return None, 0, index.flat[0]
    for axis in range(index.ndim):
        lines = np.moveaxis(index, axis, 0).reshape(index.shape[axis], -1)
        if np.all(lines == lines[:, :1]):
            return axis, 0, lines[:, 0]
    return max((_blocked(index, axis) for axis in range(index.ndim)), key=lambda found: found[1])


def _blocked(index: np.ndarray, axis: int) -> tuple[int, int, np.ndarray]:
    """The same, with blocks of an axis."""
    block = _block(index, axis)
    return axis, block, np.take(index, range(0, index.shape[axis], block), axis)


def _block(index: np.ndarray, axis: int) -> int:
    """How many neighbors along an axis share a scale at every position: the largest divisor of its length."""
    lines = np.moveaxis(index, axis, -1)
    n = lines.shape[-1]
    for block in (b for b in range(n, 1, -1) if n % b == 0):
        blocks = lines.reshape(*lines.shape[:-1], n // block, block)
        if np.all(blocks == blocks[..., :1]):
            return block
    return 1


def settle(graph: Any, name: str, weight: Weight, constants: dict[str, np.ndarray]) -> tuple[str, Weight]:
    """Follows a weight from an input of the graph through the nodes that move it, and takes these nodes out.

    It stops where the weight has several places, or where its scales have no blocks any more. Gives the value that the
    DequantizeLinear has to be, and the weight in the layout of this value.
    """
    outputs = {x.name for x in graph.output}
    while sum(list(node.input).count(name) for node in nodes(graph)) == 1:
        node = next((node for node in graph.node if name in node.input), None)
        if node is None or node.op_type not in MOVES or not set(node.input[1:]) <= set(constants):
            break
        codes, index = (moved(x, node, constants) for x in (weight.codes, weight.index))
        other = dataclasses.replace(weight, codes=codes, index=index)
        if node.output[0] in outputs or form(other).scale.size > max(form(weight).scale.size, index.size // 2):
            break
        weight, name = other, node.output[0]
        graph.node.remove(node)
    return name, weight


class Placed(NamedTuple):
    """How a weight stands in the graph: whether a Transpose has to follow, and whether scales must have blocks."""

    weight: Weight
    is_turned: bool
    is_blocked: bool


def place(graph: Any, value: str, weight: Weight) -> Placed:
    """Turns a matrix that `x @ w` would multiply by, so that onnxruntime computes with the weights of the file.

    It takes a DequantizeLinear and a product by it for one operator, which rounds the inputs to 8 bits unless told
    otherwise, and is wrong for some codes of 2 bits (version 1.32). It does so neither for `x @ w.T`, nor where a
    Transpose stands between the two and scales are in blocks.
    """
    used = [(node, i) for node in nodes(graph) for i, x in enumerate(node.input) if x == value]
    products = [node for node, i in used if node.op_type in ("MatMul", "Gemm") and i == 1 and not _flag(node, "transB")]
    if weight.codes.ndim != 2 or not products:
        return Placed(weight, False, weight.codes.ndim == 2 and any(node.op_type == "Transpose" for node, _ in used))
    weight = dataclasses.replace(weight, codes=weight.codes.T, index=weight.index.T)
    if len(products) < len(used) or any(node.op_type != "Gemm" for node in products):
        return Placed(weight, True, True)
    for node in products:
        for attribute in [x for x in node.attribute if x.name == "transB"]:
            node.attribute.remove(attribute)
        node.attribute.add(name="transB", type=_INT, i=1)
    return Placed(weight, False, False)


def _flag(node: Any, name: str) -> bool:
    return any(x.name == name and x.i for x in node.attribute)


def moved(x: np.ndarray, node: Any, constants: dict[str, np.ndarray]) -> np.ndarray:
    """What a node of `MOVES` makes of its first input."""
    if node.op_type == "Identity":
        return x
    if node.op_type == "Transpose":
        return np.transpose(x, next((a.ints for a in node.attribute if a.name == "perm"), None))
    given = constants[node.input[1]].ravel().tolist() if len(node.input) > 1 else None
    if node.op_type == "Reshape":
        assert given is not None
        is_kept = not _flag(node, "allowzero")
        return x.reshape([x.shape[i] if is_kept and n == 0 else n for i, n in enumerate(given)])
    if node.op_type == "Squeeze":
        return np.squeeze(x, None if given is None else tuple(given))
    assert given is not None
    return np.expand_dims(x, tuple(given))


def nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, and those of the graphs inside them."""
    for node in graph.node:
        yield node
        yield from _within(node)


def _within(node: Any) -> Iterator[Any]:
    """The nodes of the graphs inside a node."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from nodes(inner)


def sort(graph: Any) -> None:
    """Puts every node behind those whose outputs it has, also in the graphs inside it."""
    body = list(graph.node)
    made = {name: i for i, node in enumerate(body) for name in node.output if name}
    sorter = graphlib.TopologicalSorter[int]()
    for i, node in enumerate(body):
        read = {name for each in (node, *_within(node)) for name in each.input}
        sorter.add(i, *sorted({made[name] for name in read if name in made} - {i}))
    order = list(sorter.static_order())
    del graph.node[:]
    graph.node.extend(body[i] for i in order)


def prune(graph: Any) -> None:
    """Takes constants out that no node has, and what is said of shapes: jax2onnx says some of another layout."""
    used = {name for node in nodes(graph) for name in node.input} | {x.name for x in graph.output}
    for x in [x for x in graph.initializer if x.name not in used]:
        graph.initializer.remove(x)
    del graph.value_info[:]

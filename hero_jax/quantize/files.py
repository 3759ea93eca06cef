"""Quantized weights on disk, in one safetensors file, and as the arrays of qwix.

For a quantized leaf at "conv/kernel" of b bits and n entries the file has

    conv/kernel.codes        uint8, ceil(n b / 8): entry i, plus 2^(b - 1), is bits i b .. i b + b - 1, lowest first
    conv/kernel.scale        float32
    conv/kernel.zero_point   int8, int16 above 8 bits; asymmetric grids only

and any other leaf as it is. The metadata has the format and its version; as JSON the `QuantSpec`, and for each leaf
bits, shape and type, {} where it is not quantized; and a SHA-256 over these and every tensor's name, type, shape and
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree, errors
from hero_jax._jax import Tracer
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _disk
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS, QuantSpec, from_fields
from hero_jax.quantize.weights import QuantizedArray

__all__ = ["from_qwix", "load", "save", "to_qwix"]

PyTree = Any

FORMAT, VERSION = "hero_jax.quantized", "1"
# Entries packed at a time, a multiple of 8: each of their bits takes a byte meanwhile.
BLOCK = 1 << 20
# safetensors' names of types. Its own NumPy reader lacks bfloat16.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
TYPES = FLOATS | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"}
TYPES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
TYPES |= {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}


def save(path: str | os.PathLike[str], tree: PyTree, spec: QuantSpec) -> None:
    """Writes what `quantize` or `rounding.quantized` gave to one safetensors file, codes in exactly their bit width.

    The file is written under another name in the same folder and then renamed: a run killed on the way, or a full
    disk, leaves an older file as it was.

    Args:
      path: the file; replaced where it exists. Its folder must exist.
      tree: nested dicts of `QuantizedArray` and other arrays; keys are strings without "/".
      spec: what that function was given.

    Raises:
      TypeError: a tree that is not nested dicts of arrays, an array whose type has no safetensors name.
      ArgumentError: a `QuantizedArray` that contradicts itself or `spec`; keys that give two tensors one name.
      ImportError: safetensors is not installed.

    Cost: the file once more in memory.

    >>> import os, tempfile
    >>> from hero_jax.quantize import quantize
    >>> q = quantize({"kernel": jnp.array([[1.0, 4.0], [-0.4, 2.5]]), "bias": jnp.ones(2)}, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "weights.safetensors"), q, QuantSpec())
    ...     tree, spec = load(os.path.join(folder, "weights.safetensors"))
    >>> tree["kernel"].codes
    Array([[ 3,  3],
           [-1,  2]], dtype=int8)
    >>> spec.name
    'channel-narrow'
    """
    safetensors = _disk.import_extra("save", "safetensors.numpy", '"hero_jax[files]"')
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"`save(spec=...)` must be a QuantSpec; got {errors.brief(spec)}.")
    if not isinstance(tree, dict):
        raise TypeError(f"`save(tree=...)` must be nested dicts; got {errors.brief(tree)}.")
    tensors, leaves = {}, {}
    for where, leaf in _flatten(tree):
        leaves[where], parts = _encode(where, leaf, spec)
        for name in parts:
            if name in tensors or name == "__metadata__":
                raise ArgumentError(f"`save(tree=...)` must give each tensor a name of its own; {name!r} is taken.")
        tensors |= parts
    # A field that is younger than the format is written where it says something: older readers do not know it.
    fields = {name: value for name, value in dataclasses.asdict(spec).items() if name != "stacked" or value}
    fields = json.dumps(fields, default=lambda x: x.item())
    metadata = {"format": FORMAT, "version": VERSION, "spec": fields, "leaves": json.dumps(leaves)}
    metadata["sha256"] = _digest(tensors, metadata)
    _disk.write(Path(path), safetensors.save(tensors, metadata))


def load(path: str | os.PathLike[str]) -> tuple[PyTree, QuantSpec]:
    """Reads a file of `save`: its codes, scales, zero points and other arrays, bit for bit, and the `QuantSpec`.

    Nothing in the file is executed: it is tensors and JSON.

    Args:
      path: the file.

    Returns:
      (tree, spec): nested dicts of `QuantizedArray` and other jax arrays, and the specification they were made by.

    Raises:
      ArgumentError: a file that is damaged, cut short, of something else, of another version, or that contradicts
        itself; arrays of 64-bit types where jax has them off.
      FileNotFoundError: no such file.
      ImportError: safetensors is not installed.

    Cost: the file once more in memory.

    >>> load("nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.safetensors'
    """
    safetensors = _disk.import_extra("load", "safetensors", '"hero_jax[files]"')
    data = Path(path).read_bytes()
    # The second line is what malformed metadata under a right checksum may lead to.
    damage = (ValueError, safetensors.SafetensorError)
    damage += (LookupError, TypeError, AttributeError, OverflowError, RecursionError)
    try:
        return _decode(data, safetensors)
    except damage as error:
        kind = "" if type(error) in (ValueError, ArgumentError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ArgumentError(
            f"`load(path=...)` must be a file of `save`; {os.fspath(path)!r}: {kind}{reason}."
        ) from None


def to_qwix(tree: PyTree) -> PyTree:
    """Turns each `QuantizedArray` of a tree into a `qwix.QArray`; the rest passes through. Works under jit.

    `qwix.dequantize` gives the weights of `dequantize`, bit for bit; those of 16-bit leaves before their last rounding.

    Args:
      tree: pytree with `QuantizedArray` leaves of at most 8 bits, or one.

    Returns:
      The tree.

    Raises:
      ArgumentError: more than 8 bits.
      ImportError: qwix is not installed.

    >>> import qwix
    >>> from hero_jax.quantize import quantize
    >>> q = to_qwix(quantize(jnp.array([[1.0, 4.0], [-0.4, 2.5]]), 3))
    >>> q.qtype, qwix.dequantize(q)
    ('int3', Array([[ 1.        ,  4.        ],
           [-0.33333334,  2.6666667 ]], dtype=float32))
    """
    qwix = _disk.import_extra("to_qwix", "qwix", "qwix")

    def leaf(where: str, q: QuantizedArray) -> Any:
        if q.bits > 8:
            raise ArgumentError(f"`to_qwix(tree=...)` must have at most 8 bits; at {where!r} it has {q.bits}.")
        qtype = {4: jnp.int4, 8: jnp.int8}.get(q.bits, f"int{q.bits}")
        stored = jnp.int4 if q.bits <= 4 else jnp.int8
        zero_point = None if q.zero_point is None else q.zero_point.astype(stored)
        # qwix multiplies in the type of the scale, `dequantize` in this one.
        scale = q.scale.astype(_tree.wide_type(q.dtype))
        return qwix.QArray(q.codes.astype(stored), scale, zero_point, qtype)

    return _map(leaf, tree, QuantizedArray)


def from_qwix(tree: PyTree, dtype: Any = None) -> PyTree:
    """Turns each `qwix.QArray` of a tree into a `QuantizedArray`; the rest passes through. Works under jit.

    Args:
      tree: pytree with `qwix.QArray` leaves of types int2 to int8, or one. Scales become float32.
      dtype: type of the weights that `dequantize` gives. Default: that of each scale, as for `qwix.dequantize`.

    Returns:
      The tree.

    Raises:
      ArgumentError: a type that is not an integer of 2..8 bits, such as nf4; tiles along an axis other than the input
        channels (the last but one).
      TypeError: `dtype` is not a floating-point type.
      ImportError: qwix is not installed.

    >>> import qwix
    >>> from_qwix(qwix.quantize(jnp.array([[1.0, 3.5], [-0.4, 2.5]]), "int3", channelwise_axes=(1,))).codes
    Array([[ 3,  3],
           [-1,  2]], dtype=int8)
    """
    qwix = _disk.import_extra("from_qwix", "qwix", "qwix")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`from_qwix(dtype=...)` must be a floating-point type; got {errors.brief(dtype)}.")

    def leaf(where: str, q: Any) -> QuantizedArray:
        qtype = q.qtype if isinstance(q.qtype, str) else jnp.dtype(q.qtype).name
        if not re.fullmatch("int[2-8]", qtype):
            raise ArgumentError(f"`from_qwix(tree=...)` must be of type int2 to int8; at {where!r} it is {qtype}.")
        zeros = None if q.zero_point is None else q.zero_point.astype(jnp.int8)
        name = jnp.dtype(q.scale.dtype if dtype is None else dtype).name
        scale = q.scale.astype(jnp.float32)
        made = QuantizedArray(q.qvalue.astype(jnp.int8), scale, zeros, int(qtype[3:]), name)
        if fault := contradiction(made, zeros is None):
            raise ArgumentError(
                f"`from_qwix(tree=...)` must have scales by input channel; at {where!r} it has {fault}."
            )
        return made

    return _map(leaf, tree, qwix.QArray)


def _flatten(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of nested dicts; an empty dict in them counts as a leaf."""
    if not isinstance(node, dict) or (path and not node):
        yield path, node
        return
    for key, child in node.items():
        if not isinstance(key, str) or not key or "/" in key:
            rule = "must have keys that are strings without '/'"
            raise TypeError(f"`save(tree=...)` {rule}; at {path!r} it has {errors.brief(key)}.")
        yield from _flatten(child, f"{path}/{key}" if path else key)


def _encode(where: str, leaf: Any, spec: QuantSpec) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """The entry of a leaf in the metadata (None for an empty dict), and its tensors."""
    if isinstance(leaf, dict):
        return None, {}
    if not isinstance(leaf, QuantizedArray):
        return {}, {where: _numpy(where, leaf)}
    errors.integer(f"save(tree=...)[{where!r}].bits", leaf.bits, low=MIN_BITS, high=MAX_BITS)
    parts = {"codes": leaf.codes, "scale": leaf.scale, "zero_point": leaf.zero_point}
    parts = {name: _numpy(where, x) for name, x in parts.items() if x is not None}
    fault = contradiction(leaf, spec.symmetric)
    if not fault and np.any((parts["codes"].astype(np.int32) + 2 ** (leaf.bits - 1)) >> leaf.bits):
        fault = f"codes that need more than {leaf.bits} bits"
    if fault:
        raise ArgumentError(f"`save(tree=...)` must be what `quantize` gave for `spec`; at {where!r} it has {fault}.")
    entry = {"bits": int(leaf.bits), "shape": leaf.codes.shape, "dtype": leaf.dtype}
    parts["codes"] = _pack(parts["codes"], leaf.bits)
    return entry, {f"{where}.{name}": x for name, x in parts.items()}


def _decode(data: bytes, safetensors: Any) -> tuple[PyTree, QuantSpec]:
    """The tree and specification of a file's bytes."""
    found = safetensors.deserialize(data)
    # It has checked the header, but keeps the metadata for itself.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ArgumentError("it is a safetensors file of something else")
    if metadata.get("version") != VERSION:
        raise ArgumentError(f"it has version {metadata.get('version')!r}; this hero_jax reads {VERSION!r}")
    tensors = {n: np.frombuffer(v["data"], jnp.dtype(TYPES[v["dtype"]])).reshape(v["shape"]) for n, v in found}
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise ArgumentError("its checksum does not match; it is damaged")
    if jnp.result_type(float) != jnp.float64:
        for name in [n for n, x in tensors.items() if x.dtype.name in ("float64", "int64", "uint64")]:
            raise ArgumentError(f"{name!r} has {tensors[name].dtype}, which needs jax_enable_x64")
    spec, leaves = from_fields(json.loads(metadata["spec"])), json.loads(metadata["leaves"])
    tree = {}
    for where, entry in leaves.items():
        *folders, last = where.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = {} if entry is None else _leaf(where, entry, tensors, spec)
    if {where for where, _ in _flatten(tree)} != set(leaves):
        raise ArgumentError("it has leaves inside leaves")
    if tensors:
        raise ArgumentError(f"it has a tensor of no leaf, {next(iter(tensors))!r}")
    return jax.tree.map(jnp.asarray, tree), spec


def _leaf(where: str, entry: dict[str, Any], tensors: dict[str, np.ndarray], spec: QuantSpec) -> Any:
    """The leaf of an entry of the metadata, in NumPy; takes its tensors out of `tensors`."""
    names = [where] if not entry else [f"{where}.codes", f"{where}.scale"]
    names += [f"{where}.zero_point"] if entry and not spec.symmetric else []
    for name in names:
        if name not in tensors:
            raise ArgumentError(f"it lacks the tensor {name!r}")
    first, *rest = (tensors.pop(name) for name in names)
    if not entry:
        return first
    bits, shape = entry["bits"], entry["shape"]
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ArgumentError(f"{where!r} has {bits!r} bits, not {MIN_BITS}..{MAX_BITS}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ArgumentError(f"{where!r} has no shape but {shape!r}")
    n = math.prod(shape)
    if first.dtype != np.uint8 or first.shape != (-(-n * bits // 8),):
        raise ArgumentError(f"{where!r} has codes of {first.nbytes} bytes; {n} of {bits} bits are due")
    parts: Any = (_unpack(first, n, bits).reshape(shape), *rest, *([None] if spec.symmetric else []))
    q = QuantizedArray(*parts, bits=bits, dtype=entry["dtype"])
    if fault := contradiction(q, spec.symmetric):
        raise ArgumentError(f"{where!r} has {fault}")
    return q


def contradiction(q: QuantizedArray, is_symmetric: bool) -> str:
    """What of the types and shapes of a leaf contradicts the rest of it, or "". Its arrays may be traced."""
    shape, scale, zeros, whole = q.codes.shape, q.scale.shape, q.zero_point, "int8" if q.bits <= 8 else "int16"
    if (zeros is None) != is_symmetric:
        return f"{'no ' if zeros is None else ''}zero points on {'a ' if is_symmetric else 'an a'}symmetric grid"
    if (q.codes.dtype.name, q.scale.dtype.name) != (whole, "float32") or q.dtype not in FLOATS.values():
        return f"{q.codes.dtype.name} codes, {q.scale.dtype.name} scales and {q.dtype} weights at {q.bits} bits"
    # `dequantize` repeats scales along the last axis but one and broadcasts them along the others.
    fits = [s in (1, n) for n, s in zip(shape, scale, strict=False)]
    if len(shape) >= 2 and len(scale) == len(shape):
        fits[-2] |= scale[-2] > 0 and shape[-2] % scale[-2] == 0
    if len(scale) != len(shape) or not all(fits):
        return f"scales of shape {scale}, which does not divide {shape}"
    if zeros is not None and (zeros.shape, zeros.dtype.name) != (scale, whole):
        return f"{zeros.dtype.name} zero points of shape {zeros.shape} for scales of shape {scale}"
    return ""


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes as a stream of `bits` bits each."""
    parts = [np.zeros(0, np.uint8)]
    for i in range(0, codes.size, BLOCK):
        block = (codes.ravel()[i : i + BLOCK].astype(np.int32) + 2 ** (bits - 1)).astype("<u2")
        kept = np.unpackbits(block.view(np.uint8).reshape(-1, 2), axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(kept, bitorder="little"))
    return np.concatenate(parts)


def _unpack(stream: np.ndarray, n: int, bits: int) -> np.ndarray:
    """The n codes of a stream."""
    codes = np.empty(n, np.int8 if bits <= 8 else np.int16)
    for i in range(0, n, BLOCK):
        m = min(BLOCK, n - i)
        kept = np.unpackbits(stream[i * bits // 8 :][: 2 * m], count=m * bits, bitorder="little").reshape(m, bits)
        block = np.packbits(np.pad(kept, ((0, 0), (0, 16 - bits))), axis=1, bitorder="little").view("<u2")[:, 0]
        codes[i : i + m] = block.astype(np.int32) - 2 ** (bits - 1)
    return codes


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 of the metadata but itself, and the names, types, shapes and bytes of the tensors."""
    names = sorted(tensors)
    heads = [[name, tensors[name].dtype.name, *tensors[name].shape] for name in names]
    digest = hashlib.sha256(json.dumps([{**metadata, "sha256": ""}, heads], sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _numpy(where: str, x: Any) -> np.ndarray:
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(x, Tracer)
    if not is_array or x.dtype.name not in TYPES.values():
        got = x.dtype.name if is_array else errors.brief(x)
        raise TypeError(f"`save(tree=...)` must hold arrays of floats, integers or bools; at {where!r} it has {got}.")
    return np.asarray(x, jnp.dtype(x.dtype.name), order="C")


def _map(function: Callable[[str, Any], Any], tree: PyTree, kind: type) -> PyTree:
    """A tree with function(path, node) for its nodes of one kind."""

    def leaf(path: Any, x: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), x) if isinstance(x, kind) else x

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda x: isinstance(x, kind))

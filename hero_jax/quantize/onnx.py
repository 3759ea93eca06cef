"""Networks with quantized weights as ONNX files, which other programs run.

`jax2onnx` turns the network into a graph in floating point; each quantized weight in it becomes

    w_hat = (codes - zero_point) * scale          one `DequantizeLinear` node, and a `Cast` where it has 16 bits

with codes of 2, 4, 8 or 16 bits in the file: exactly the weights of `dequantize`. Whoever runs the file decides whether
they stay integers in memory. The metadata has the format and its version; as JSON the `QuantSpec` and what became of
each leaf; and a SHA-256 of the file.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import errors
from hero_jax._jax import jaxprs_in_params
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _activations, _disk, _onnx, _plan, files
from hero_jax.quantize.spec import QuantSpec, from_fields
from hero_jax.quantize.weights import QuantizedArray, quantize

__all__ = ["Constant", "Contents", "Leaf", "Saved", "inspect", "save"]

PyTree = Any

FORMAT, VERSION = "hero_jax.onnx", "1"
# Bits of the integers of ONNX, and the version of its operators that has them all; int2 came later.
STORAGE, OPSET, OPSET_INT2 = (2, 4, 8, 16), 21, 25
WEIGHTS = ("float32", "float16", "bfloat16")
INSTALL = '"hero_jax[onnx]"'
# As long as the digest that takes its place, and nothing that weights would be by chance.
_NO_DIGEST = "SHA-256 of this file with these sixty-four characters in it.".ljust(64, ".")
_CONVERTS = "a network that jax2onnx converts"


class Leaf(NamedTuple):
    """What became of a quantized leaf.

    bits: its bit width.
    type: of the codes in the file, such as "int4"; unsigned for an asymmetric grid.
    num_scales: how many there are; some more than once where ONNX cannot express them otherwise, or where onnxruntime
      would take the product by the leaf for another one.
    num_bytes: codes, scales and zero points in the file.
    shape: that of the leaf in JAX.
    """

    bits: int
    type: str
    num_scales: int
    num_bytes: int
    shape: tuple[int, ...]


class Saved(NamedTuple):
    """What `save` wrote.

    num_bytes: size of the file.
    opset: version of the operators that it needs: 21, or 25 with codes of 2 bits.
    quantized: {path: Leaf}.
    in_float: {path: bytes} of the other leaves of the tree that is quantized; the graph may have them merged.
    activations: the ranges of inputs and outputs that are rounded, by the keys of `linen.activation_ranges`.
    """

    num_bytes: int
    opset: int
    quantized: dict[str, Leaf]
    in_float: dict[str, int]
    activations: dict[str, tuple[float, float]]


class Constant(NamedTuple):
    """A constant of a file that is no part of a quantized leaf: its type ("float32"), shape, and bytes in the file."""

    type: str
    shape: tuple[int, ...]
    num_bytes: int


class Contents(NamedTuple):
    """What is in a file of `save`.

    spec: the `QuantSpec`; None where nothing is quantized.
    quantized: {path: Leaf}, as `save` gave them.
    others: {name in the graph: Constant}.
    activations: the ranges of inputs and outputs that are rounded to 8 bits, as `save` gave them.
    """

    spec: QuantSpec | None
    quantized: dict[str, Leaf]
    others: dict[str, Constant]
    activations: dict[str, tuple[float, float]]


def save(
    path: str | os.PathLike[str],
    apply_fn: Callable[..., Any],
    variables: PyTree,
    example: Any,
    *,
    bits: PyTree | None,
    spec: QuantSpec = QuantSpec(),
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    storage: Sequence[int] = STORAGE,
) -> Saved:
    """Writes a network with quantized weights to an ONNX file.

    Its outputs are those of `apply_fn` with the weights of `fake_quantize(params, bits, spec)`, up to the rounding of
    sums in another order. The first axis of inputs and outputs is the batch and has any length.

    Inputs and outputs of layers that `apply_fn` rounds (`linen.quantized_activations`) are rounded in the file where
    that is of use; what is returned says which. The outputs are then those of the network that rounds these, but where
    another order of a sum moves a value over the middle between two levels. For a runtime to compute with integers,
    round inputs and outputs, and fold BatchNorm first.

    Args:
      path: the file, which must not exist; its folder must.
      apply_fn: `apply_fn(variables, inputs)`, in evaluation mode, gives an array or a tuple of arrays. Any function of
        JAX whose operations jax2onnx knows: Linen, NNX, Equinox or plain. What `linen.quantized_activations` made, with
        8 bits: its inputs and outputs of layers are rounded. Codes of weights are then of 8 bits without a sign, for
        any `bits` up to 8 and any grid: with signed ones x86 processors without VNNI instructions overflow. Every
        product with a layer's kernel is taken for the layer. Left as they are: outputs that go to rounded inputs alone,
        directly or through relu and max pooling, or out of the network; and what was 0 throughout.
      variables: its first argument. What is quantized is `variables["params"]` where there is such an entry, else all
        of it; `bits`, `mask` and the patterns of `spec` are of that tree.
      example: inputs of one batch, of which shape and type matter: an array or `jax.ShapeDtypeStruct`, or a tuple of
        them for `apply_fn(variables, *inputs)`.
      bits: as in `quantize`. None: the tree has `QuantizedArray` leaves already, of `quantize` or
        `rounding.quantized`, or none, for a file in floating point.
      spec, mask: as in `quantize`; with `bits=None`, what that function was given.
      storage: bit widths that integers of the file may have. A leaf takes the smallest that holds its codes: 3 bits
        take 4. For a runtime without integers of 2 bits: `(4, 8, 16)`.

    Returns:
      `Saved`.

    Raises:
      ArgumentError: what `quantize` raises; a weight that does not appear in the graph (named), is not finite, or whose
        codes no integer of `storage` holds; a network that jax2onnx cannot convert, with the operation and the layer;
        a range that is not finite, or of a layer that the graph does not have or whose kernel it first computes with.
      TypeError: quantized weights of a type other than float32, float16 and bfloat16.
      FileExistsError: something is at `path`. FileNotFoundError: its folder is not there.
      ImportError: jax2onnx or onnx is not installed.

    Cost: the first call in a process about ten seconds, since jax2onnx is imported, later ones a few; the file three
    times in memory. ONNX has files of at most 2 GiB.

    >>> import os, tempfile
    >>> import onnxruntime
    >>> params = {"kernel": jnp.array([[3.0, -1.5], [1.2, 0.4]]), "bias": jnp.ones(2)}
    >>> apply_fn = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "network.onnx")
    ...     saved = save(file, apply_fn, params, jnp.ones((1, 2)), bits=3)
    ...     session = onnxruntime.InferenceSession(file)
    ...     session.run(None, {"input": np.eye(2, dtype=np.float32)})[0]
    array([[ 4. , -0.5],
           [ 2. ,  1.5]], dtype=float32)
    >>> saved.quantized
    {'kernel': Leaf(bits=3, type='int4', num_scales=2, num_bytes=10, shape=(2, 2))}

    Source: Open Neural Network Exchange, operators, `DequantizeLinear` (versions 21 and 25).
    """
    path = Path(path)
    onnx = _disk.import_extra("save", "onnx", INSTALL)
    jax2onnx = _disk.import_extra("save", "jax2onnx", INSTALL)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"`save(path=...)` must be a new file; there is something at {os.fspath(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`save(path=...)` must be in a folder that exists; got {os.fspath(path)!r}.")
    if not isinstance(storage, Sequence) or not storage or any(width not in STORAGE for width in storage):
        raise ArgumentError(f"`save(storage=...)` must be some of {STORAGE}; got {errors.brief(storage)}.")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"`save(spec=...)` must be a QuantSpec; got {errors.brief(spec)}.")
    has_params = isinstance(variables, Mapping) and "params" in variables
    params = variables["params"] if has_params else variables
    if bits is not None:
        params = quantize(params, bits, spec, mask=mask)
    elif mask is not None:
        raise ArgumentError("`save(mask=...)` must be left out with bits=None, where nothing is rounded.")
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_quantized)
    names = [name or "weights" for name in _plan.paths_of(jax.tree.unflatten(structure, [0] * len(leaves)))]
    weights = {name: q for name, q in zip(names, leaves, strict=True) if _is_quantized(q)}
    ranges: Mapping[str, Any] = {}
    if isinstance(apply_fn, _activations.Rounded):
        if not isinstance(apply_fn.bits, (int, np.integer)) or apply_fn.bits != _activations.BITS:
            got = errors.brief(apply_fn.bits)
            raise ArgumentError(f"`save(apply_fn=...)` must round activations to 8 bits, or not at all; got {got}.")
        apply_fn, ranges = apply_fn.apply_fn, apply_fn.ranges
    grids = _activations.grids(ranges)
    kinds = {name: _kind(name, q, spec, storage, is_integer=bool(grids)) for name, q in weights.items()}
    others = {name: x for name, x in variables.items() if name != "params"} if has_params else {}
    rest, rest_structure = jax.tree.flatten(others)
    named = [*zip(names, leaves, strict=True)]
    named += [(_activations.OTHER + name, x) for name, x in zip(_plan.paths_of(others), rest, strict=True)]
    if twice := [name for name, n in collections.Counter(name for name, _ in named).items() if n > 1]:
        raise ArgumentError(f"`save(variables=...)` must have leaves of different paths; two are {twice[0]!r}.")
    _check_finite(named)
    sought = _activations.leaves(grids)
    inner = weights | {name: x for name, x in named if name in sought and name not in weights}

    kind: Any = type(variables)

    def apply(inputs: Sequence[Any], given: Sequence[Any]) -> Any:
        its = dict(zip(inner, given, strict=True))
        values = [its.get(name, x) for name, x in named]
        tree = structure.unflatten(values[: len(leaves)])
        stats = rest_structure.unflatten(values[len(leaves) :])
        return apply_fn(kind({**stats, "params": tree}) if has_params else tree, *inputs)

    inputs = example if isinstance(example, tuple) else (example,)
    opset = OPSET_INT2 if any(kind.endswith("int2") for kind in kinds.values()) else OPSET
    model = _converted(jax2onnx, apply, inputs, inner, opset)
    quantized, values = _put(onnx, model.graph, weights, kinds, is_integer=bool(grids))
    values |= _keep(onnx, model.graph, {name: x for name, x in inner.items() if name not in weights})
    rounded = _activations.place(onnx, model.graph, grids, values) if grids else []
    _onnx.sort(model.graph)
    _onnx.prune(model.graph)
    placed = {key: (float(ranges[key][0]), float(ranges[key][1])) for key in rounded}
    entries = {name: {"bits": q.bits, "shape": q.codes.shape} for name, q in weights.items()}
    fields = {"spec": dataclasses.asdict(spec) if weights else None, "leaves": entries, "activations": placed}
    data = _bytes(onnx, model, opset, {name: json.dumps(x, default=lambda x: x.item()) for name, x in fields.items()})
    _disk.write(path, data)
    in_float = {name: np.asarray(x).nbytes for name, x in zip(names, leaves, strict=True) if name not in weights}
    return Saved(len(data), opset, quantized, in_float, placed)


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Lists what is in a file of `save`.

    Args:
      path: the file.

    Returns:
      `Contents`.

    Raises:
      ArgumentError: a file that is damaged, cut short, of something else, or of another version.
      FileNotFoundError: no such file.
      ImportError: onnx is not installed.

    >>> inspect("nowhere.onnx")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.onnx'
    """
    onnx = _disk.import_extra("inspect", "onnx", INSTALL)
    data = Path(path).read_bytes()
    try:
        return _contents(onnx, data)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = _reason(error).removeprefix("ArgumentError: ")
        raise ArgumentError(f"`inspect(path=...)` must be a file of `save`; {os.fspath(path)!r}: {reason}.") from None


def _input(name: str) -> str:
    """The input of the graph that a weight is at first."""
    return f"{name}.weights"


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _kind(name: str, q: QuantizedArray, spec: QuantSpec, storage: Sequence[int], *, is_integer: bool) -> str:
    """The type of a leaf's codes in the file; raises where the leaf has none, or contradicts itself.

    is_integer: the layer is to be computed with integers.
    """
    if not q.codes.size:
        raise ArgumentError(f"`save(variables=...)` must have entries; {name!r} has none: leave it out by `mask`.")
    if fault := files.contradiction(q, spec.symmetric):
        raise ArgumentError(f"`save(spec=...)` must be what the leaves were made by; {name!r} has {fault}.")
    if q.dtype not in WEIGHTS:
        raise TypeError(f"`save(variables=...)` must have weights of {', '.join(WEIGHTS)}; {name!r} has {q.dtype}.")
    fits = [width for width in sorted(storage) if width >= q.bits and (width == _activations.BITS or not is_integer)]
    if not fits and is_integer:
        rule = "must have 8 bits, and weights at most 8, where activations are rounded"
        raise ArgumentError(f"`save(storage=...)` {rule}; got {q.bits} bits at {name!r} and {tuple(storage)}.")
    if not fits:
        rule = "must have integers that hold the codes of every leaf"
        raise ArgumentError(f"`save(storage=...)` {rule}; got {tuple(storage)} and {q.bits} bits at {name!r}.")
    return f"{'u' if is_integer or not spec.symmetric else ''}int{fits[0]}"


def _check_finite(leaves: Iterable[tuple[str, Any]]) -> None:
    for name, x in leaves:
        values = np.asarray(x.scale if _is_quantized(x) else x)
        if jnp.issubdtype(values.dtype, jnp.floating) and not np.isfinite(values.astype(np.float64)).all():
            path = name.removeprefix(_activations.OTHER)
            raise ArgumentError(f"`save(variables=...)` must be finite; {path!r} has a NaN or an infinity.")


def _converted(
    jax2onnx: Any, apply: Callable[..., Any], inputs: tuple[Any, ...], inner: Mapping[str, Any], opset: int
) -> Any:
    """The network as an ONNX model whose inputs are its inputs and, by their paths, some of its leaves."""
    shapes = [jax.ShapeDtypeStruct((x.codes if _is_quantized(x) else x).shape, x.dtype) for x in inner.values()]
    for x in inputs:
        if not getattr(x, "shape", ()):
            raise ArgumentError(f"`save(example=...)` must have a first axis, the batch; got {errors.brief(x)}.")
    like = [jax.ShapeDtypeStruct(x.shape, jnp.result_type(x.dtype)) for x in inputs]
    # What is wrong without any conversion is raised as it is.
    outputs = jax.tree.leaves(jax.eval_shape(apply, like, shapes))
    symbolic = [jax.ShapeDtypeStruct(("batch", *x.shape[1:]), x.dtype) for x in like]

    def flat(*args: Any) -> Any:
        return tuple(jax.tree.leaves(apply(args[: len(inputs)], args[len(inputs) :])))

    def named(kind: str, n: int) -> list[str]:
        return [kind] if n == 1 else [f"{kind}_{i}" for i in range(n)]

    try:
        with _quiet():
            return jax2onnx.to_onnx(
                flat,
                [*symbolic, *shapes],
                model_name="hero_jax",
                opset=opset,
                input_names=[*named("input", len(inputs)), *map(_input, inner)],
                output_names=named("output", len(outputs)),
            )
    except Exception as error:
        reason = _reason(error)
        unknown = re.search(r"No plugins registered for primitive '([^']+)'", reason)
        if unknown:
            layer = _layer(jax.make_jaxpr(apply)(like, shapes).jaxpr, unknown[1])
            reason = f"jax2onnx has no {unknown[1]!r}" + (f", which {layer!r} calls" if layer else "")
        raise ArgumentError(f"`save(apply_fn=...)` must be {_CONVERTS}; {reason}.") from error


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind."""
    first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {first}".removesuffix(".")


def _layer(jaxpr: Any, primitive: str) -> str:
    """The name of the first scope, such as a Linen module, in which an operation is called, or ""."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive and str(equation.source_info.name_stack):
            return str(equation.source_info.name_stack)
        for inner in jaxprs_in_params(equation.params):
            if found := _layer(inner, primitive):
                return found
    return ""


def _put(
    onnx: Any, graph: Any, weights: dict[str, QuantizedArray], kinds: dict[str, str], *, is_integer: bool
) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Puts integers in the place of the weights among the inputs of a graph.

    Gives what they are, and the values in the graph that the weights are now.
    """
    made, values, head = {}, {}, []
    # Shapes and axes, not weights.
    whole = [x for x in graph.initializer if x.data_type == onnx.TensorProto.INT64]
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in whole}
    for name, q in weights.items():
        if not any(_input(name) in node.input for node in _onnx.nodes(graph)):
            rule = "must use every quantized weight (or leave it out by `mask`)"
            raise ArgumentError(f"`save(apply_fn=...)` {rule}; {name!r} has no place in the graph.")
        value, weight = _onnx.settle(graph, _input(name), _weight(q, kinds[name], is_integer=is_integer), constants)
        weight, is_turned, is_blocked = _onnx.place(graph, value, weight)
        form = _onnx.form(weight, is_blocked=is_blocked)
        parts = _tensors(onnx, name, q, kinds[name], form)
        graph.initializer.extend(parts)
        options = {} if form.axis is None else {"axis": form.axis}
        options |= {"block_size": form.block} if form.block else {}
        steps = [("DequantizeLinear", options)]
        steps += [] if q.dtype == "float32" else [("Cast", {"to": getattr(onnx.TensorProto, q.dtype.upper())})]
        steps += [("Transpose", {"perm": (1, 0)})] if is_turned else []
        inputs = [part.name for part in parts]
        for i, (operator, attributes) in enumerate(steps):
            output = value if i == len(steps) - 1 else f"{name}.{operator}"
            head.append(onnx.helper.make_node(operator, inputs, [output], f"{name}:{operator}", **attributes))
            inputs = [output]
        made[name] = Leaf(q.bits, kinds[name], form.scale.size, sum(len(x.raw_data) for x in parts), q.codes.shape)
        values[name] = value
    _drop_inputs(graph, weights)
    graph.node.extend(head)
    return made, values


def _weight(q: QuantizedArray, kind: str, *, is_integer: bool) -> _onnx.Weight:
    """A leaf with the codes that the file has.

    Without a sign they are moved up. For a layer that is computed with integers they are as long as their type, which
    leaves the weights as they are: a runtime rounds the bias to multiples of the product of scales.
    """
    codes, scale = np.asarray(q.codes, np.int32), np.asarray(q.scale)
    zeros = None if q.zero_point is None else np.asarray(q.zero_point, np.int32)
    if kind.startswith("u"):
        up = 2 ** (q.bits - 1)
        codes, zeros = codes + up, np.full(scale.shape, up, np.int32) if zeros is None else zeros + up
    if is_integer and zeros is not None:
        by = 2 ** (_activations.BITS - q.bits)
        codes, zeros, scale = codes * by, zeros * by, scale / np.float32(by)
    return _onnx.Weight.of(codes, scale, zeros)


def _tensors(onnx: Any, name: str, q: QuantizedArray, kind: str, form: _onnx.Form) -> list[Any]:
    """Codes, scales and zero points of a leaf as constants of the graph."""
    parts = {"codes": form.codes, "scale": form.scale}
    parts |= {} if form.zero_point is None else {"zero_point": form.zero_point}
    made = []
    for part, x in parts.items():
        stored = np.asarray(x).astype(np.float32 if part == "scale" else np.dtype(jnp.dtype(kind)))
        if part != "scale" and np.any(stored.astype(np.int32) != x):
            rule = f"must have codes and zero points of {q.bits} bits"
            raise ArgumentError(f"`save(variables=...)` {rule}; {name!r} has others.")
        made.append(onnx.numpy_helper.from_array(stored, f"{name}.{part}"))
    return made


def _keep(onnx: Any, graph: Any, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Makes constants of leaves in floating point among the inputs of a graph, and gives the values that they are."""
    for name, x in leaves.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(x), _input(name)))
    _drop_inputs(graph, leaves)
    return {name: _input(name) for name in leaves}


def _drop_inputs(graph: Any, names: Iterable[str]) -> None:
    dropped = set(map(_input, names))
    for x in [x for x in graph.input if x.name in dropped]:
        graph.input.remove(x)


def _bytes(onnx: Any, model: Any, opset: int, metadata: dict[str, str]) -> bytes:
    """The file of a model."""
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.producer_name = "hero_jax"
    metadata = {"format": FORMAT, "version": VERSION, **metadata, "sha256": _NO_DIGEST}
    onnx.helper.set_model_props(model, {f"hero_jax.{name}": x for name, x in metadata.items()})
    try:
        # The types of what jax2onnx made may contradict each other, in 16 bits above all.
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ArgumentError(f"`save(apply_fn=...)` must be {_CONVERTS}; its graph: {_reason(error)}.") from error
    data = model.SerializeToString()
    return data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _contents(onnx: Any, data: bytes) -> Contents:
    """What `inspect` gives, of a file's bytes; the error says what is wrong with them."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise ArgumentError("it is damaged, or no ONNX file") from error
    found = {x.key.removeprefix("hero_jax."): x.value for x in model.metadata_props}
    if found.get("format") != FORMAT:
        raise ArgumentError("it is of something else")
    if found.get("version") != VERSION:
        raise ArgumentError(f"it has version {found.get('version')!r}; this hero_jax reads {VERSION!r}")
    digest = found.get("sha256", "")
    if hashlib.sha256(data.replace(digest.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != digest:
        raise ArgumentError("its checksum does not match; it is damaged")
    constants = {
        x.name: Constant(onnx.helper.tensor_dtype_to_np_dtype(x.data_type).name, tuple(x.dims), len(x.raw_data))
        for x in model.graph.initializer
    }
    fields, quantized = json.loads(found["spec"]), {}
    for name, entry in json.loads(found["leaves"]).items():
        names = [f"{name}.{part}" for part in ("codes", "scale", "zero_point") if f"{name}.{part}" in constants]
        codes, scale, *_ = parts = [constants.pop(each) for each in names]
        size = sum(part.num_bytes for part in parts)
        quantized[name] = Leaf(entry["bits"], codes.type, math.prod(scale.shape), size, tuple(entry["shape"]))
    activations = {key: (low, high) for key, (low, high) in json.loads(found.get("activations", "{}")).items()}
    for key in activations:
        for part in _activations.Grid._fields:
            constants.pop(f"{key}.{part}", None)
    return Contents(None if fields is None else from_fields(fields), quantized, constants, activations)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the shapes that onnx_ir says it leaves out, and the calls of jax2onnx that are deprecated."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)

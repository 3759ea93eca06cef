"""A saved run as ONNX files: written at each bit width, run by onnxruntime, compared with the same weights in JAX."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from typing_extensions import TypedDict

from experiments.config.fields import Bits, Checked, Count, check_once, number
from experiments.measure import saved
from experiments.measure.saved import Saved
from experiments.storage import environment, files, records
from experiments.training import compiled
from hero_jax import quantize
from hero_jax.errors import ArgumentError
from hero_jax.quantize import linen, rounding

PyTree = Any
# The option of onnxruntime to unpack weights once, when a file is opened, instead of at every call.
UNPACKED = ("session.disable_quant_qdq", "1")


@dataclasses.dataclass(frozen=True)
class ExportConfig(Checked):
    """What to write."""

    bits: tuple[Bits, ...] = (8, 4, 2)
    """Bit widths of the weights, a file each, beside one in floating point."""
    spec: str = "channel-narrow"
    """Name of a quantizer: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    step: Literal["nearest", "rounding"] = "nearest"
    """Round to nearest, or so that the outputs of each layer change least."""
    activations: Literal["float32", "int8"] = "float32"
    """int8: round inputs and outputs of the layers too, to ranges on training images, with BatchNorm folded; codes of
    weights then have 8 bits in the file."""
    calibration: Count = 512
    """Training images for the rounding and the ranges."""
    storage: tuple[Literal[2, 4, 8, 16], ...] = (2, 4, 8, 16)
    """Widths that integers in the files may have; 4 8 16 for a runtime without int2."""
    images: Count | Literal["all"] = "all"
    """Compare on this many test images of the data set, the first ones; also where the run was evaluated on some."""
    threads: Count = 1
    """Threads of onnxruntime."""
    repeats: Count = 50
    """Timed calls of one image, in turn over all files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "storage"):
            if not getattr(self, name):
                raise ArgumentError(f"`{name}` must name at least one.")
            check_once(name, getattr(self, name))
        quantize.named(self.spec)
        if self.activations == "int8" and (max(self.bits) > 8 or 8 not in self.storage):
            got = f"bits {self.bits} and storage {self.storage}"
            raise ArgumentError(f"`activations` int8 needs `bits` of at most 8, and 8 in `storage`; got {got}.")


class Exported(TypedDict):
    """A file: sizes in bytes, accuracies as fractions, times in milliseconds.

    bits: None in floating point; types: of the codes, such as "int4"; coded: share of the parameters that are codes.
    code_bytes: codes, scales and zero points; ideal_bytes: codes of exactly `bits` bits, other weights as they are.
    difference: the largest between logits of onnxruntime and of JAX, in units of the largest logit.
    flipped: images of which the two predict another class.
    ms, ms_unpacked: median for one image, as files are opened by default and with weights unpacked then.
    """

    bits: int | None
    file: str
    types: str
    coded: float
    num_bytes: int
    code_bytes: int
    ideal_bytes: float
    accuracy: float
    jax_accuracy: float
    difference: float
    flipped: int
    ms: float
    ms_unpacked: float


@records.schema
class ExportRecord(TypedDict):
    """export.json."""

    config: dict[str, Any]
    run: str
    images: int
    onnxruntime: str
    rows: list[Exported]
    environment: environment.Part


def runtime() -> Any:
    """onnxruntime; raises ImportError that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('`experiments.export` needs onnxruntime: pip install "hero_jax[onnx]"') from error
    return onnxruntime


def export(config: ExportConfig, run: Saved, out: Path, report: compiled.Report) -> list[Exported]:
    """Writes a file in floating point and one a bit width into a folder, and measures each."""
    test = run.test.first(number(config.images))
    batches = saved.batched(test.images)
    variables, network = _calibrated(config, run)
    coded = _quantizer(config, run, variables)

    @jax.jit
    def in_jax(ranges: Any, variables: PyTree, images: Any) -> Any:
        return linen.quantized_activations(run.trainer.forward, ranges, 8)(variables, images)

    rows, sessions = [], []
    for bits in (None, *config.bits):
        path = out / ("float32.onnx" if bits is None else f"bits-{bits}.onnx")
        line = functools.partial(report, path.name)
        line(0, len(batches) + 1)
        params = variables["params"] if bits is None else coded(bits)
        with files.on_disk(path):
            written = quantize.onnx.save(
                path,
                run.trainer.forward if bits is None else network,
                variables | {"params": params},
                jax.ShapeDtypeStruct((1, *test.shape), test.images.dtype),
                bits=None,
                spec=quantize.named(config.spec),
                storage=config.storage,
            )
        opened, given = _opened(path, config.threads), variables | {"params": quantize.dequantize(params)}
        sessions += [opened, _opened(path, config.threads, UNPACKED)]
        theirs, ours = [], []
        for i, images in enumerate(batches):
            theirs.append(opened.run(None, {"input": images})[0])
            ours.append(np.asarray(in_jax(written.activations, given, images)))
            line(i + 2, len(batches) + 1)
        measured = _compared(np.concatenate(theirs), np.concatenate(ours), test.labels)
        rows.append({"bits": bits, "file": path.name, **_sizes(written), **measured})
    times = _milliseconds(sessions, test.images[:1], config.repeats, report)
    for row, ms, ms_unpacked in zip(rows, times[::2], times[1::2], strict=True):
        row |= {"ms": ms, "ms_unpacked": ms_unpacked}
    return rows


def _calibrated(config: ExportConfig, run: Saved) -> tuple[PyTree, Callable[..., Any]]:
    """The variables that are quantized, and the network that is written with them."""
    forward, variables = run.trainer.forward, run.variables
    if config.activations == "float32":
        return variables, forward
    batches = saved.batched(run.train.images)
    pairs = linen.batch_norm_pairs(forward, variables, batches[0])
    variables = linen.fold_batch_norm(variables, pairs)
    ranges = linen.activation_ranges(forward, variables, batches, pairs=pairs, inputs=True)
    return variables, linen.quantized_activations(forward, ranges, 8)


def _quantizer(config: ExportConfig, run: Saved, variables: PyTree) -> Callable[[int], PyTree]:
    """The codes of the network at a bit width."""
    params, spec = variables["params"], quantize.named(config.spec)
    if config.step == "nearest":
        return lambda bits: quantize.quantize(params, bits, spec)
    grams = linen.input_grams(run.trainer.forward, variables, saved.batched(run.train.images))
    return lambda bits: rounding.quantized(params, bits, grams, spec)


def _opened(path: Path, threads: int, *settings: tuple[str, str]) -> Any:
    """A file, ready to run."""
    options = runtime().SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    for setting in settings:
        options.add_session_config_entry(*setting)
    return runtime().InferenceSession(path, options)


def _sizes(written: quantize.onnx.Saved) -> dict[str, Any]:
    leaves, in_float = written.quantized.values(), sum(written.in_float.values())
    codes = sum(math.prod(x.shape) for x in leaves)
    return {
        "types": ", ".join(sorted({leaf.type for leaf in leaves})) or "float32",
        "coded": codes / (codes + in_float / 4),
        "num_bytes": written.num_bytes,
        "code_bytes": sum(leaf.num_bytes for leaf in leaves),
        "ideal_bytes": in_float + sum(math.prod(x.shape) * x.bits / 8 for x in leaves),
    }


def _compared(theirs: np.ndarray, ours: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Logits of onnxruntime against those of JAX."""
    found, expected = theirs.argmax(1), ours.argmax(1)
    return {
        "accuracy": float(np.mean(found == labels)),
        "jax_accuracy": float(np.mean(expected == labels)),
        "difference": float(np.abs(theirs - ours).max() / np.abs(ours).max()),
        "flipped": int(np.sum(found != expected)),
    }


def _milliseconds(sessions: Sequence[Any], image: np.ndarray, repeats: int, report: compiled.Report) -> list[float]:
    """The median time of a call of each file, in turn."""
    times: list[list[float]] = [[] for _ in sessions]
    for i in range(repeats + 1):
        for session, own in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {"input": image})
            own.append(1000 * (time.perf_counter() - started))
        report("timing", i + 1, repeats + 1)
    # The first call of each allocates.
    return [statistics.median(own[1:]) for own in times]


def listed(path: Path) -> tuple[str, list[list[str]]]:
    """What a file of `quantize.onnx.save` or `quantize.save` has: its specification, and a line for every tensor.

    A line: leaf, range of a rounded input or output, or constant; type, bits, shape, scales, bytes.
    """
    rows: list[tuple[str, str, int | None, Sequence[int], int | None, int]] = []
    if path.suffix == ".safetensors":
        tree, spec = quantize.load(path)
        for at, x in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, quantize.QuantizedArray)):
            name = jax.tree_util.keystr(at, simple=True, separator="/")
            if isinstance(x, quantize.QuantizedArray):
                # In the file codes take their bit width.
                sizes = -(-x.codes.size * x.bits // 8), *(y.nbytes for y in jax.tree.leaves((x.scale, x.zero_point)))
                rows.append((name, f"packed {x.bits} bit", x.bits, x.codes.shape, x.scale.size, sum(sizes)))
            else:
                rows.append((name, x.dtype.name, None, x.shape, None, x.nbytes))
    else:
        found = quantize.onnx.inspect(path)
        spec = found.spec
        rows += [(name, x.type, x.bits, x.shape, x.num_scales, x.num_bytes) for name, x in found.quantized.items()]
        rows += [(name, f"{low:.4g} to {high:.4g}", 8, (), 1, 5) for name, (low, high) in found.activations.items()]
        rows += [(name, x.type, None, x.shape, None, x.num_bytes) for name, x in found.others.items()]
    lines = [
        [name, kind, str(bits or ""), " x ".join(map(str, shape)), f"{scales:,}" if scales else "", f"{num_bytes:,}"]
        for name, kind, bits, shape, scales, num_bytes in rows
    ]
    return "floating point" if spec is None else spec.name, lines

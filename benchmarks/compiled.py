"""What a training step becomes on devices that this machine lacks: `python -m benchmarks.compiled --target h100`.

Compiles the trainer's own step (`experiments.training.compiled`) of each method for a target without running it, and
counts what is in the scheduled program. XLA's compilers for GPUs and TPUs need no device, but a package each: an error
names it. Several devices share the batch, by `jit` or as `--parallel` says, and with `--shard-params` parameters and
optimizer state too. Sizes are those of one device.

A target is a name of TARGETS or KIND:TOPOLOGY: `h100:1x4x8` is one partition of four hosts with eight GPUs each, and
`v6e:16x16` the TPUs of that topology, as `jax.experimental.topologies` names it.

kernels: instructions that start work on the device: a fusion (which may hold many operations), a call of a library
(convolutions and matrix products of cuDNN and cuBLAS), or another operation that computes. Not counted: parameters,
constants, tuples and their elements, bitcasts, what waits for an asynchronous operation, and what has a column of its
own, copies and collectives. The bodies of loops, the branches of conditionals and called computations are counted once,
whatever the number of their turns; their instructions are kernels of the program, while `while`, `conditional` and
`call` themselves are not. A library may start several kernels in one call: the count is a lower bound.

collectives: by kind, with the bytes of the whole arrays that they reduce or gather. `gradients` is the bytes of all
collectives in those of the parameters: data parallelism needs one for each gradient that is averaged.

arguments: parameters, optimizer state, batch, and a data set that is held in memory, which lies on every device.

floors: the time that a step cannot be shorter than, of chips whose peaks are known (CHIPS): operations by the peak of
bfloat16, traffic with the memory by its bandwidth, and what collectives send by that of all links of a chip: the bytes
once to gather or to scatter them, twice for an all-reduce, which does both.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from rich import box
from rich.table import Table

from experiments import cli, data
from experiments.config import METHODS, PARALLEL, TrainConfig, resolve
from experiments.data import catalog
from experiments.data.records import STREAM_SIDE
from experiments.storage import claims, environment, records
from experiments.training import compiled
from hero_jax import errors

# XLA's description of one device (`GpuTargetConfigProto`), by NVIDIA's data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# A GPU's topology is partitions x hosts x devices.
TARGETS = {
    "h100": "h100:1x1x1",
    "h100x8": "h100:1x1x8",
    "h100x2x8": "h100:1x2x8",
    "v5e-256": "v5e:16x16",
    "v5p-512": "v5p:8x8x8",
}


class Chip(NamedTuple):
    """Peaks of a chip: bfloat16 in Tflop/s, memory and, in one direction, all links in GB/s."""

    teraflops: float
    memory_gb: float
    links_gb: float


# By `device_kind`; Google's pages of the two (cloud.google.com/tpu/docs), in November 2026.
CHIPS = {"TPU v5 lite": Chip(197, 819, 200), "TPU v5": Chip(459, 2765, 600)}
# Of the data sets, the number of training images and the shape of one.
SHAPES = {
    "cifar10": (50_000, 32, 32, 3),
    "cifar100": (50_000, 32, 32, 3),
    "fashion_mnist": (60_000, 28, 28, 1),
    "imagenette": (9_469, STREAM_SIDE, STREAM_SIDE, 3),
    "imagenet2012": (1_281_167, STREAM_SIDE, STREAM_SIDE, 3),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that start nothing.
SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
CALLS = {"while", "conditional", "call", "async-start"}
CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv|= \S+ convolution\(')
# What XLA calls the types of arrays, with their bytes; others (tokens, say) are none.
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    target: str = "h100"
    """h100, h100x8, h100x2x8, v5e-256, v5p-512, or KIND:TOPOLOGY (h100:1x4x8, v6e:16x16): devices, which need not be
    here."""
    methods: tuple[str, ...] = ("sam", "msam", "grad_l1", "hero")
    """Methods, as `experiments.train` names them, with its settings for the data set; SGD, the unit, is always among
    them."""
    dataset: str = "cifar10"
    """Whose shapes the step has; nothing is read. imagenet2012 is streamed, in 224 x 224."""
    model: str | None = None
    """A name in hero_jax.models; by default that of the data set."""
    batch_size: int | None = None
    """Images a step, on all devices together; by default that of the data set."""
    parallel: str = "jit"
    """jit, shard_map or pmap, of several devices; one has none."""
    shard_params: bool = False
    """Split parameters and optimizer state over the devices."""
    shard_devices: int | Literal["all"] = "all"
    """Neighbours that share a copy with `--shard-params`; h100x2x8 with 8: a copy on each host."""
    remat: bool = False
    """Compute again in backward passes what a step would keep."""
    dtype: str = "float32"
    """Type of computation, float32 or bfloat16."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for name in self.methods:
            errors.one_of("methods", name, METHODS)
        errors.one_of("dataset", self.dataset, SHAPES)
        errors.one_of("parallel", self.parallel, PARALLEL[1:])

    def config(self, method: str, num_devices: int) -> TrainConfig:
        """The run of a method."""
        layout: dict[str, Any] = {} if num_devices == 1 else {"parallel": self.parallel}
        names = ("model", "batch_size", "shard_params", "shard_devices", "remat", "dtype")
        return resolve(method, self.dataset, **layout, **{name: getattr(self, name) for name in names})


def devices_of(target: str) -> list[Any]:
    """The devices of a target, a name of TARGETS or KIND:TOPOLOGY, to compile for."""
    kind, _, topology = TARGETS.get(target, target).partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", topology) or not re.fullmatch(r"h100|v\d\w*", kind):
        known = ", ".join(TARGETS)
        raise ValueError(f"`target` must be one of {known}, or like h100:1x4x8 or v6e:16x16; got {target!r}.")
    if kind == "h100":
        # Of the version of jaxlib; `jax[tpu]` knows the number of libtpu.
        module, package = "jax_cuda13_plugin", f"jax-cuda13-plugin=={importlib.metadata.version('jaxlib')}"
        options: dict[str, Any] = {"platform": "cuda", "topology_name": kind, "topology": topology}
        options["target_config"] = H100
    else:
        module, package = "libtpu", f"jax[tpu]=={jax.__version__}"
        options = {"platform": "tpu", "topology_name": f"{kind}:{topology}"}
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the cloud for half a minute
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"`target` {target} needs XLA's compiler for it: pip install {package}")
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`target` must be a topology that XLA knows; got {target!r} ({reason}).") from error


def shapes_of(name: str) -> data.Dataset:
    """A data set of the shapes of one that tensorflow-datasets prepares, without its images."""
    about, shape = catalog.DATASETS[name], SHAPES[name]
    zeros = np.broadcast_to(np.int32(0), shape[0])  # which take no memory
    if about.is_large:
        split: Any = data.Stream(None, name, shape[1], zeros, zeros, about.num_classes)
    else:
        split = data.Split(np.broadcast_to(np.uint8(0), shape), zeros)
    return data.Dataset(split, split, about.num_classes, about.pixels)


def lower(arguments: Arguments, method: str, devices: list[Any]) -> tuple[jax.stages.Lowered, int]:
    """The trainer's step of a method, lowered for these devices, and the bytes of its parameters."""
    config = arguments.config(method, len(devices))
    trainer = compiled.build(config, shapes_of(arguments.dataset), devices)
    lowered = trainer.lower()
    state = lowered.args_info[0][0]
    return lowered, sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.params))


def counts(program: str) -> dict[str, Any]:
    """Kernels, those of them that are convolutions, copies, and collectives by kind, in a scheduled program's text.

    A kind of collectives has {"count", "bytes"}, the bytes of the whole arrays: what one gives, or of a reduce-scatter
    what it takes.
    """
    found = collections.Counter(kernels=0, convolutions=0, copies=0)
    collectives: dict[str, dict[str, int]] = {}
    computations = _computations(program)
    pending, seen = ["ENTRY"], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        types: dict[str, str] = {}
        for line in computations[name]:
            defined, kind, operation = _instruction(line)
            types[defined] = kind
            collective = operation.removesuffix("-start")
            if operation in CALLS:
                called = re.findall(r"(?:body|condition|to_apply|calls|\w+_computation)=(%[\w.\-]+)", line)
                branches = re.findall(r"branch_computations=\{([^}]*)\}", line)
                pending += called + [name.strip() for group in branches for name in group.split(",")]
            elif collective in COLLECTIVES:
                of_kind = collectives.setdefault(collective, {"count": 0, "bytes": 0})
                operands = re.findall(r"%[\w.\-]+", line[line.index(f" {operation}(") :].partition(")")[0])
                taken = sum(_size(types.get(operand, "")) for operand in operands)
                # A start has what it takes in its type, beside what it gives, but that of an all-reduce.
                given = _size(kind) - (taken if operation != collective and collective != "all-reduce" else 0)
                of_kind["count"] += 1
                of_kind["bytes"] += max(taken, given)
            elif operation in ("copy", "copy-start"):
                found["copies"] += 1
            elif operation not in SILENT and not operation.endswith(("-done", "-update")):
                found["kernels"] += 1
                found["convolutions"] += bool(CONVOLUTION.search(line))
    return {**found, "collectives": collectives}


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; those of the entry by "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?(%[\w.\-]+) .*\{$", line)
        if header:
            lines = found["ENTRY" if header[1] else header[2]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _instruction(line: str) -> tuple[str, str, str]:
    """The name of an instruction, its type, and its operation: the word before the bracket of its operands."""
    # A type is one word, or a tuple of types in brackets.
    match = re.search(r"(%[\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
    return (match[1], match[2], match[3]) if match else ("", "", "parameter")


def _size(kind: str) -> int:
    """The bytes of the arrays in a type."""
    arrays = ARRAY.findall(kind)
    return sum(_width(name) * math.prod(int(n) for n in shape.split(",") if n) for name, shape in arrays)


def _width(name: str) -> int:
    """The bytes of an entry of an array; of less than 8 bits, one."""
    return {"pred": 1, "c64": 8}.get(name) or max(1, int(re.sub(r"\D", "", name)) // 8)


def measure(arguments: Arguments, devices: list[Any]) -> list[dict[str, Any]]:
    """One row a method: what is counted in its program, memory and operations, compile seconds, kernels in SGD's."""
    rows: list[dict[str, Any]] = []
    methods = ["sgd", *(name for name in arguments.methods if name != "sgd")]
    for name in methods:
        lowered, of_parameters = lower(arguments, name, devices)
        started = time.perf_counter()
        program: Any = lowered.compile()
        seconds = time.perf_counter() - started
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        counted = counts(program.as_text())
        moved = sum(of_kind["bytes"] for of_kind in counted["collectives"].values())
        row = {
            "method": name,
            **counted,
            "gradients": moved / of_parameters,
            "parameters_mib": of_parameters / 2**20,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "argument_mib": memory.argument_size_in_bytes / 2**20,
            "gigaflops": cost["flops"] / 1e9 if "flops" in cost else None,
            "moved_mib": cost["bytes accessed"] / 2**20 if "bytes accessed" in cost else None,
            "compile_seconds": seconds,
        }
        row["floors_ms"] = floors(devices[0].device_kind, row)
        first = (rows or [row])[0]
        ratios = {f"{key}_ratio": row[key] / first[key] for key in ("kernels", "temporary_mib") if first[key]}
        rows.append(row | ratios)
    return rows


def floors(kind: str, row: dict[str, Any]) -> dict[str, float] | None:
    """The floors of a row in ms: "arithmetic", "memory" and "links"; None of another chip than those of CHIPS."""
    chip = CHIPS.get(kind)
    if chip is None or row["gigaflops"] is None or row["moved_mib"] is None:
        return None
    sent = sum((2 if name == "all-reduce" else 1) * found["bytes"] for name, found in row["collectives"].items())
    return {
        "arithmetic": row["gigaflops"] / chip.teraflops,
        "memory": row["moved_mib"] * 2**20 / chip.memory_gb / 1e6,
        "links": sent / chip.links_gb / 1e6,
    }


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table of the rows; the bytes of collectives are in MiB."""

    def collectives(row: dict[str, Any]) -> str:
        kinds = sorted(row["collectives"].items())
        return ", ".join(f"{of_kind['count']} {kind} {of_kind['bytes'] / 2**20:.1f}" for kind, of_kind in kinds)

    formats: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "kernels": lambda row: str(row["kernels"]),
        "x SGD": lambda row: f"{row['kernels_ratio']:.2f}",
        "conv": lambda row: str(row["convolutions"]),
        "copies": lambda row: str(row["copies"]),
        "temp": lambda row: f"{row['temporary_mib']:.1f}",
        "x SGD's": lambda row: f"{row['temporary_mib_ratio']:.2f}" if "temporary_mib_ratio" in row else "",
        "args": lambda row: f"{row['argument_mib']:.1f}",
        "compile": lambda row: f"{row['compile_seconds']:.0f}",
        "Gflop": lambda row: "" if row["gigaflops"] is None else f"{row['gigaflops']:.1f}",
        "moved": lambda row: "" if row["moved_mib"] is None else f"{row['moved_mib']:,.0f}",
        **{
            f"{name} ms": lambda row, name=name: f"{row['floors_ms'][name]:.2f}" if row.get("floors_ms") else ""
            for name in ("arithmetic", "memory", "links")
        },
        "gradients": lambda row: f"{row['gradients']:.2f}" if row["collectives"] else "",
        "collectives": collectives,
    }
    return list(formats), [[show(row) for show in formats.values()] for row in rows]


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """The rows as they are printed, in two parts; columns that no row has a figure for are left out."""
    header, lines = cells(rows)
    columns = [(name, column) for name, *column in zip(header, *lines, strict=True) if any(column)]
    split = [name for name, _ in columns].index("compile") + 1
    drawn = []
    for part in (columns[:split], [columns[0], *columns[split:]]):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name, _ in part:
            is_text = name in ("method", "collectives")
            table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "collectives")
        for line in zip(*(column for _, column in part), strict=True):
            table.add_row(*line)
        drawn.append(table)
    return drawn if len(columns) > split else drawn[:1]


def network(record: dict[str, Any]) -> str:
    """The network of a record, and its batch."""
    config = Arguments(**record["arguments"]).config("sgd", record["device"]["count"])
    low = ", bfloat16" * (config.layout.dtype == "bfloat16")
    return f"{config.task.model}, batch {config.budget.batch_size:,}{low}"


def layout(record: dict[str, Any]) -> str:
    """How the step of a record lies on its devices."""
    arguments = record["arguments"]
    where = "one device" if record["device"]["count"] == 1 else arguments["parallel"]
    sharing = arguments.get("shard_devices", "all")  # not in older records
    split = ", split" + f" over {sharing}" * (sharing != "all")
    return where + split * arguments["shard_params"] + ", remat" * arguments["remat"]


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints what the step of every method is compiled to for the target; with `--out`, writes the record too."""
    devices = devices_of(arguments.target)
    config = arguments.config("sgd", len(devices))
    record: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    record["device"] = {"kind": devices[0].device_kind, "count": len(devices)}
    record["rows"] = measure(arguments, devices)
    for table in tables(record["rows"]):
        cli.console.print(table)
    cli.console.print(
        f"One training step of {config.task.model} on {arguments.dataset} in {arguments.dtype}, batch"
        f" {config.budget.batch_size}, compiled for {devices[0].device_kind} x {len(devices)} ({layout(record)}) and"
        " not run. Temporary memory, arguments, traffic with the memory (moved) and collectives in MiB of one device,"
        " compile in seconds; ms: floors by the peaks of the chip; gradients: the bytes of collectives in those of the"
        f" parameters. jax {jax.__version__}."
    )
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

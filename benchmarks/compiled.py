"""What a training step becomes on a device that this machine lacks: `python -m benchmarks.compiled --target h100`.

Compiles the step of `benchmarks.step_cost` for the target without running it, and counts what is in the scheduled
program. A small network on a GPU is bound by the number of kernels, since each takes some microseconds to start. With
several devices the step is data parallel under `jit`: the batch is split, and with `--split-params` every parameter
too. Sizes are those of one device.

A kernel is an instruction of the entry computation that starts work on the device: a fusion (which may hold many
operations), a call of a library (convolutions and matrix products of cuDNN and cuBLAS), or another operation that
computes or copies. Not counted: parameters, constants, tuples and their elements, bitcasts, what waits for an
asynchronous operation, and collectives, which have a column of their own. The bodies of loops, the branches of
conditionals and called computations are counted once, whatever the number of their turns; their instructions are
kernels of the program, while `while`, `conditional` and `call` themselves are not. Copies, which no fusion took up,
have a column of their own too. A library may start several kernels in one call: the count is a lower bound.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

from benchmarks import step_cost
from experiments import cli
from experiments.config import DTYPES
from experiments.storage import claims, environment, records
from hero_jax import errors, models

PyTree = Any
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


class Target(NamedTuple):
    """Devices to compile for: the arguments of `topologies.get_topology_desc`, and what brings their compiler."""

    platform: str
    topology_name: str
    options: dict[str, Any]
    module: str
    package: str


def _h100(topology: str) -> Target:
    """`topology` is partitions x hosts x devices."""
    options = {"topology": topology, "target_config": H100}
    return Target("cuda", "h100", options, "jax_cuda13_plugin", "jax-cuda13-plugin")


TARGETS = {"h100": _h100("1x1x1"), "h100x8": _h100("1x1x8")}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that start nothing.
SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
CALLS = {"while", "conditional", "call", "async-start"}
CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv|= \S+ convolution\(')


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile."""

    target: str = "h100"
    """h100 or h100x8: the devices, which need not be here."""
    methods: tuple[str, ...] = ("sam", "hero detached")
    """Methods, as `benchmarks.step_cost` names them; SGD, the unit, is always among them."""
    model: str = "resnet20"
    """A name in hero_jax.models."""
    dtype: str = "float32"
    """Type of computation, float32 or bfloat16."""
    batch_size: int = 128
    """Images a step, on all devices together."""
    image_size: int = 32
    """Height and width."""
    split_params: bool = False
    """Split each parameter over the devices, along its first axis that they divide."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        errors.one_of("target", self.target, TARGETS)
        for name in self.methods:
            errors.one_of("methods", name, step_cost.METHODS)
        errors.one_of("model", self.model, models.MODELS)
        errors.one_of("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "image_size"):
            errors.integer(name, getattr(self, name), low=1)


def mesh_of(name: str) -> Mesh:
    """The devices of a target, along one axis."""
    target = TARGETS[name]
    if importlib.util.find_spec(target.module) is None:
        version = importlib.metadata.version("jaxlib")
        raise ValueError(f"`target` {name} needs XLA's compiler for it: pip install {target.package}=={version}")
    topology = topologies.get_topology_desc(
        platform=target.platform, topology_name=target.topology_name, **target.options
    )
    return Mesh(np.array(topology.devices), ("data",))


def lower(arguments: Arguments, method: str, mesh: Mesh) -> jax.stages.Lowered:
    """The step of `benchmarks.step_cost` of one method, lowered for the devices of `mesh`; nothing is computed."""
    asked = step_cost.Arguments(model=arguments.model, image_size=arguments.image_size)
    arrays: Any = jax.eval_shape(lambda: step_cost.problem(asked, arguments.dtype, arguments.batch_size)[1:])
    params, batch_stats, *batch = arrays
    grad_fn = step_cost.gradient_function(models.create(arguments.model, 10, dtype=np.dtype(arguments.dtype)))
    init, step = step_cost.training_step(grad_fn, step_cost.METHODS[method])
    state = (params, batch_stats, jax.eval_shape(init, params))

    def placed(x: jax.ShapeDtypeStruct, is_split: bool) -> jax.ShapeDtypeStruct:
        divided = [i for i, n in enumerate(x.shape) if is_split and n % mesh.size == 0][:1]
        spec = PartitionSpec(*["data" if i in divided else None for i in range(len(x.shape))])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(lambda x: placed(x, arguments.split_params), state)
    return step.lower(state, *(placed(x, True) for x in batch))


def counts(program: str) -> dict[str, Any]:
    """Kernels, those of them that are convolutions, copies, and collectives by kind, in a scheduled program's text."""
    found, collectives = collections.Counter(kernels=0, convolutions=0, copies=0), collections.Counter()
    computations = _computations(program)
    pending, seen = ["ENTRY"], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            operation = _operation(line)
            collective = operation.removesuffix("-start")
            if operation in CALLS:
                called = re.findall(r"(?:body|condition|to_apply|calls|\w+_computation)=(%[\w.\-]+)", line)
                branches = re.findall(r"branch_computations=\{([^}]*)\}", line)
                pending += called + [name.strip() for group in branches for name in group.split(",")]
            elif collective in COLLECTIVES:
                collectives[collective] += 1
            elif operation in ("copy", "copy-start"):
                found["copies"] += 1
            elif operation not in SILENT and not operation.endswith(("-done", "-update")):
                found["kernels"] += 1
                found["convolutions"] += bool(CONVOLUTION.search(line))
    return {**found, "collectives": dict(collectives)}


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


def _operation(line: str) -> str:
    """The name of the operation of an instruction: the word before the bracket of its operands, after its type."""
    # A type is one word, or a tuple of types in brackets.
    match = re.search(r"= (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
    return match[1] if match else "parameter"


def measure(arguments: Arguments, mesh: Mesh) -> list[dict[str, Any]]:
    """One row a method: kernels, convolutions, collectives, memory, compile seconds, kernels in SGD's."""
    rows: list[dict[str, Any]] = []
    for name in step_cost.METHODS:
        if name != "sgd" and name not in arguments.methods:
            continue
        lowered = lower(arguments, name, mesh)
        started = time.perf_counter()
        compiled: Any = lowered.compile()
        seconds = time.perf_counter() - started
        memory = compiled.memory_analysis()
        row = {
            "method": name,
            **counts(compiled.as_text()),
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "argument_mib": memory.argument_size_in_bytes / 2**20,
            "compile_seconds": seconds,
        }
        rows.append(row | {"ratio": row["kernels"] / (rows or [row])[0]["kernels"]})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as they are printed."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    formats: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "kernels": lambda row: str(row["kernels"]),
        "x SGD": lambda row: f"{row['ratio']:.2f}",
        "conv": lambda row: str(row["convolutions"]),
        "copies": lambda row: str(row["copies"]),
        "temp": lambda row: f"{row['temporary_mib']:.1f}",
        "args": lambda row: f"{row['argument_mib']:.1f}",
        "compile": lambda row: f"{row['compile_seconds']:.0f}",
        "collectives": lambda row: ", ".join(f"{n} {kind}" for kind, n in sorted(row["collectives"].items())) or "none",
    }
    for name in formats:
        is_text = name in ("method", "collectives")
        drawn.add_column(name, justify="left" if is_text else "right", no_wrap=name != "collectives")
    for row in rows:
        drawn.add_row(*(show(row) for show in formats.values()))
    return drawn


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints what the step of every method is compiled to for the target; with `--out`, writes the record too."""
    mesh = mesh_of(arguments.target)
    record: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    record["rows"] = measure(arguments, mesh)
    cli.console.print(table(record["rows"]))
    cli.console.print(
        f"One training step of {arguments.model} in {arguments.dtype}, batch {arguments.batch_size}, compiled for"
        f" {mesh.devices.flat[0].device_kind} x {mesh.size} and not run; temporary memory and"
        f" arguments in MiB, compile in seconds. jax {jax.__version__}."
    )
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

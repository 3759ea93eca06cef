"""What a training step of each method costs, in SGD steps: `python -m benchmarks.step_cost`.

One process measures every method on the same weights and batch, in turn, so that a slow minute of the machine falls on
all of them alike. A step is the whole jitted update (gradient, transformation, weight decay, momentum), its buffers
donated. Times are medians over repeats; compilation is apart. Operations and temporary memory are XLA's own counts.

With `--with-torch` SGD and HERO are measured in PyTorch too (`benchmarks.peers`), in turn with each other, after ours.
That both compute the same direction is checked in float64 on a few images.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from rich import box
from rich.table import Table

import hero_jax
from benchmarks import peers
from experiments import cli
from experiments.config import DTYPES
from experiments.storage import claims, environment, records
from hero_jax import errors, models, penalties

PyTree = Any
RHO, GAMMA = 0.5, 5.0
Base = optax.GradientTransformationExtraArgs


class Method(NamedTuple):
    """A method that is measured.

    around: the optimizer that it makes of weight decay and SGD.
    floor: gradients per step: what it costs at least, if nothing else did.
    part: every how many images of a batch one is of the part that the perturbation and the penalty are taken on.
    """

    around: Callable[[Base], Base]
    floor: float
    part: int = 1


def _before(tx: Base, floor: float, part: int = 1) -> Method:
    """A transformation of the gradient, first in the chain."""
    return Method(lambda base: optax.chain(tx, base), floor, part)


METHODS: dict[str, Method] = {
    "sgd": Method(lambda base: base, penalties.UNPERTURBED.cost),
    "msam": Method(lambda base: hero_jax.msam(base, 0.1), 1),
    "sam": _before(hero_jax.sam(0.05), penalties.PERTURBED.cost),
    "sam suppressed": _before(hero_jax.sam(0.05, suppress=0.5), penalties.PERTURBED.cost),
    "sam quarter": _before(hero_jax.sam(0.05), 1.25, part=4),
    "asam": _before(hero_jax.sam(RHO, adaptive=True), penalties.PERTURBED.cost),
    "nso": _before(hero_jax.nso(0.01, seed=0), 2),
    "grad_l1": _before(hero_jax.grad_l1(1e-3), penalties.GRADIENT_L1.cost),
    **{
        f"hero {name}": _before(hero_jax.hero(RHO, GAMMA, penalty=name), penalty.cost)
        for name, penalty in penalties.PENALTIES.items()
    },
    "hero by difference": _before(
        hero_jax.hero(RHO, GAMMA, product="difference"), penalties.PENALTIES["detached"].cost_by_difference or 0
    ),
    "hero quarter": _before(hero_jax.hero(RHO, GAMMA), 2, part=4),
}
TORCH_MODELS = ("resnet20", "resnet32", "resnet56")
# Images of the check against PyTorch: float64 convolutions are slow.
CHECKED = 16


class Peak(NamedTuple):
    """Published dense peak of the devices whose kind matches `pattern`, in teraflops a second; None where it has none.

    That of float32 is for XLA's default precision of products, which takes the inputs as `float32_inputs`.
    """

    pattern: str
    float32: float
    float32_inputs: str
    bfloat16: float | None


# By NVIDIA's data sheets (half of a figure with sparsity) and Google's page of each TPU version; the first match.
PEAKS = (
    Peak(r"V100-PCIE", 14.0, "float32", None),
    Peak(r"V100-SXM2", 15.7, "float32", None),
    Peak(r"A100\b", 156.0, "TF32", 312.0),
    Peak(r"H100 PCIe", 378.0, "TF32", 756.0),
    Peak(r"\b(H100|H200) NVL", 417.5, "TF32", 835.5),
    Peak(r"\b(H100|H200)\b", 494.7, "TF32", 989.4),
    Peak(r"TPU v4$", 275.0, "bfloat16", 275.0),
    Peak(r"TPU (v5 lite|v5e)$", 197.0, "bfloat16", 197.0),
    Peak(r"TPU (v5|v5p)$", 459.0, "bfloat16", 459.0),
    Peak(r"TPU (v6 lite|v6e)$", 918.0, "bfloat16", 918.0),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: str = "resnet20"
    """A name in hero_jax.models."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods, as the table names them (--methods sam "hero detached"); SGD, the unit, is always among them."""
    dtype: str = "float32"
    """Type of computation, float32 or bfloat16; parameters and the loss are float32."""
    batch_size: int = 64
    """Images a step."""
    image_size: int = 32
    """Height and width."""
    repeats: int = 15
    """Steps of each method that are timed, after one that is not."""
    with_torch: bool = False
    """Measure SGD and HERO in PyTorch too (resnet20, resnet32, resnet56), on the device that JAX uses. On a GPU
    XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it memory."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        errors.one_of("model", self.model, models.MODELS)
        for name in self.methods:
            errors.one_of("methods", name, METHODS)
        errors.one_of("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "image_size"):
            errors.integer(name, getattr(self, name), low=1)
        errors.integer("repeats", self.repeats, low=2)
        if self.with_torch and self.model not in TORCH_MODELS:
            raise ValueError(f"`with_torch` needs a model of {', '.join(TORCH_MODELS)}; got {self.model!r}.")


class Problem(NamedTuple):
    """What every method gets: its gradient function, first weights, first model state, and one batch.

    grad_fn: `(params, batch_stats, images, labels) -> (gradient of the batch mean, new batch_stats)`.
    """

    grad_fn: Callable[..., tuple[PyTree, PyTree]]
    params: PyTree
    batch_stats: PyTree
    images: jax.Array
    labels: jax.Array


def gradient_function(model: nn.Module) -> Callable[..., tuple[PyTree, PyTree]]:
    """The `grad_fn` of `Problem`: of the mean cross entropy in the type of the images, BatchNorm in training mode."""

    def loss_fn(params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, PyTree]:
        state = {"params": params, "batch_stats": batch_stats}
        logits, mutated = model.apply(state, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(images.dtype), labels).mean()
        return loss, mutated.get("batch_stats", {})

    return jax.grad(loss_fn, has_aux=True)


def problem(arguments: Arguments, dtype: str, batch_size: int) -> Problem:
    """Random images and labels, and the network at its initial weights; it may have no BatchNorm."""
    model = models.create(arguments.model, 10, dtype=jnp.dtype(dtype))
    shape = (batch_size, arguments.image_size, arguments.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape, jnp.promote_types(dtype, jnp.float32))
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    variables = jax.jit(model.init)(jax.random.key(2), images[:1])
    variables = jax.tree.map(lambda x: x.astype(images.dtype), variables)

    return Problem(gradient_function(model), variables["params"], variables.get("batch_stats", {}), images, labels)


def training_step(
    grad_fn: Callable[..., tuple[PyTree, PyTree]], method: Method
) -> tuple[Callable[[PyTree], PyTree], Any]:
    """`init: params -> optimizer state` and the jitted `step(state, images, labels) -> state`, which donates its state.

    A state is (params, batch_stats, optimizer state); `grad_fn` is that of `Problem`.
    """
    optimizer = method.around(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[PyTree, PyTree, PyTree], images: jax.Array, labels: jax.Array):
        params, batch_stats, opt_state = state
        part = images[:: method.part], labels[:: method.part]

        def part_grad_fn(params: PyTree) -> PyTree:
            return grad_fn(params, batch_stats, *part)[0]

        grads, new_stats = grad_fn(params, batch_stats, *part)
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda p: grad_fn(p, batch_stats, images, labels)[0],
            part_grad_fn=None if method.part == 1 else part_grad_fn,
        )
        return optax.apply_updates(params, updates), new_stats, opt_state

    return optimizer.init, step


def compile_step(given: Problem, method: Method) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step that returns its seconds when called, and what its compilation says: flops, temporary MiB, seconds."""
    init, step = training_step(given.grad_fn, method)
    batch = (given.images, given.labels)
    # Every method gets buffers of its own: the step donates them.
    state = jax.tree.map(jnp.copy, (given.params, given.batch_stats, init(given.params)))
    started = time.perf_counter()
    compiled: Any = step.lower(state, *batch).compile()
    seconds = time.perf_counter() - started

    def advance() -> float:
        nonlocal state
        started = time.perf_counter()
        state = jax.block_until_ready(compiled(state, *batch))
        return time.perf_counter() - started

    return advance, {
        "gigaflops": compiled.cost_analysis().get("flops", math.nan) / 1e9,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_seconds": seconds,
    }


def interleaved(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds and quartiles of each step, taken in turn, after one of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(step())
    timed = {name: seconds[1:] for name, seconds in times.items()}
    return {
        name: {"seconds": statistics.median(x), "quartiles": statistics.quantiles(x, n=4)[::2], "repeats": repeats}
        for name, x in timed.items()
    }


def peak(kind: str, dtype: str) -> tuple[float, str] | None:
    """Teraflops a second of a kind of device, and the type of the inputs of its products; None where not known."""
    # pyright does not see the options that are defined later.
    config: Any = jax.config
    # A part of a GPU (MIG) has a part of its peak, and another default precision another one.
    if "MIG" in kind or config.jax_default_matmul_precision is not None:
        return None
    known = next((p for p in PEAKS if re.search(p.pattern, kind)), None)
    if known is None:
        return None
    if dtype == "float32":
        return known.float32, known.float32_inputs
    return None if known.bfloat16 is None else (known.bfloat16, dtype)


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """One row a method: median seconds, spread, ratio to SGD, images a second, operations, memory, compile time."""
    given = problem(arguments, arguments.dtype, arguments.batch_size)
    steps, costs = {}, {}
    for name in METHODS:
        if name == "sgd" or name in arguments.methods:
            steps[name], costs[name] = compile_step(given, METHODS[name])
    best = peak(jax.devices()[0].device_kind, arguments.dtype)
    rows = []
    for name, times in interleaved(steps, arguments.repeats).items():
        row = {"method": name, "floor": METHODS[name].floor, **costs[name], **times}
        row["flop_ratio"] = row["gigaflops"] / costs["sgd"]["gigaflops"]
        row["peak_fraction"] = None if best is None else row["gigaflops"] / 1e3 / row["seconds"] / best[0]
        rows.append(row)
    return with_ratios(rows, arguments.batch_size)


def with_ratios(rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The rows with their ratio to the first one, which is SGD, and images a second."""
    base = rows[0]["seconds"]
    return [row | {"ratio": row["seconds"] / base, "images_per_second": batch_size / row["seconds"]} for row in rows]


def torch_device() -> str:
    """The device that JAX uses, as PyTorch names it."""
    reason = peers.missing(["torch"])
    if reason is not None:
        raise ValueError(f"`with_torch` needs PyTorch: {reason}.")
    torch: Any = importlib.import_module("torch")
    backend = jax.default_backend()
    device = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"`with_torch` needs a PyTorch that runs where JAX does; this one has no {backend}.")
    return device


def direction_difference(arguments: Arguments, device: str) -> float:
    """||theirs - ours|| / ||ours|| of the HERO direction at the same weights and images, both in float64.

    In float32 it would say little: rounding puts a ReLU unit near zero on either side, which moves the direction by
    per cents (`benchmarks.precision`).
    """
    with jax.enable_x64(True):
        given = problem(arguments, "float64", min(CHECKED, arguments.batch_size))
        tx = hero_jax.hero(RHO, GAMMA)

        @jax.jit
        def direction(params: PyTree, *rest: PyTree) -> PyTree:
            def grad_fn(params: PyTree) -> PyTree:
                return given.grad_fn(params, *rest)[0]

            return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

        ours = jax.device_get(direction(given.params, given.batch_stats, given.images, given.labels))
        network = peers.resnet({"params": given.params, "batch_stats": given.batch_stats}, device).train()
        images, labels = np.asarray(given.images), np.asarray(given.labels)
    (batch,) = peers.split_batches(images, labels, len(labels), device)
    theirs = peers.to_flax(network, peers.hero_direction(network, batch, rho=RHO, gamma=GAMMA), ours)
    squares = [(np.sum((x - y) ** 2), np.sum(x**2)) for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
    difference, size = np.sum(squares, axis=0)
    return math.sqrt(difference / size)


def measure_torch(arguments: Arguments, device: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of SGD and HERO in PyTorch (eager; the same network, batch, weight decay and momentum), and what ran.

    They come after ours: in turn with them, the threads of both libraries compete and the steps of both take longer.
    """
    torch: Any = importlib.import_module("torch")
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    notes = {"version": torch.__version__, "device": where}
    notes["direction_difference"] = direction_difference(arguments, device)
    given = problem(arguments, "float32", arguments.batch_size)
    (batch,) = peers.split_batches(np.asarray(given.images), np.asarray(given.labels), arguments.batch_size, device)
    directions = {
        "torch sgd": peers.gradient,
        "torch hero detached": functools.partial(peers.hero_direction, rho=RHO, gamma=GAMMA),
    }
    steps = {}
    for name, direction in directions.items():
        network = peers.resnet({"params": given.params, "batch_stats": given.batch_stats}, device)
        steps[name] = peers.training_step(network, batch, direction, arguments.dtype)
    times = interleaved(steps, arguments.repeats)
    return with_ratios([{"method": name, **row} for name, row in times.items()], arguments.batch_size), notes


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as they are printed; a column that no row has a figure for is left out."""

    def milliseconds(seconds: float) -> str:
        return f"{1e3 * seconds:.0f}" if seconds > 0.1 else f"{1e3 * seconds:.3g}"

    formats: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "ms": lambda row: milliseconds(row["seconds"]),
        "quartiles": lambda row: "-".join(map(milliseconds, row["quartiles"])),
        "x SGD": lambda row: f"{row['ratio']:.2f}",
        "floor": lambda row: f"{row['floor']:g}" if "floor" in row else "",
        "img/s": lambda row: f"{row['images_per_second']:.0f}",
        "flops": lambda row: f"{row['flop_ratio']:.2f}" if "flop_ratio" in row else "",
        "peak": lambda row: f"{row['peak_fraction']:.1%}" if row.get("peak_fraction") is not None else "",
        "MiB": lambda row: f"{row['temporary_mib']:.0f}" if "temporary_mib" in row else "",
        "compile": lambda row: f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
    }
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    cells = {name: [show(row) for row in rows] for name, show in formats.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in cells:
        drawn.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line in zip(*cells.values(), strict=True):
        drawn.add_row(*line)
    return drawn


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints the cost of a step of every method; with `--out`, writes the record too."""
    # What is missing is said before minutes have gone by.
    beside = torch_device() if arguments.with_torch else None
    record: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    versions, device = record["environment"]["versions"], record["environment"]["device"]
    record["peak_teraflops"] = best = peak(device["kind"], arguments.dtype)
    record["rows"] = measure(arguments)
    notes = "" if best is None else f" Peak: {best[0]:g} dense teraflops a second with {best[1]} inputs."
    if beside is not None:
        rows, record["torch"] = measure_torch(arguments, beside)
        record["rows"] += rows
        notes += (
            " PyTorch {version} (eager, {device}) after ours, x its own SGD; its HERO direction differs by"
            " {direction_difference:.0e} of ours in float64."
        ).format(**record["torch"])
    cli.console.print(table(record["rows"]))
    where = f"{device['kind']} x {device['count']}, {record['environment']['machine']['cores']} cores"
    cli.console.print(
        f"One training step of {arguments.model} in {arguments.dtype}, batch {arguments.batch_size}: median and"
        f" quartiles of {arguments.repeats} interleaved repeats, in milliseconds; flops in SGD steps and temporary MiB"
        f" as XLA counts them, compile in seconds. {where}; jax {versions['jax']}, python {versions['python']}.{notes}"
    )
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

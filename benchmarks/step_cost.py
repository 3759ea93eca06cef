"""What a training step of each method costs, in SGD steps: `python -m benchmarks.step_cost`.

One process measures every method on the same weights and batch, in turn, so that a slow minute of the machine falls on
all of them alike. A step is the whole jitted update (gradient, transformation, weight decay, momentum), its buffers
donated. Times are medians over repeats; compilation is apart. Operations and temporary memory are XLA's own counts.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich import box
from rich.table import Table

import hero_jax
from experiments import cli, runs
from hero_jax import models, penalty

PyTree = Any
METHODS: dict[str, optax.GradientTransformationExtraArgs] = {
    "sgd": optax.with_extra_args_support(optax.identity()),
    "sam": hero_jax.sam(0.05),
    "asam": hero_jax.sam(0.5, adaptive=True),
    "grad_l1": hero_jax.grad_l1(1e-3),
    **{f"hero {name}": hero_jax.hero(0.5, 5.0, penalty=name) for name in penalty.PENALTIES},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: str = "resnet20"
    """A name in hero_jax.models."""
    batch_size: int = 64
    """Images a step."""
    image_size: int = 32
    """Height and width."""
    repeats: int = 15
    """Steps of each method that are timed, after one that is not."""
    out: Path | None = None
    """JSON file for the record."""


def compiled_step(arguments: Arguments, tx: optax.GradientTransformationExtraArgs) -> tuple[Any, Any, float]:
    """The compiled step, its first state, and the seconds of compilation."""
    model = models.create(arguments.model, 10)
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    variables = jax.jit(model.init)(jax.random.key(2), images)
    chain = optax.chain(tx, optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9))

    def loss_fn(params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array):
        state = {"params": params, "batch_stats": batch_stats}
        logits, mutated = model.apply(state, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, mutated.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[PyTree, PyTree, PyTree], images: jax.Array, labels: jax.Array):
        params, batch_stats, opt_state = state
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, new_stats = grad_fn(params, batch_stats, images, labels)
        updates, opt_state = chain.update(
            grads, opt_state, params, grad_fn=lambda p: grad_fn(p, batch_stats, images, labels)[0]
        )
        return optax.apply_updates(params, updates), new_stats, opt_state

    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    state = (params, batch_stats, chain.init(params))
    started = time.perf_counter()
    compiled = step.lower(state, images, labels).compile()
    seconds = time.perf_counter() - started
    # Every method gets buffers of its own: the step donates them.
    state = jax.tree.map(jnp.copy, state)
    return functools.partial(_advance, compiled, images, labels), (compiled, state), seconds


def _advance(compiled: Any, images: jax.Array, labels: jax.Array, state: PyTree) -> tuple[PyTree, float]:
    started = time.perf_counter()
    state = jax.block_until_ready(compiled(state, images, labels))
    return state, time.perf_counter() - started


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """One row a method: median seconds, spread, ratio to SGD, operations, temporary memory, compile time."""
    steps, states, rows = {}, {}, {}
    for name, tx in METHODS.items():
        steps[name], (compiled, state), seconds = compiled_step(arguments, tx)
        states[name], _ = steps[name](state)
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        rows[name] = {
            "method": name,
            "gigaflops": cost["flops"] / 1e9,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "compile_seconds": seconds,
        }
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(arguments.repeats):
        for name in METHODS:
            states[name], seconds = steps[name](states[name])
            times[name].append(seconds)
    base = statistics.median(times["sgd"])
    for name, row in rows.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        row |= {"seconds": statistics.median(times[name]), "quartiles": [low, high], "repeats": arguments.repeats}
        row |= {"ratio": row["seconds"] / base, "flop_ratio": row["gigaflops"] / rows["sgd"]["gigaflops"]}
    return list(rows.values())


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints the cost of a step of every method; with `--out`, writes the record too."""
    rows, environment = measure(arguments), runs.environment()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "median s", "quartiles", "x SGD", "flops", "MiB", "compile"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(
            row["method"],
            f"{row['seconds']:.4f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['temporary_mib']:.0f}",
            f"{row['compile_seconds']:.1f}",
        )
    cli.console.print(table)
    versions, device = environment["versions"], environment["device"]
    where = f"{device['kind']} x {device['count']}, {environment['machine']['cores']} cores"
    cli.console.print(
        f"One training step of {arguments.model}, batch {arguments.batch_size}; flops in SGD steps and temporary"
        f" MiB as XLA counts them, compile in seconds. {where}; jax {versions['jax']}, python"
        f" {versions['python']}; median of {arguments.repeats} interleaved repeats."
    )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(arguments.out, {"arguments": runs.to_json(arguments), "environment": environment, "rows": rows})


if __name__ == "__main__":
    cli.run(main)

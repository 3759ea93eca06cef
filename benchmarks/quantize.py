"""What a sweep over bit widths costs: `python -m benchmarks.quantize`.

One process, ResNet20 at its random initialisation (times do not depend on the weights), random images, weights
quantized to 8 .. 2 bits by channel on the stretched grid, which is that of qwix:

1. rounding the kernels to every width, by `fake_quantize` and by qwix array functions (`qwix.quantize` and
   `qwix.dequantize`, operation by operation);
2. the whole sweep, evaluations included, by `quantize_and_evaluate` and by qwix: either as above with the same compiled
   forward pass, or with a forward pass that takes the codes of `qwix.quantize` and is compiled for each type of them;
3. an evaluation by `classifier` against a plain jitted forward loop over the same images.

Cold is the first call with nothing compiled but the shared forward pass, warm the median of later calls, in turn.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments import cli
from experiments.storage import claims, environment, records
from hero_jax import errors, models, quantize
from hero_jax.evaluate import classifier

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    images: int = 1000
    """Images of an evaluation."""
    batch_size: int = 250
    """Images of a forward pass."""
    bits: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    """Bit widths of the sweep."""
    repeats: int = 5
    """Times that each is timed, in turn, after the first."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "repeats"):
            errors.integer(name, getattr(self, name), low=1)


def timed(
    functions: dict[str, Callable[[], Any]], prepare: Callable[[], Any], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a call of each after `prepare` alone was compiled, and the median of later ones, taken in turn."""
    cold: dict[str, float] = {}
    for name, function in functions.items():
        jax.clear_caches()
        prepare()
        cold[name] = seconds(function)
    for function in functions.values():
        function()
    warm: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            warm[name].append(seconds(function))
    return {name: {"cold": cold[name], "warm": statistics.median(warm[name])} for name in functions}


def seconds(function: Callable[[], Any]) -> float:
    """What one call takes."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def qwix_codes(params: PyTree, bits: int) -> PyTree:
    """The kernels as arrays of qwix, by output channel."""
    import qwix  # optional: of the test extra

    qtype = {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")
    return jax.tree.map(lambda w: qwix.quantize(w, qtype, channelwise_axes=(w.ndim - 1,)) if w.ndim >= 2 else w, params)


def qwix_weights(codes: PyTree) -> PyTree:
    """The weights that arrays of qwix stand for."""
    import qwix

    def is_array(x: Any) -> bool:
        return isinstance(x, qwix.QArray)

    return jax.tree.map(lambda x: qwix.dequantize(x) if is_array(x) else x, codes, is_leaf=is_array)


def with_qwix(params: PyTree, bits: int) -> PyTree:
    """The kernels rounded by qwix, by output channel."""
    return qwix_weights(qwix_codes(params, bits))


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints what quantizing and evaluating costs; with `--out`, writes the record too."""
    model: Any = models.create("resnet20", 10)
    images = np.asarray(jax.random.normal(jax.random.key(0), (arguments.images, 32, 32, 3)))
    labels = np.arange(arguments.images, dtype=np.int32) % 10
    variables = model.init(jax.random.key(1), images[:1])
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    spec = quantize.named("qwix")

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        return model.apply({"params": params, **rest}, x)

    size = arguments.batch_size
    classify = classifier(apply, batch_size=size)
    forward = jax.jit(apply)
    batches = [images[i : i + size] for i in range(0, len(images), size)]

    def evaluate(params: PyTree) -> dict[str, Any]:
        return classify(params, images, labels)

    def plain(params: PyTree) -> float:
        logits = [forward(params, x) for x in batches]
        found = np.concatenate([np.asarray(x).argmax(-1) for x in logits])
        return float((found == labels).mean())

    evaluations = {"classifier": lambda: evaluate(params), "plain loop": lambda: plain(params)}
    rounding = jax.jit(lambda params, bits: quantize.fake_quantize(params, bits, spec))
    functions: dict[str, Callable[[], Any]] = {
        "hero_jax rounding": lambda: [rounding(params, bits) for bits in arguments.bits],
        "hero_jax sweep": lambda: [
            row.metrics["loss"] for row in quantize.quantize_and_evaluate(evaluate, params, arguments.bits, spec)
        ],
    }
    if importlib.util.find_spec("qwix") is None:
        cli.console.print("qwix is not installed and was left out.")
    else:
        functions["qwix rounding"] = lambda: [with_qwix(params, bits) for bits in arguments.bits]
        functions["qwix sweep"] = lambda: [
            evaluate(p)["loss"] for p in (params, *(with_qwix(params, bits) for bits in arguments.bits))
        ]
        classify_codes = classifier(lambda codes, x: apply(qwix_weights(codes), x), batch_size=size)
        functions["qwix sweep, codes in the forward pass"] = lambda: [
            classify_codes(p, images, labels)["loss"]
            for p in (params, *(qwix_codes(params, bits) for bits in arguments.bits))
        ]
    measured = timed(evaluations, lambda: None, arguments.repeats)
    measured |= timed(functions, lambda: evaluate(params), arguments.repeats)
    for bits in arguments.bits if "qwix sweep" in functions else ():
        ours, theirs = rounding(params, bits), with_qwix(params, bits)
        gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
        assert max(jax.tree.leaves(gaps)) < 1e-5, f"hero_jax and qwix differ at {bits} bits"
    table = Table("", "cold, s", "warm, s", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, found in measured.items():
        table.add_row(name, f"{found['cold']:.3f}", f"{found['warm']:.3f}")
    cli.console.print(table)
    cli.console.print(
        f"ResNet20, {arguments.images:,} images in batches of {size}, {len(arguments.bits)} bit widths and full"
        f" precision, {spec.name}; warm: medians of {arguments.repeats} in turn. Sweeps contain the evaluations, whose"
        " compilation is that of the classifier's line."
    )
    record = {"arguments": claims.to_json(arguments), "environment": environment.current(), "seconds": measured}
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

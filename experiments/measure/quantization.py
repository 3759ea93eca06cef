"""Saved runs at low bit widths: their accuracy after each step, their layers alone, bits for each layer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax

from experiments.config.fields import Bits, Checked, Count, Several, Whole, check_once, number
from experiments.measure import saved
from experiments.measure.saved import Saved
from experiments.training import compiled
from hero_jax import curvature, quantize, spectrum
from hero_jax.errors import ArgumentError, one_of
from hero_jax.evaluate import classifier
from hero_jax.quantize import allocation, linen, rounding, sensitivity

PyTree = Any
logger = logging.getLogger(__name__)
# In the order in which they are applied.
STEPS = ("fold", "rounding", "bias", "batch-norm", "activations")
ALLOCATION_BITS = (2, 3, 4, 5, 6, 8)
# Compiled once for each specification and architecture.
_optimized = jax.jit(rounding.optimized, static_argnames="spec")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig(Checked):
    """How to quantize."""

    specs: tuple[str, ...] = ("channel-narrow", "channel-stretched")
    """Names of quantizers: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    bits: tuple[Bits, ...] = (8, 6, 5, 4, 3, 2)
    """Bit widths of the weights."""
    steps: tuple[str, ...] = ("nearest",)
    """Each is evaluated apart: nearest, or some of fold, rounding, bias, batch-norm and activations joined by "+"."""
    calibration: Count = 512
    """Training images for the steps."""
    activation_bits: Bits = 8
    """Bit width of the activations where a step has them."""
    images: Count | Literal["all"] = "all"
    """Evaluate on this many test images, the first ones."""
    sensitivity: Bits | Literal["none"] = "none"
    """Bit width at which each layer is quantized alone, and mean bit width of the allocation."""
    probes: Several = 30
    """Random probes of the layer traces."""
    seed: Whole = 0
    """Of the probes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.specs and self.bits and self.steps):
            raise ArgumentError("`specs`, `bits` and `steps` must each name at least one.")
        for step in self.steps:
            for part in step.split("+") if step != "nearest" else ():
                one_of("steps", part, STEPS)
            check_once("steps", step.split("+"))
        check_once("specs", [quantize.named(name).name for name in self.specs])
        check_once("bits", self.bits)
        check_once("steps", self.steps)


def evaluate(
    config: QuantizeConfig, run: Saved, spec: quantize.QuantSpec, step: str, report: Callable[[int, int], None]
) -> list[quantize.QuantizedScore]:
    """The rows of one network, specification and step; the row of full precision has the step too."""
    parts = () if step == "nearest" else step.split("+")
    variables, forward, classify, quantizer = run.variables, run.trainer.forward, run.classify, None
    batches = saved.batched(run.train.images)
    pairs = linen.batch_norm_pairs(forward, variables, batches[0]) if parts else linen.Calibration({}, {})
    if not pairs and not {"fold", "batch-norm"}.isdisjoint(parts):
        raise ArgumentError(f"`steps` has {step!r}, but the network has no BatchNorm after a layer.")
    left_out: dict[str, str] = {}
    if "fold" in parts:
        left_out |= pairs.left_out
        variables = linen.fold_batch_norm(variables, pairs)
    if "rounding" in parts:
        grams = linen.input_grams(forward, variables, batches)
        left_out |= grams.left_out
        quantizer = lambda params, bits: _optimized(params, bits, grams, spec)  # noqa: E731
    correct = linen.bias_correction(forward, variables, batches, pairs) if "bias" in parts else None
    left_out |= correct.left_out if correct else {}
    if "activations" in parts:
        ranges = linen.activation_ranges(forward, variables, batches)
        left_out |= ranges.left_out
        forward = linen.quantized_activations(forward, ranges, config.activation_bits)
        classify = classifier(forward, batch_size=compiled.EVAL_BATCH)
    for path, why in left_out.items():
        logger.info("%s, %s: %s stays as it is: %s.", spec.name, step, path, why)
    test = run.test.first(number(config.images))

    def eval_fn(params: PyTree) -> dict[str, Any]:
        current = variables | {"params": params} if correct is None else correct(params)
        if "batch-norm" in parts:
            current = saved.with_statistics_of(batches, run.trainer, current)
        return classify(current, *test)

    return quantize.quantize_and_evaluate(
        eval_fn, variables["params"], config.bits, spec, quantizer=quantizer, report=report
    )


def measure_layers(
    config: QuantizeConfig, run: Saved, spec: quantize.QuantSpec, report: compiled.Report
) -> dict[str, Any]:
    """Each layer quantized alone against its trace, and bits allocated to layers by the traces; training loss."""
    assert config.sensitivity != "none"
    trainer, variables, params = run.trainer, run.variables, run.variables["params"]
    operator = trainer.hessian(variables, run.train)

    def product(vector: PyTree) -> PyTree:
        # The operator works on trees with the batch statistics left out.
        return operator({**operator.like, "params": vector})["params"]

    def evaluate_on(split: Any, params: PyTree) -> dict[str, float]:
        return trainer.evaluate(variables | {"params": params}, split)

    report("layer traces", 0, 1)
    found = spectrum.layer_traces(operator, jax.random.key(config.seed), num_probes=config.probes)
    report("layer traces", 1, 1)
    traces = found.mean["params"]
    layers = sensitivity.sensitivities(
        lambda params: evaluate_on(run.train, params)["loss"],
        params,
        config.sensitivity,
        traces,
        operator=curvature.HostOperator(product, params),
        spec=spec,
        report=functools.partial(report, "layers alone"),
    )
    numbers = {name: [getattr(layer, name) for layer in layers] for name in ("by_trace", "by_hessian", "increase")}
    costs = sensitivity.predicted_costs(params, traces, ALLOCATION_BITS, spec=spec)
    chosen = allocation.allocate_bits(
        costs, {layer.layer: layer.size for layer in layers}, mean_bits=float(config.sensitivity)
    )
    bits = config.sensitivity, allocation.bits_tree(params, chosen.bits)
    test = run.test.first(number(config.images))
    rows = quantize.quantize_and_evaluate(functools.partial(evaluate_on, test), params, bits, spec)
    return {
        "images": run.train.size,
        "layers": [layer._asdict() for layer in layers],
        "trace_sem": jax.tree.map(float, found.sem["params"]),
        "correlation": {
            kind: sensitivity.correlation(numbers[f"by_{kind}"], numbers["increase"])._asdict()
            for kind in ("trace", "hessian")
        },
        "allocation": chosen._asdict(),
        "accuracy": dict(zip(("full", "uniform", "allocated"), rows, strict=True)),
    }

"""Saved runs at low bit widths: their accuracy after each step, their layers alone, bits for each layer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import data
from experiments.config import TrainConfig
from experiments.config.fields import Bits, Count, Several, Whole, check, number
from experiments.training import compiled
from hero_jax import curvature, quantize, spectrum
from hero_jax.errors import ArgumentError, one_of
from hero_jax.evaluate import classifier
from hero_jax.quantize import allocation, linen, rounding, sensitivity

PyTree = Any
logger = logging.getLogger(__name__)
# Specification, step, network.
Key = tuple[str, str, str]
# In the order in which they are applied.
STEPS = ("fold", "rounding", "bias", "batch-norm", "activations")
CALIBRATION_BATCH = 128
ALLOCATION_BITS = (2, 3, 4, 5, 6, 8)
# Compiled once for each specification and architecture.
_optimized = jax.jit(rounding.optimized, static_argnames="spec")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
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
        check(self)
        if not (self.specs and self.bits and self.steps):
            raise ArgumentError("`specs`, `bits` and `steps` must each name at least one.")
        for step in self.steps:
            for part in step.split("+") if step != "nearest" else ():
                one_of("steps", part, STEPS)
            _check_once("steps", step.split("+"))
        _check_once("specs", [quantize.named(name).name for name in self.specs])
        _check_once("bits", self.bits)
        _check_once("steps", self.steps)


def _check_once(argument: str, values: Sequence[Any]) -> None:
    """Raises ValueError where a value comes twice: it would count twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise ArgumentError(f"`{argument}` must name each once; got {value!r} twice.")


class Network(NamedTuple):
    """A saved run, ready to be quantized."""

    trainer: compiled.Trainer
    variables: PyTree
    dataset: data.Dataset
    calibration: list[np.ndarray]
    # Compiled once for every specification and step that leaves the activations alone.
    classify: Callable[..., dict[str, Any]]


def evaluate(
    config: QuantizeConfig, network: Network, spec: quantize.QuantSpec, step: str, report: Callable[[int, int], None]
) -> list[quantize.QuantizedScore]:
    """The rows of one network, specification and step; the row of full precision has the step too."""
    parts = () if step == "nearest" else step.split("+")
    trainer, batches = network.trainer, network.calibration
    variables = network.variables
    forward = trainer.forward
    pairs = linen.batch_norm_pairs(forward, variables, batches[0]) if parts else linen.Calibration({}, {})
    if not pairs and not {"fold", "batch-norm"}.isdisjoint(parts):
        raise ArgumentError(f"`steps` has {step!r}, but the network has no BatchNorm after a layer.")
    left_out: dict[str, str] = {}
    if "fold" in parts:
        left_out |= pairs.left_out
        variables = linen.fold_batch_norm(variables, pairs)
    quantizer, classify = None, network.classify
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
    test = network.dataset.test.first(number(config.images))

    def eval_fn(params: PyTree) -> dict[str, Any]:
        current = variables | {"params": params} if correct is None else correct(params)
        if "batch-norm" in parts:
            params, stats = current["params"], current["batch_stats"]
            stats = linen.reestimate_batch_stats(
                lambda stats, images: trainer.statistics({"params": params, "batch_stats": stats}, images),
                stats,
                batches,
            )
            current = current | {"batch_stats": stats}
        return classify(current, *test)

    return quantize.quantize_and_evaluate(
        eval_fn, variables["params"], config.bits, spec, quantizer=quantizer, report=report
    )


def measure_layers(
    config: QuantizeConfig, network: Network, spec: quantize.QuantSpec, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Each layer quantized alone against its trace, and bits allocated to layers by the traces; training loss."""
    assert config.sensitivity != "none"
    trainer, variables = network.trainer, network.variables
    images = network.dataset.train.first(config.calibration)
    operator = trainer.hessian(variables, images)

    def product(vector: PyTree) -> PyTree:
        # The operator works on trees with the batch statistics left out.
        return operator({**operator.like, "params": vector})["params"]

    def mean_loss(params: PyTree) -> float:
        return trainer.evaluate(variables | {"params": params}, images)["loss"]

    params = variables["params"]
    report("layer traces", 0, 1)
    found = spectrum.layer_traces(operator, jax.random.key(config.seed), num_probes=config.probes)
    traces = found.mean["params"]
    report("layer traces", 1, 1)
    layers = sensitivity.sensitivities(
        mean_loss,
        params,
        config.sensitivity,
        traces,
        operator=curvature.HostOperator(product, params),
        spec=spec,
        report=functools.partial(report, "layers alone"),
    )
    by_trace, by_hessian = ([getattr(layer, name) for layer in layers] for name in ("by_trace", "by_hessian"))
    increases = [layer.increase for layer in layers]
    costs = sensitivity.predicted_costs(params, traces, ALLOCATION_BITS, spec=spec)
    sizes = {layer.layer: layer.size for layer in layers}
    chosen = allocation.allocate_bits(costs, sizes, mean_bits=float(config.sensitivity))
    tree = allocation.bits_tree(params, chosen.bits)
    test = network.dataset.test.first(number(config.images))
    rows = quantize.quantize_and_evaluate(
        lambda p: trainer.evaluate(variables | {"params": p}, test), params, (config.sensitivity, tree), spec
    )
    return {
        "images": len(images.labels),
        "layers": [layer._asdict() for layer in layers],
        "trace_sem": jax.tree.map(float, found.sem["params"]),
        "correlation": {
            "trace": sensitivity.correlation(by_trace, increases)._asdict(),
            "hessian": sensitivity.correlation(by_hessian, increases)._asdict(),
        },
        "allocation": chosen._asdict(),
        "accuracy": {"full": rows[0], "uniform": rows[1], "allocated": rows[2]},
    }


def load(
    folders: Iterable[Path], data_dir: Path | None, report: compiled.Report, calibration: int
) -> dict[Path, tuple[TrainConfig, Network]]:
    """Run folders as `Network`s; those that differ in their seed only share data and what is compiled."""
    loaded = {}
    shared: dict[TrainConfig, Network] = {}
    for folder in folders:
        config, trainer, variables, dataset = compiled.load(folder, data_dir, report)
        images = dataset.train.first(calibration).images
        batches = [images[i : i + CALIBRATION_BATCH] for i in range(0, len(images), CALIBRATION_BATCH)]
        classify = classifier(trainer.forward, batch_size=compiled.EVAL_BATCH)
        network = Network(trainer, variables, dataset, batches, classify)
        network = shared.setdefault(config.replace(seed=0), network)
        # Labels that were altered are those of each seed; else the data are there once.
        own = {"dataset": dataset} if config.labels.label_noise else {}
        loaded[folder] = config, network._replace(variables=variables, **own)
    return loaded

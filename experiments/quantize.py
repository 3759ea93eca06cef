"""Quantizes saved runs: `python -m experiments.quantize runs/digits-mlp-hero-s0 runs/digits-mlp-sgd-s0`.

Accuracy at each bit width for named specifications and optional steps after rounding, one line for each network; runs
that differ in their seed only are one network with a mean and a spread. Leaves table.md, rows.csv, results.json and
bits.png; with `--sensitivity` also layers-*.png, and an allocation of bits to layers.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import tyro
from rich import box
from rich.table import Table

from experiments import cli, data, progress
from experiments.analysis import plots, table, tables
from experiments.analysis.networks import group_runs
from experiments.analysis.tables import Frame
from experiments.config import TrainConfig
from experiments.storage import environment, files
from experiments.training import compiled
from hero_jax import curvature, errors, quantize, spectrum
from hero_jax.evaluate import classifier
from hero_jax.quantize import allocation, linen, rounding, sensitivity

PyTree = Any
# In the order in which they are applied.
STEPS = ("fold", "rounding", "bias", "batch-norm", "activations")
CALIBRATION_BATCH = 128
# Specification, step, network.
Key = tuple[str, str, str]
ALLOCATION_BITS = (2, 3, 4, 5, 6, 8)
# What rows.csv has of each `QuantizedScore` besides accuracy and loss.
MEASURED = ("flipped", "sqnr_db", "fraction", "ideal_bytes", "stored_bytes")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize."""

    specs: tuple[str, ...] = ("channel-narrow", "channel-stretched")
    """Names of quantizers: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    """Bit widths of the weights."""
    steps: tuple[str, ...] = ("nearest",)
    """Each is evaluated apart: nearest, or some of fold, rounding, bias, batch-norm and activations joined by "+"."""
    calibration: int = 512
    """Training images for the steps."""
    activation_bits: int = 8
    """Bit width of the activations where a step has them."""
    images: int | None = None
    """Evaluate on the first so many test images; default all."""
    sensitivity: int | None = None
    """Bit width at which each layer is quantized alone, and mean bit width of the allocation; default: neither."""
    probes: int = 30
    """Random probes of the layer traces."""
    seed: int = 0
    """Of the probes."""

    def __post_init__(self) -> None:
        if not (self.specs and self.bits and self.steps):
            raise ValueError("`specs`, `bits` and `steps` must each name at least one.")
        for name in self.specs:
            quantize.named(name)
        sensitivity_bits = [] if self.sensitivity is None else [self.sensitivity]
        widths = {"bits": self.bits, "activation_bits": [self.activation_bits], "sensitivity": sensitivity_bits}
        for name, values in widths.items():
            for width in values:
                errors.integer(name, width, low=quantize.MIN_BITS, high=quantize.MAX_BITS)
        for step in self.steps:
            for part in step.split("+") if step != "nearest" else ():
                errors.one_of("steps", part, STEPS)
            _check_once("steps", step.split("+"))
        _check_once("specs", [quantize.named(name).name for name in self.specs])
        _check_once("bits", self.bits)
        _check_once("steps", self.steps)
        for name in ("calibration", "images"):
            if getattr(self, name) is not None:
                errors.integer(name, getattr(self, name), low=1)
        errors.integer("probes", self.probes, low=2)
        errors.integer("seed", self.seed, low=0)


def _check_once(argument: str, values: Sequence[Any]) -> None:
    """Raises ValueError where a value comes twice: it would count twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"`{argument}` must name each once; got {value!r} twice.")


class Network(NamedTuple):
    """A saved run, ready to be quantized."""

    trainer: compiled.Trainer
    variables: PyTree
    dataset: data.Dataset
    calibration: list[np.ndarray]
    # Compiled once for every specification and step that leaves the activations alone.
    classify: Callable[..., dict[str, Any]]


# Compiled once for each specification and architecture.
_optimized = jax.jit(rounding.optimized, static_argnames="spec")


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
        raise ValueError(f"`steps` has {step!r}, but the network has no BatchNorm after a layer.")
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
        cli.console.print(f"{spec.name}, {step}: {path} stays as it is: {why}.")
    test = network.dataset.test.first(config.images)

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
    assert config.sensitivity is not None
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
    test = network.dataset.test.first(config.images)
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


def table_of(scores: Mapping[Key, list[list[quantize.QuantizedScore]]]) -> Frame:
    """One row for each run, specification, step and bit width, in the fields of `QuantizedScore`."""
    return pd.DataFrame(
        {
            **{"spec": spec, "step": step, "network": name, "run": i},
            "bits": "full" if row.bits is None else str(row.bits),
            **{name: row.metrics[name] for name in ("accuracy", "loss")},
            "drop": row.drop["accuracy"],
            **{name: getattr(row, name) for name in MEASURED},
        }
        for (spec, step, name), seeds in scores.items()
        for i, rows in enumerate(seeds)
        for row in rows
    )


def cells(rows: Frame) -> tuple[list[str], dict[tuple[str, str], list[list[str]]]]:
    """Header and, by specification and step, lines of a table; `rows` have the accuracy in percent as their value."""
    rows, lines = rows.assign(label=rows["bits"].map(table.width_label)), {}
    columns = ["n", *rows["label"].unique()]
    for kind, part in rows.groupby(["spec", "step"], sort=False):
        lines[kind] = tables.lines(tables.means(part), part["network"].unique(), columns)
    return ["network", *columns], lines


def layer_tables(measured: dict[str, Any]) -> Table:
    """The layers of one network for a terminal."""
    table = Table("layer", "weights", "increase", "by trace", "by d'Hd/2", "bits", box=box.SIMPLE_HEAD, pad_edge=False)
    for layer in measured["layers"]:
        values = (f"{layer[name]:.3g}" for name in ("increase", "by_trace", "by_hessian"))
        table.add_row(
            layer["layer"], f"{layer['size']:,}", *values, str(measured["allocation"]["bits"][layer["layer"]])
        )
    return table


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
        network = shared.setdefault(dataclasses.replace(config, seed=0), network)
        # Labels that were altered are those of each seed; else the data are there once.
        own = {"dataset": dataset} if config.label_noise else {}
        loaded[folder] = config, network._replace(variables=variables, **own)
    return loaded


def main(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    config: Annotated[QuantizeConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Quantizes saved runs: accuracy over bits for named quantizers and steps, sensitivities, allocated bits.

    Args:
        folders: Run folders with a checkpoint, all of one data set.
        config: How to quantize.
        out: Folder for the results, new or empty; default quantize in the first run.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    if not folders:
        raise ValueError("`folders` must name at least one run folder; got none.")
    out = out or folders[0] / "quantize"
    started = time.monotonic()
    scores: dict[Key, list[list[quantize.QuantizedScore]]] = {}
    layers: dict[str, Any] = {}
    with progress.bar() as display:
        report = progress.steps(display)
        loaded = load(folders, data_dir, report, config.calibration)
        names = {network[0].dataset for network in loaded.values()}
        if len(names) > 1:
            raise ValueError(f"`folders` must be of one data set; got {', '.join(sorted(names))}.")
        groups = group_runs((path, run) for path, (run, _) in loaded.items())
        files.claim(out)
        for spec in config.specs:
            for step in config.steps:
                for name, paths in groups.items():
                    for path in paths:
                        line = functools.partial(report, f"{path.name} {spec} {step}")
                        rows = evaluate(config, loaded[path][1], quantize.named(spec), step, line)
                        scores.setdefault((spec, step, name), []).append(rows)
        for name, paths in groups.items() if config.sensitivity is not None else ():
            layers[name] = measure_layers(config, loaded[paths[0]][1], quantize.named(config.specs[0]), report)
    images = min(config.images or 10**9, next(iter(loaded.values()))[1].dataset.test.size)
    text = (
        f"{names.pop()}: accuracy in percent on {images:,} images, kernels rounded after training; mean \u00b1 standard"
        f" deviation over n seeds. Steps use {config.calibration} training images; nearest uses none."
    )
    rows = table_of(scores)
    rows.to_csv(out / "rows.csv", index=False, lineterminator="\r\n", na_rep="nan")
    rows["value"] = 100 * rows["accuracy"]
    header, lines = cells(rows)
    flat = [[*kind, *line] for kind, part in lines.items() for line in part]
    (out / "table.md").write_text(f"{tables.markdown(['spec', 'step', *header], flat, left=3)}\n{text}\n")
    record = {"config": files.to_json(config), "runs": {k: [p.name for p in v] for k, v in groups.items()}}
    results = [
        {"spec": spec, "step": step, "network": name, "seeds": [[row._asdict() for row in rows] for rows in seeds]}
        for (spec, step, name), seeds in scores.items()
    ]
    files.write_json(
        out / "results.json", record | {"results": results, "layers": layers, "environment": environment.current()}
    )
    panels = {", ".join(kind): part for kind, part in rows.groupby(["spec", "step"], sort=False)}
    plots.over_bits(panels, out / "bits.png")
    for (spec, step), part in lines.items():
        cli.console.print(tables.terminal(header, part, f"weights {spec}, {step}"))
    cli.console.print(text)
    for i, (name, measured) in enumerate(layers.items()):
        plots.sensitivity(measured["layers"], measured["correlation"]["trace"], out / f"layers-{i}.png")
        accuracy = {kind: f"{100 * row.metrics['accuracy']:.2f}" for kind, row in measured["accuracy"].items()}
        cli.console.print(layer_tables(measured))
        cli.console.print(
            f"{name}: each layer alone at {config.sensitivity} bits, {config.specs[0]}, increase of the mean training"
            f" loss on {measured['images']} images. Spearman correlation with the prediction by trace"
            f" {measured['correlation']['trace']['spearman']:.2f}, by d'Hd/2"
            f" {measured['correlation']['hessian']['spearman']:.2f}. Accuracy full {accuracy['full']}, uniform"
            f" {accuracy['uniform']}, bits allocated by trace (mean {measured['allocation']['mean_bits']:.2f})"
            f" {accuracy['allocated']}. First run and first specification."
        )
    cli.console.print(f"{time.monotonic() - started:.0f} s. Results are in {out}.")


if __name__ == "__main__":
    cli.run(main)

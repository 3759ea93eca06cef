"""Trains every method with several seeds, quantizes each network, measures its curvature, and prints one table.

`python -m experiments.compare` is the main job: SGD, SAM, ASAM, GRAD L1 and HERO on the embedded digits images.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro

from experiments import cli, data, plots, progress, runs, tables
from experiments import train as training
from experiments import trainer as trainers
from experiments.config import LABELS, METHODS, TrainConfig
from hero_jax import _check, quantize, spectrum

PyTree = Any


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What to compare. Everything else of a run is the preset of its data set and method."""

    dataset: str = "digits"
    """digits (embedded) or cifar10 (prepared for tensorflow-datasets)."""
    methods: tuple[str, ...] = METHODS
    """Methods, in the order of the table."""
    seeds: int = 10
    """Runs of each method, with seeds 0, 1, ..."""
    model: str | None = None
    """A name in hero_jax.models; default the preset."""
    epochs: int | None = None
    """Passes over the training images; default the preset."""
    train_size: int | None = None
    """Train on this many images; default all."""
    validation_size: int = 0
    """Hold this many training images out and evaluate on them in place of the test set."""
    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    """Bit widths of the weights."""
    spec: str = "channel-narrow"
    """Name of the quantizer: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    curvature_size: int | None = None
    """Training images for the Hessian; default all of digits, 500 of cifar10."""
    curvature_products: int = 200
    """Most Hessian-vector products for the top eigenvalue."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("`methods` must name at least one method; got none.")
        for method in self.methods:
            _check.one_of("methods", method, METHODS)
        for name in ("seeds", "curvature_size", "curvature_products"):
            if getattr(self, name) is not None:
                _check.integer(name, getattr(self, name), low=1)
        for width in self.bits:
            _check.integer("bits", width, low=quantize.MIN_BITS, high=quantize.MAX_BITS)
        quantize.named(self.spec)
        self.run("sgd", 0)

    @property
    def curvature_images(self) -> int:
        """`curvature_size`, or its default: all of digits, and of cifar10 what a product takes seconds for on a CPU."""
        return self.curvature_size or {"digits": 1433, "cifar10": 500}[self.dataset]

    def run(self, method: str, seed: int) -> TrainConfig:
        """The resolved configuration of one run."""
        return TrainConfig(
            method=method,
            dataset=self.dataset,
            model=self.model,
            epochs=self.epochs,
            seed=seed,
            train_size=self.train_size,
            validation_size=self.validation_size,
        ).resolved()


class Measured(NamedTuple):
    """One run: accuracy in percent by bit width (None is full precision), and the top Hessian eigenvalue."""

    method: str
    seed: int
    accuracy: dict[int | None, float]
    eigenvalue: float
    eigenvalue_residual: float
    eigenvalue_converged: bool


def compare(config: CompareConfig, dataset: data.Dataset, out: Path, display: Any) -> list[Measured]:
    """Trains, quantizes and measures every method and seed; each run leaves its folder under `out`/runs."""
    total = display.add_task("all runs", total=len(config.methods) * config.seeds, figures="")
    results = []
    for method in config.methods:
        trainer = trainers.build(config.run(method, 0), dataset)
        for seed in range(config.seeds):
            run = config.run(method, seed)
            assert run.epochs is not None
            report = progress.epochs(display, f"{LABELS[method]}, seed {seed}", run.epochs)
            with runs.RunFolder(out / "runs" / f"{method}-s{seed}", run) as folder:
                trained = training.train(run, dataset, folder, report, trainer)
            results.append(measure(config, run, trainer, trained.variables, dataset))
            display.update(total, advance=1)
    return results


def measure(
    config: CompareConfig, run: TrainConfig, trainer: trainers.Trainer, variables: PyTree, dataset: data.Dataset
) -> Measured:
    """Accuracy at every bit width, and the eigenvalue of largest magnitude of the Hessian of the mean training loss.

    BatchNorm uses its running statistics in both; the loss is the mean cross-entropy of the first `curvature_images`
    training images, without weight decay or augmentation.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]

    def eval_fn(params: PyTree) -> dict[str, float]:
        return trainer.evaluate({"params": params, "batch_stats": batch_stats}, dataset.test)

    rows = quantize.quantize_and_evaluate(eval_fn, params, config.bits, quantize.named(config.spec))
    images = data.Split(*(x[: config.curvature_images] for x in dataset.train))
    matvec, example = trainer.hessian(variables, images)
    products = config.curvature_products
    result = spectrum.top_eigenpairs(matvec, example, jax.random.key(0), k=1, max_matvecs=products)
    return Measured(
        method=run.method,
        seed=run.seed,
        accuracy={None if row.bits is None else int(row.bits): 100 * row.metrics["accuracy"] for row in rows},
        eigenvalue=float(result.eigenvalues[0]),
        eigenvalue_residual=float(result.residuals[0]),
        eigenvalue_converged=bool(result.converged[0]),
    )


class Row(NamedTuple):
    """A method over its seeds: (mean, standard deviation) of the accuracy by bit width and of the eigenvalue."""

    method: str
    n: int
    accuracy: dict[int | None, tuple[float, float]]
    eigenvalue: tuple[float, float]
    all_converged: bool


def summarize(results: list[Measured]) -> list[Row]:
    """One row a method, in the order in which they were measured."""
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        runs_of = [result for result in results if result.method == method]
        rows.append(
            Row(
                method=method,
                n=len(runs_of),
                accuracy={
                    bits: quantize.Spread.of([r.accuracy[bits] for r in runs_of])[:2] for bits in runs_of[0].accuracy
                },
                eigenvalue=quantize.Spread.of([r.eigenvalue for r in runs_of])[:2],
                all_converged=all(r.eigenvalue_converged for r in runs_of),
            )
        )
    return rows


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table."""
    widths = [bits for bits in rows[0].accuracy if bits is not None]
    header = ["method", "n", "full", *(f"{bits} bit" for bits in widths), "top eig."]
    lines = []
    for row in rows:
        accuracies = [tables.cell(*spread) for spread in row.accuracy.values()]
        eigenvalue = tables.cell(*row.eigenvalue, (".3g", ".2g")) + ("" if row.all_converged else "*")
        lines.append([LABELS[row.method], str(row.n), *accuracies, eigenvalue])
    return header, lines


def caption(config: CompareConfig, dataset: data.Dataset) -> str:
    """What the numbers are, in words: nothing in the table means anything without it."""
    spread = f"mean and standard deviation over {config.seeds} seeds" if config.seeds > 1 else "one seed"
    run, where = config.run("sgd", 0), "validation" if config.validation_size else "test"
    trained, tested = len(dataset.train.labels), len(dataset.test.labels)
    measured = min(config.curvature_images, trained)
    return (
        f"{config.dataset}, {run.model}, {run.epochs} epochs on {trained:,} images, last epoch: accuracy in percent on"
        f" {tested:,} {where} images, {spread}. Bits: weights rounded after training,"
        f" grid {config.spec}, kernels only. Top eigenvalue: largest in magnitude of the Hessian"
        f" of the mean training loss on {measured:,} images, to a relative residual of 1e-3 (a star marks rows where"
        " some run did not reach it)."
    )


def main(
    config: Annotated[CompareConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Compares training methods: accuracy, accuracy at low bit widths, top Hessian eigenvalue; one table and plots.

    Args:
        config: The comparison.
        out: Folder for everything, new or empty; default runs/compare-DATASET.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    out = out or Path("runs") / f"compare-{config.dataset}"
    runs.claim(out)
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.dataset, data_dir, progress.task(display, f"decoding {config.dataset}"))
        dataset = data.subset(dataset, config.train_size, config.validation_size)
        results = compare(config, dataset, out, display)
    rows = summarize(results)
    header, lines = cells(rows)
    text = caption(config, dataset)
    record = {
        "config": runs.to_json(config),
        "environment": runs.environment(),
        "results": [r._asdict() | {"accuracy": {str(b or "full"): a for b, a in r.accuracy.items()}} for r in results],
    }
    runs.write_json(out / "results.json", record)
    (out / "table.md").write_text(f"{tables.markdown(header, lines)}\n{text}\n")
    plots.accuracy_over_bits(rows, config.spec, out / "bits.png")
    plots.eigenvalues(results, out / "eigenvalues.png")
    plots.training(
        {m: [out / "runs" / f"{m}-s{s}" for s in range(config.seeds)] for m in config.methods}, out / "training.png"
    )
    cli.console.print(tables.terminal(header, lines))
    cli.console.print(text)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Table, plots and runs are in {out}.")


if __name__ == "__main__":
    cli.run(main)

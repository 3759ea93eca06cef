"""Trains every method with several seeds, quantizes each network, measures its curvature, and prints one table.

`python -m experiments.compare` is the main job: SGD, SAM, ASAM, GRAD L1 and HERO on the embedded digits images.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from experiments import cli, data, progress
from experiments.analysis import plots, tables
from experiments.config import LABELS, METHODS, TrainConfig
from experiments.measure import sweep
from experiments.measure.engine import Engine
from experiments.storage import environment, files
from hero_jax import errors, quantize
from hero_jax.evaluate import Spread

# Fields in which a comparison may differ from the one that its folder holds: what is missing is trained and measured.
MAY_DIFFER = ("seeds", "methods", "bits", "spec", "curvature_size", "curvature_products")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What to compare. Everything else of a run is the preset of its data set and method."""

    dataset: str = "digits"
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
    methods: tuple[str, ...] = ("sgd", "sam", "asam", "grad_l1", "hero")
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
    """Hold this many training images out, and evaluate on them too."""
    test_size: int | None = None
    """Evaluate on this many test images; default all."""
    label_noise: float = 0.0
    """Share of the training images whose label is altered; every evaluation is on clean labels."""
    label_noise_kind: str = "symmetric"
    """symmetric, uniform or asymmetric: see docs/data.md."""
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
            errors.one_of("methods", method, METHODS)
        errors.integer("seeds", self.seeds, low=1)
        quantize.named(self.spec)
        self.run("sgd", 0)
        _ = self.measuring

    @property
    def measuring(self) -> sweep.Measuring:
        """What is measured of each run."""
        return sweep.Measuring((self.spec,), self.bits, self.curvature_size, self.curvature_products)

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
            test_size=self.test_size,
            label_noise=self.label_noise,
            label_noise_kind=self.label_noise_kind,
        ).resolved()


class Measured(NamedTuple):
    """One run: accuracy in percent by bit width (None is full precision), and the top Hessian eigenvalue."""

    method: str
    seed: int
    accuracy: dict[int | None, float]
    eigenvalue: float
    eigenvalue_residual: float
    eigenvalue_converged: bool


def compare(
    config: CompareConfig, dataset: data.Dataset, out: Path, begin: sweep.Begin, engine: Engine = Engine()
) -> list[Measured]:
    """Trains, quantizes and measures every method and seed, or what is left of them, in folders under `out`/runs."""
    configs = {method: config.run(method, 0) for method in config.methods}
    return [
        Measured(
            method=run.name,
            seed=run.config.seed,
            accuracy={
                None if bits == "full" else int(bits): accuracy
                for bits, accuracy in run.measured["quantized"][config.spec].items()
            },
            **{name: run.measured["curvature"][name] for name in Measured._fields if name.startswith("eigenvalue")},
        )
        for run in sweep.run_all(configs, range(config.seeds), dataset, out, begin, config.measuring, engine)
    ]


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
                accuracy={bits: Spread.of([r.accuracy[bits] for r in runs_of])[:2] for bits in runs_of[0].accuracy},
                eigenvalue=Spread.of([r.eigenvalue for r in runs_of])[:2],
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
    spread = "mean and standard deviation over n seeds" if config.seeds > 1 else "one seed"
    run = config.run("sgd", 0)
    trained = config.train_size or dataset.train.size - config.validation_size
    tested = config.test_size or dataset.test.size
    measured = min(config.measuring.curvature_images(config.dataset), trained)
    noise = f", {config.label_noise:.0%} {config.label_noise_kind} noise" if config.label_noise else ""
    return (
        f"{config.dataset}, {run.model}, {run.epochs} epochs on {trained:,} images{noise}, last epoch: accuracy in"
        f" percent on {tested:,} test images, {spread}. Bits: weights rounded after training,"
        f" grid {config.spec}, kernels only. Top eigenvalue: largest in magnitude of the Hessian"
        f" of the mean training loss on {measured:,} images, to a relative residual of 1e-3 (a star marks rows where"
        " some run did not reach it)."
    )


def main(
    config: Annotated[CompareConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),
) -> None:
    """Compares training methods: accuracy, accuracy at low bit widths, top Hessian eigenvalue; one table and plots.

    Args:
        config: The comparison.
        out: Folder for everything: new, empty, or that of the same comparison, which is continued, with other seeds,
            methods or measurements if you like; default runs/compare-DATASET.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
        engine: Where the runs are made.
    """
    out = out or Path("runs") / f"compare-{config.dataset}"
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.dataset, data_dir, progress.decoding(display, config.dataset))
        sweep.check({method: config.run(method, 0) for method in config.methods}, dataset)
        files.claim_same(out, config, may_differ=MAY_DIFFER)
        results = compare(config, dataset, out, progress.lines(display), engine)
    if not results:
        raise files.Failed(f"Every run diverged; {out} has the messages.")
    rows = summarize(results)
    header, lines = cells(rows)
    text = caption(config, dataset)
    record = {
        "config": files.to_json(config),
        "environment": environment.current(),
        "results": [r._asdict() | {"accuracy": {str(b or "full"): a for b, a in r.accuracy.items()}} for r in results],
    }
    files.write_json(out / "results.json", record)
    (out / "table.md").write_text(f"{tables.markdown(header, lines)}\n{text}\n")
    plots.accuracy_over_bits(rows, config.spec, out / "bits.png")
    plots.eigenvalues(results, out / "eigenvalues.png")
    folders = {row.method: [r.seed for r in results if r.method == row.method] for row in rows}
    plots.training(
        {m: [out / "runs" / f"{m}-s{s}" for s in seeds] for m, seeds in folders.items()}, out / "training.png"
    )
    cli.console.print(tables.terminal(header, lines))
    cli.console.print(text)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Table, plots and runs are in {out}.")


if __name__ == "__main__":
    cli.run(main)

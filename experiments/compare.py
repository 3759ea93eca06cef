"""Trains every method with several seeds, quantizes each network, measures its curvature, and prints one table.

`python -m experiments.compare` is the main job: SGD, SAM, ASAM, GRAD L1 and HERO on the embedded digits images.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, data, progress
from experiments.analysis import plots, sections, table, tables
from experiments.analysis.tables import Frame
from experiments.config import METHODS, TrainConfig
from experiments.measure import sweep
from experiments.storage import environment, files
from hero_jax import errors, quantize

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

    @property
    def widths(self) -> list[str]:
        """Names of the bit widths, full precision first."""
        return ["full", *map(str, self.bits)]

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


def shown(rows: Frame, config: CompareConfig) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, of rows of the table of runs: a line a method, in the order of the comparison."""
    labels = {table.width_label(bits, config.spec): table.width_label(bits) for bits in config.widths}
    labels |= {"eigenvalue": "top eig."}
    end = sections.at_end(rows, labels)
    texts = tables.starred(tables.means(end, formats={"top eig.": tables.SCIENTIFIC}), "top eig.", rows)
    columns = ["n", *labels.values()]
    return ["method", *columns], tables.lines(texts, sections.networks(rows), columns)


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
) -> None:
    """Compares training methods: accuracy, accuracy at low bit widths, top Hessian eigenvalue; one table and plots.

    Args:
        config: The comparison.
        out: Folder for everything: new, empty, or that of the same comparison, which is continued, with other seeds,
            methods or measurements if you like; default runs/compare-DATASET.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    out = out or Path("runs") / f"compare-{config.dataset}"
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.dataset, data_dir, progress.decoding(display, config.dataset))
        configs = {method: config.run(method, 0) for method in config.methods}
        sweep.check(configs, dataset)
        files.claim_same(out, config, may_differ=MAY_DIFFER)
        found = sweep.run_all(configs, range(config.seeds), dataset, out, progress.lines(display), config.measuring)
    if not found:
        raise files.Failed(f"Every run diverged; {out} has the messages.")
    rows = table.of_sweep(found)
    header, lines = shown(rows, config)
    text = caption(config, dataset)
    results = [
        {"method": run.name, "seed": run.config.seed, "accuracy": run.measured["quantized"][config.spec]}
        | {name: value for name, value in run.measured["curvature"].items() if name.startswith("eigenvalue")}
        for run in found
    ]
    record = {"config": files.to_json(config), "environment": environment.current(), "results": results}
    files.write_json(out / "results.json", record)
    (out / "table.md").write_text(f"{tables.markdown(header, lines)}\n{text}\n")
    plots.over_bits({config.spec: rows.dropna(subset="bits")}, out / "bits.png")
    eigenvalues = sections.at_end(rows, {"eigenvalue": ""})
    eigenvalues["value"] = eigenvalues["value"].abs()
    plots.each_run(eigenvalues, "|top Hessian eigenvalue|", out / "eigenvalues.png", log=True)
    loss = "training loss\n(at the unperturbed weights)"
    curves = {loss: sections.along(rows, "train_loss"), "accuracy, %": sections.along(rows, "accuracy")}
    plots.along_epochs(curves, out / "training.png", log=[loss])
    cli.console.print(tables.terminal(header, lines))
    cli.console.print(text)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Table, plots and runs are in {out}.")


if __name__ == "__main__":
    cli.run(main)

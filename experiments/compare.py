"""The main job: `python -m experiments.compare`, SGD, SAM, ASAM, GRAD L1 and HERO on the digits in one table."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import cli, data, progress
from experiments.analysis import plots, sections, tables, tidy, verdict
from experiments.analysis.tables import Frame
from experiments.config import Budget, Grouped, Labels, Task, TrainConfig, resolve
from experiments.config.fields import Bits, Count, Whole, number
from experiments.config.methods import Name
from experiments.measure import sweep
from experiments.measure.workers import Engine
from experiments.storage import claims, environment, files, records

# Fields in which a comparison may differ from the one that its folder holds: what is missing is trained and measured.
MAY_DIFFER = ("seeds", "methods", "bits", "spec", "curvature_size", "curvature_products")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Grouped):
    """What to compare. Everything else of a run is the preset of its data set and method."""

    methods: tuple[Name, ...] = ("sgd", "sam", "asam", "grad_l1", "hero")
    """Methods, in the order of the table."""
    task: Task
    budget: Budget
    labels: Labels
    seeds: Count = 10
    """Runs of each method, with seeds 0, 1, ..."""
    validation_size: Whole = 0
    """Hold this many training images out, and evaluate on them too."""
    bits: tuple[Bits, ...] = (8, 6, 5, 4, 3, 2)
    """Bit widths of the weights."""
    spec: str = "channel-narrow"
    """Name of the quantizer: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    curvature_size: Count | Literal["preset"] = "preset"
    """Training images for the Hessian; preset: all of digits, 500 of others."""
    curvature_products: Count = 200
    """Most Hessian-vector products for the top eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ValueError("`methods` must name at least one method; got none.")
        _ = self.measuring

    @property
    def measuring(self) -> sweep.Measuring:
        """What is measured of each run."""
        size = sweep.curvature_size(self.curvature_size, self.task.dataset)
        return sweep.Measuring((self.spec,), self.bits, size, self.curvature_products)

    def run(self, method: str, seed: int) -> TrainConfig:
        """The resolved configuration of one run."""
        shared = {name: value for name, value in self.flat().items() if name not in MAY_DIFFER}
        return resolve(method, **shared, seed=seed)


def shown(rows: Frame, config: CompareConfig) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, of rows of the table of runs: a line a method, in the order of the comparison."""
    widths = ["full", *map(str, config.bits)]
    labels = {tidy.width_label(bits, config.spec): tidy.width_label(bits) for bits in widths}
    labels |= {"eigenvalue": "top eig."}
    texts = tables.starred(tables.means(sections.at_end(rows, labels)), "top eig.", rows)
    columns = ["n", *labels.values()]
    return ["method", *columns], tables.lines(texts, sections.networks(rows), columns)


def caption(config: CompareConfig, dataset: data.Dataset) -> str:
    """What the numbers are, in words: nothing in the table means anything without it."""
    spread = "mean and standard deviation over n seeds" if config.seeds > 1 else "one seed"
    task, labels = config.task, config.labels
    trained = number(task.train_size) or dataset.train.size - config.validation_size
    tested = number(task.test_size) or dataset.test.size
    measured = min(config.measuring.curvature_size, trained)
    noise = f", {labels.label_noise:.0%} {labels.label_noise_kind} noise" if labels.label_noise else ""
    return (
        f"{task.dataset}, {task.model}, {config.budget.epochs} epochs on {trained:,} images{noise}, last epoch:"
        f" accuracy in percent on {tested:,} test images, {spread}. Bits: weights rounded after training,"
        f" grid {config.spec}, kernels only. Top eigenvalue: largest in magnitude of the Hessian"
        f" of the mean training loss on {measured:,} images, to a relative residual of 1e-3 (a star marks rows where"
        " some run did not reach it); a low one may only mean that the training images are fitted."
    )


def verdicts(rows: Frame, eigenvalues: Frame, config: CompareConfig) -> list[str]:
    """Which method has the best mean in full precision, at the fewest bits and in curvature, and by how much."""
    widths = ["full", *map(str, sorted(config.bits)[:1])]
    metrics = {f"{tidy.width_label(width)}, points": tidy.width_label(width, config.spec) for width in widths}
    ends = {name: sections.at_end(rows, {metric: ""}) for name, metric in metrics.items()}
    top = "top eigenvalue"
    return verdict.verdicts(ends | {top: eigenvalues}, sections.networks(rows), [top])


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
    out = out or Path("runs") / f"compare-{config.task.dataset}"
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.task.dataset, data_dir, progress.decoding(display, config.task.dataset))
        configs = {method: config.run(method, 0) for method in config.methods}
        sweep.check(configs, dataset)
        claims.claim_same(out, config, may_differ=MAY_DIFFER)
        begin = progress.lines(display)
        found = sweep.run_all(configs, range(config.seeds), dataset, out, begin, config.measuring, engine)
    if not found:
        raise files.Failed(f"Every run diverged; {out} has the messages.")
    rows = tidy.of_sweep(found)
    header, lines = shown(rows, config)
    text = caption(config, dataset)
    results = [
        {"method": run.name, "seed": run.config.seed, "accuracy": run.measured["quantized"][config.spec]}
        | {name: value for name, value in run.measured["curvature"].items() if name.startswith("eigenvalue")}
        for run in found
    ]
    record = {"config": claims.to_json(config), "environment": environment.current(), "results": results}
    records.write(out / "results.json", record)
    eigenvalues = sections.at_end(rows, {"eigenvalue": ""})
    eigenvalues["value"] = eigenvalues["value"].abs()
    told = "\n".join(verdicts(rows, eigenvalues, config))
    files.write(out / "table.md", f"{tables.markdown(header, lines)}\n{text}\n\n{told}\n".rstrip("\n") + "\n")
    plots.over_bits({config.spec: rows.dropna(subset="bits")}, out / "bits.png")
    plots.each_run(eigenvalues, "|top Hessian eigenvalue|", out / "eigenvalues.png", log=True)
    loss = "training loss\n(at the unperturbed weights)"
    curves = {loss: sections.along(rows, "train_loss"), "accuracy, %": sections.along(rows, "accuracy")}
    plots.along_epochs(curves, out / "training.png", log=[loss])
    cli.console.print(tables.terminal(header, lines))
    cli.console.print(text)
    if told:
        cli.console.print(told)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Table, plots and runs are in {out}.")


if __name__ == "__main__":
    cli.run(main)

"""Quantizes saved runs: `python -m experiments.quantize runs/digits-mlp-hero-s0 runs/digits-mlp-sgd-s0`.

Accuracy at each bit width for named specifications and optional steps after rounding, one line for each network; runs
that differ in their seed only are one network with a mean and a spread. Leaves table.md, rows.csv, results.json and
bits.png; with `--sensitivity` also layers-*.png, and an allocation of bits to layers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from rich import box
from rich.table import Table

from experiments import cli, progress
from experiments.analysis import plots, table, tables
from experiments.analysis.networks import group_runs
from experiments.analysis.tables import Frame
from experiments.config.fields import number
from experiments.measure.quantization import Key, QuantizeConfig, evaluate, load, measure_layers
from experiments.storage import environment, files
from hero_jax import quantize

# What rows.csv has of each `QuantizedScore` besides accuracy and loss.
MEASURED = ("flipped", "sqnr_db", "fraction", "ideal_bytes", "stored_bytes")


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
        names = {network[0].task.dataset for network in loaded.values()}
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
        for name, paths in groups.items() if config.sensitivity != "none" else ():
            layers[name] = measure_layers(config, loaded[paths[0]][1], quantize.named(config.specs[0]), report)
    images = min(number(config.images) or 10**9, next(iter(loaded.values()))[1].dataset.test.size)
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

"""Quantizes saved runs: `python -m experiments.quantize runs/digits-mlp-hero-s0 runs/digits-mlp-sgd-s0`.

Runs that differ in their seed only are one network with a mean and a spread. Leaves table.md, rows.csv, results.json
and bits.png; with `--sensitivity` also layers-*.png, and an allocation of bits to layers.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from experiments import cli, progress
from experiments.analysis import plots, tables, tidy
from experiments.analysis.networks import group_runs
from experiments.analysis.tables import Frame
from experiments.config.fields import number
from experiments.measure.quantization import QuantizeConfig, evaluate, measure_layers
from experiments.measure.saved import load
from experiments.storage import claims, environment, files, records
from hero_jax import quantize


def table_of(results: Sequence[Mapping[str, Any]]) -> Frame:
    """One row for each run, specification, step and bit width of results.json."""
    measured = ("flipped", "sqnr_db", "fraction", "ideal_bytes", "stored_bytes")
    return pd.DataFrame(
        {
            **{name: found[name] for name in ("spec", "step", "network")},
            "run": i,
            "bits": "full" if row["bits"] is None else str(row["bits"]),
            **{name: row["metrics"][name] for name in ("accuracy", "loss")},
            "drop": row["drop"]["accuracy"],
            **{name: row[name] for name in measured},
        }
        for found in results
        for i, rows in enumerate(found["seeds"])
        for row in rows
    )


def cells(rows: Frame) -> tuple[list[str], dict[tuple[str, str], list[list[str]]]]:
    """Header and, by specification and step, lines of a table; `rows` have the accuracy in percent as their value."""
    rows, lines = rows.assign(label=rows["bits"].map(tidy.width_label)), {}
    columns = ["n", *rows["label"].unique()]
    for kind, part in rows.groupby(["spec", "step"], sort=False):
        lines[kind] = tables.lines(tables.means(part), part["network"].unique(), columns)
    return ["network", *columns], lines


def layer_lines(measured: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the layers of one network."""
    lines = []
    for layer in measured["layers"]:
        values = (f"{layer[name]:.3g}" for name in ("increase", "by_trace", "by_hessian"))
        bits = measured["allocation"]["bits"][layer["layer"]]
        lines.append([layer["layer"], f"{layer['size']:,}", *values, str(bits)])
    return ["layer", "weights", "increase", "by trace", "by d'Hd/2", "bits"], lines


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
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}
    with progress.bar() as display:
        report = progress.steps(display)
        loaded = load(folders, data_dir, report, config.calibration)
        groups = group_runs((path, run.config) for path, run in loaded.items())
        out = out or folders[0] / "quantize"
        ours = ("table.md", "rows.csv", "bits.png", *(f"layers-{i}.png" for i in range(len(groups))))
        with claims.results(out, ours):
            for spec, step, (name, paths) in itertools.product(config.specs, config.steps, groups.items()):
                seeds = []
                for path in paths:
                    line = functools.partial(report, f"{path.name} {spec} {step}")
                    scores = evaluate(config, loaded[path], quantize.named(spec), step, line)
                    seeds.append([score._asdict() for score in scores])
                results.append({"spec": spec, "step": step, "network": name, "seeds": seeds})
            for name, paths in groups.items() if config.sensitivity != "none" else ():
                layers[name] = measure_layers(config, loaded[paths[0]], quantize.named(config.specs[0]), report)
            first = loaded[folders[0]]
            images = min(number(config.images) or first.test.size, first.test.size)
            text = (
                f"{first.config.task.dataset}: accuracy in percent on {images:,} images, kernels rounded after"
                " training; mean \u00b1 standard deviation over n seeds. Steps use"
                f" {config.calibration} training images; nearest uses none."
            )
            table = table_of(results)
            rows = table.assign(value=100 * table["accuracy"])
            header, lines = cells(rows)
            files.write(out / "rows.csv", table.to_csv(index=False, lineterminator="\r\n", na_rep="nan"))
            flat = [[*kind, *line] for kind, part in lines.items() for line in part]
            files.write(out / "table.md", f"{tables.markdown(['spec', 'step', *header], flat, left=3)}\n{text}\n")
            panels = {", ".join(kind): part for kind, part in rows.groupby(["spec", "step"], sort=False)}
            plots.over_bits(panels, out / "bits.png")
            for i, measured in enumerate(layers.values()):
                plots.sensitivity(measured["layers"], measured["correlation"]["trace"], out / f"layers-{i}.png")
            record = {"config": claims.to_json(config), "runs": {k: [p.name for p in v] for k, v in groups.items()}}
            record |= {"results": results, "layers": layers, "environment": environment.current()}
            records.write(out / "results.json", record)
    for (spec, step), part in lines.items():
        cli.console.print(tables.terminal(header, part, f"weights {spec}, {step}"))
    cli.console.print(text)
    for name, measured in layers.items():
        accuracy = {kind: f"{100 * row.metrics['accuracy']:.2f}" for kind, row in measured["accuracy"].items()}
        cli.console.print(tables.terminal(*layer_lines(measured)))
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

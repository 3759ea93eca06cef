"""Measures the curvature of a saved run: `python -m experiments.hessian runs/digits-mlp-hero-s0`.

Prints the top Hessian eigenvalues with their residuals, the trace, the Frobenius norm and the trace of every layer with
their standard errors, and leaves them as curvature.json beside plots of the spectral density and the layer traces.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.table import Table

from experiments import cli, progress
from experiments.analysis import plots
from experiments.config.fields import number
from experiments.measure.hessian import HessianConfig, measure
from experiments.storage import environment, files
from experiments.training import compiled


def tables(measured: dict[str, Any]) -> list[Table]:
    """The eigenvalues, and the traces of the layers, for a terminal."""
    top = Table("eigenvalue", "residual", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for value, residual, converged in zip(
        *(measured[k] for k in ("eigenvalues", "residuals", "converged")), strict=True
    ):
        top.add_row(f"{value:.5g}", f"{residual:.1e}", "" if converged else "not converged")
    layers = Table("layer", "weights", "trace", "\u00b1 sem", "trace/weight", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in measured["layer_traces"]:
        cells = (f"{row['mean']:.4g}", f"{row['sem']:.2g}", f"{row['mean'] / row['size']:.3g}")
        layers.add_row(row["layer"], f"{row['size']:,}", *cells)
    return [top, layers]


def main(
    run: Annotated[Path, tyro.conf.Positional],
    config: Annotated[HessianConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Measures the curvature of a saved run: top eigenvalues, trace, norm, layer traces, spectral density; with plots.

    Args:
        run: A run folder with a checkpoint.
        config: What to measure.
        out: Folder for the results, new or empty; default RUN/hessian-SPLIT.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    out = out or run / f"hessian-{config.split}"
    started = time.monotonic()
    with progress.bar() as display:
        report = progress.steps(display)
        _, trainer, variables, dataset = compiled.load(run, data_dir, report)
        files.claim(out, besides=("density.png", "layers.png"))
        split = getattr(dataset, config.split).first(number(config.images))
        operator = trainer.hessian(variables, split)
        measured = measure(config, operator, report)
    record = {"config": files.to_json(config), "run": run.name, "images": split.size, **measured}
    plots.spectral_density(measured, out / "density.png")
    plots.layer_traces(measured, out / "layers.png")
    # Last, so that a folder with it is whole.
    files.write_json(out / "curvature.json", record | {"environment": environment.current()})
    for table in tables(measured):
        cli.console.print(table)
    trace, norm = measured["trace"], measured["hessian_norm"]
    cli.console.print(
        f"trace {trace['mean']:.5g} \u00b1 {trace['sem']:.2g}, Frobenius norm {norm['mean']:.5g}"
        f" \u00b1 {norm['sem']:.2g} (standard errors of {trace['probes']} probes)"
    )
    cli.console.print(
        f"Hessian of the mean cross-entropy over {split.size:,} {config.split} images, running BatchNorm"
        f" statistics, no augmentation, no weight decay. {time.monotonic() - started:.0f} s. Results are in {out}."
    )


if __name__ == "__main__":
    cli.run(main)

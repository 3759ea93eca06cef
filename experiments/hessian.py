"""Measures the curvature of a saved run: `python -m experiments.hessian runs/digits-mlp-hero-s0`.

Prints it, and leaves it as curvature.json beside plots of the spectral density and the traces of the layers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, progress
from experiments.analysis import plots, tables
from experiments.config.fields import number
from experiments.measure.hessian import HessianConfig, measure
from experiments.storage import claims, environment, records
from experiments.training import compiled


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
        with claims.results(out, ("density.png", "layers.png")):
            split = getattr(dataset, config.split).first(number(config.images))
            measured = measure(config, trainer.hessian(variables, split), report)
            plots.spectral_density(measured, out / "density.png")
            plots.layer_traces(measured, out / "layers.png")
            record = {"config": claims.to_json(config), "run": run.name, "images": split.size, **measured}
            records.write(out / "curvature.json", record | {"environment": environment.current()})
    pairs = zip(measured["eigenvalues"], measured["residuals"], measured["converged"], strict=True)
    lines = [[f"{value:.5g}", f"{residual:.1e}", "" if found else "not converged"] for value, residual, found in pairs]
    cli.console.print(tables.terminal(["eigenvalue", "residual", ""], lines))
    lines = []
    for row in measured["layer_traces"]:
        numbers = f"{row['mean']:.4g}", f"{row['sem']:.2g}", f"{row['mean'] / row['size']:.3g}"
        lines.append([row["layer"], f"{row['size']:,}", *numbers])
    cli.console.print(tables.terminal(["layer", "weights", "trace", "\u00b1 sem", "trace/weight"], lines))
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

"""Measures the curvature of a saved run: `python -m experiments.hessian runs/digits-mlp-hero-s0`.

Prints the top Hessian eigenvalues with their residuals, the trace, the Frobenius norm and the trace of every layer with
their standard errors, and leaves them as curvature.json beside plots of the spectral density and the layer traces.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich import box
from rich.table import Table

from experiments import cli, progress
from experiments.analysis import plots
from experiments.storage import environment, files
from experiments.training import compiled
from hero_jax import curvature, errors, spectrum

PyTree = Any
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class HessianConfig:
    """What to measure, and how well."""

    split: str = "train"
    """train (the images the run was trained on, without augmentation) or test."""
    images: int | None = None
    """Measure the mean loss over the first so many images; default all."""
    eigenvalues: int = 5
    """Eigenvalues of largest magnitude to find."""
    rtol: float = 1e-3
    """Relative residual at which an eigenpair counts as found."""
    max_products: int = 300
    """Most products to spend on the eigenvalues."""
    probes: int = 30
    """Random probes of trace, norm and layer traces."""
    density_probes: int = 3
    """Random starts of the spectral density; the band is their standard error."""
    density_steps: int = 40
    """Lanczos steps from each of them."""
    seed: int = 0
    """Of all random vectors."""

    def __post_init__(self) -> None:
        errors.one_of("split", self.split, SPLITS)
        for name in ("eigenvalues", "max_products", "density_steps"):
            errors.integer(name, getattr(self, name), low=1)
        # One probe has no spread, so no error.
        for name in ("probes", "density_probes"):
            errors.integer(name, getattr(self, name), low=2)
        if self.images is not None:
            errors.integer("images", self.images, low=1)
        errors.integer("seed", self.seed, low=0)
        errors.positive("rtol", self.rtol)
        if self.max_products < self.eigenvalues:
            raise ValueError(
                f"`max_products` must be at least the {self.eigenvalues} eigenvalues; got {self.max_products}."
            )


def measure(
    config: HessianConfig,
    operator: curvature.Operator,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """All quantities of one operator, as JSON values.

    `report(what, done, total)` is called after every product.
    """
    keys = jax.random.split(jax.random.key(config.seed), 3)

    def watched(what: str, total: int) -> curvature.HostOperator:
        done = 0

        def product(vector: PyTree) -> PyTree:
            nonlocal done
            result = jax.block_until_ready(operator(vector))
            done += 1
            report(what, done, total)
            return result

        return curvature.HostOperator(product, operator.like)

    number = min(config.eigenvalues, sum(x.size for x in jax.tree.leaves(operator.like)))
    pairs = spectrum.top_eigenpairs(
        watched("eigenvalues", config.max_products),
        keys[0],
        k=number,
        rtol=config.rtol,
        max_matvecs=config.max_products,
    )
    report("eigenvalues", config.max_products, config.max_products)
    moments = spectrum.moments(watched("trace and norm", config.probes), keys[1], num_probes=config.probes)
    density = spectrum.spectral_density(
        watched("density", config.density_probes * config.density_steps),
        keys[2],
        num_probes=config.density_probes,
        num_steps=config.density_steps,
    )
    report("density", config.density_probes * config.density_steps, config.density_probes * config.density_steps)
    layers = jax.tree_util.tree_leaves_with_path(moments.layer_traces.mean)
    sems = jax.tree.leaves(moments.layer_traces.sem)
    sizes = [x.size for x in jax.tree.leaves(operator.like)]
    return {
        "eigenvalues": np.asarray(pairs.eigenvalues).tolist(),
        "residuals": np.asarray(pairs.residuals).tolist(),
        "converged": np.asarray(pairs.converged).tolist(),
        "products": int(pairs.num_matvecs),
        "asymmetry": float(pairs.asymmetry),
        "trace": _estimate(moments.trace),
        "hessian_norm": _estimate(moments.frobenius_norm),
        "layer_traces": [
            {
                "layer": jax.tree_util.keystr(path[1:], simple=True, separator="/"),
                "size": n,
                "mean": float(x),
                "sem": float(s),
            }
            for (path, x), s, n in zip(layers, sems, sizes, strict=True)
        ],
        "density": {
            name: np.asarray(getattr(density, name)).tolist()
            for name in ("grid", "density", "sem", "bandwidth", "nodes", "weights")
        },
    }


def _estimate(estimate: spectrum.Estimate) -> dict[str, float]:
    return {"mean": float(estimate.mean), "sem": float(estimate.sem), "probes": int(estimate.num_probes)}


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
        split = getattr(dataset, config.split).first(config.images)
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

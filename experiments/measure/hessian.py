"""All that is measured of the Hessian of a saved run."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import numpy as np

from experiments.config.fields import Checked, Count, Positive, Several, Whole
from experiments.training import compiled
from hero_jax import curvature, spectrum
from hero_jax.errors import ArgumentError

PyTree = Any


@dataclasses.dataclass(frozen=True)
class HessianConfig(Checked):
    """What to measure, and how well."""

    split: Literal["train", "test"] = "train"
    """train (the images the run was trained on, without augmentation) or test."""
    images: Count | Literal["all"] = "all"
    """Measure the mean loss over this many images, the first ones."""
    eigenvalues: Count = 5
    """Eigenvalues of largest magnitude to find."""
    rtol: Positive = 1e-3
    """Relative residual at which an eigenpair counts as found."""
    max_products: Count = 300
    """Most products to spend on the eigenvalues."""
    probes: Several = 30  # one has no spread, so no error
    """Random probes of trace, norm and layer traces."""
    density_probes: Several = 3
    """Random starts of the spectral density; the band is their standard error."""
    density_steps: Count = 40
    """Lanczos steps from each of them."""
    seed: Whole = 0
    """Of all random vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_products < self.eigenvalues:
            raise ArgumentError(
                f"`max_products` must be at least the {self.eigenvalues} eigenvalues; got {self.max_products}."
            )


def measure(config: HessianConfig, operator: curvature.Operator, report: compiled.Report) -> dict[str, Any]:
    """All quantities of one operator, as JSON values; `report(what, done, total)` is called after every product."""
    keys = jax.random.split(jax.random.key(config.seed), 3)

    def watched(what: str, total: int) -> curvature.HostOperator:
        count = itertools.count(1)

        def product(vector: PyTree) -> PyTree:
            result = jax.block_until_ready(operator(vector))
            report(what, next(count), total)
            return result

        return curvature.HostOperator(product, operator.like)

    sizes, products = [x.size for x in jax.tree.leaves(operator.like)], config.max_products
    pairs = spectrum.top_eigenpairs(
        watched("eigenvalues", products),
        keys[0],
        k=min(config.eigenvalues, sum(sizes)),
        rtol=config.rtol,
        max_matvecs=products,
    )
    report("eigenvalues", products, products)
    moments = spectrum.moments(watched("trace and norm", config.probes), keys[1], num_probes=config.probes)
    steps = config.density_probes * config.density_steps
    density = spectrum.spectral_density(
        watched("density", steps), keys[2], num_probes=config.density_probes, num_steps=config.density_steps
    )
    report("density", steps, steps)
    traces, names = moments.layer_traces, ("grid", "density", "sem", "bandwidth", "nodes", "weights")
    parts = zip(jax.tree.leaves_with_path(traces.mean), jax.tree.leaves(traces.sem), sizes, strict=True)
    return {
        **{name: np.asarray(getattr(pairs, name)).tolist() for name in ("eigenvalues", "residuals", "converged")},
        "products": int(pairs.num_matvecs),
        "asymmetry": float(pairs.asymmetry),
        "trace": _estimate(moments.trace),
        "hessian_norm": _estimate(moments.frobenius_norm),
        "layer_traces": [
            {"layer": _name(path), "size": size, "mean": float(mean), "sem": float(sem)}
            for (path, mean), sem, size in parts
        ],
        "density": {name: np.asarray(getattr(density, name)).tolist() for name in names},
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")


def _estimate(estimate: spectrum.Estimate) -> dict[str, float]:
    return {"mean": float(estimate.mean), "sem": float(estimate.sem), "probes": int(estimate.num_probes)}

"""What Hessian products and eigenvalues cost, beside the PyTorch tools: `python -m benchmarks.curvature`.

One process, the same weights (ResNet20, briefly trained here) and the same images for all. Three measurements:

1. a Hessian-vector product against a gradient: median times in turn, and temporary memory as XLA counts it;
2. the top eigenvalues by `spectrum.top_eigenpairs`, PyHessian and hessian-eigenthings to the same relative residual:
   products, and seconds with compilation apart (`benchmarks.peers` says how the peers are driven);
3. the memory of a product over 50,000 images in microbatches against that of one microbatch, compiled but not run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.table import Table

from benchmarks import peers
from experiments import cli, data
from experiments.config import resolve
from experiments.storage import claims, environment, records
from experiments.training import compiled, loop
from hero_jax import curvature, errors, models, spectrum

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    images: int = 2000
    """Images of the eigenvalues; the network is trained on the same ones."""
    k: int = 5
    """Eigenvalues of largest magnitude."""
    rtol: float = 1e-3
    """Relative residual that all of them must reach."""
    epochs: int = 4
    """Epochs of training before anything is measured."""
    batch_size: int = 128
    """Images of the timed gradient and product, of a microbatch, and of the batches of the eigenvalues, all tools."""
    repeats: int = 9
    """Times that gradient and product are timed, after one that is not."""
    pyhessian_tol: tuple[float, ...] = ()
    """Tolerances to try PyHessian with, coarse to fine; default from 1e-3 down to where float32 ends."""
    with_peers: bool = True
    """Run the PyTorch tools too, where they are installed."""
    data_dir: Path | None = None
    """Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for name in ("images", "k", "epochs", "batch_size", "repeats"):
            errors.integer(name, getattr(self, name), low=1)
        errors.positive("rtol", self.rtol)


def measure_product(loss_fn: Any, params: PyTree, batch: PyTree, repeats: int) -> dict[str, Any]:
    """Median seconds and temporary MiB of a gradient and of a Hessian-vector product on one batch."""
    vector = jax.tree.map(jnp.ones_like, params)
    arguments = {"gradient": (params, batch), "product": (params, vector, batch)}
    functions = {"gradient": jax.grad(loss_fn), "product": functools.partial(curvature.hvp, loss_fn)}
    compiled, times, row = dict[str, Any](), {name: [] for name in functions}, {}
    for name, function in functions.items():
        compiled[name] = jax.jit(function).lower(*arguments[name]).compile()
        jax.block_until_ready(compiled[name](*arguments[name]))
        row[f"{name}_mib"] = compiled[name].memory_analysis().temp_size_in_bytes / 2**20
    for _ in range(repeats):
        for name, function in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(function(*arguments[name]))
            times[name].append(time.perf_counter() - started)
    for name, seconds in times.items():
        row[f"{name}_seconds"] = statistics.median(seconds)
        row[f"{name}_quartiles"] = statistics.quantiles(seconds, n=4)[::2]
    row["time_ratio"] = row["product_seconds"] / row["gradient_seconds"]
    row["memory_ratio"] = row["product_mib"] / row["gradient_mib"]
    return row


def top_eigenvalues(loss_fn: Any, params: PyTree, batches: list[PyTree], k: int, rtol: float) -> peers.PeerResult:
    """`spectrum.top_eigenpairs` in the form of its peers; one product and one iteration first, to compile."""
    operator = curvature.hessian_operator(loss_fn, params, curvature.Stream(batches))

    def find(max_matvecs: int) -> spectrum.Eigenpairs:
        key = jax.random.key(0)
        return spectrum.top_eigenpairs(operator, key, k=k, rtol=rtol, max_matvecs=max_matvecs)

    jax.block_until_ready(find(1))
    started = time.perf_counter()
    pairs = jax.block_until_ready(find(300))
    seconds = time.perf_counter() - started
    residuals = []
    for i in range(k):
        vector = jax.tree.map(lambda v, i=i: v[i], pairs.eigenvectors)
        rest = jax.tree.map(lambda h, v, i=i: h - pairs.eigenvalues[i] * v, operator(vector), vector)
        residuals.append(float(optax.tree.norm(rest) / abs(pairs.eigenvalues[i])))
    values = np.asarray(pairs.eigenvalues)
    return peers.PeerResult("hero_jax", "", values, np.array(residuals), int(pairs.num_matvecs), seconds)


def measure_memory(loss_fn: Any, params: PyTree, batch_size: int, total: int = 50_000) -> dict[str, float]:
    """Temporary MiB of a product over one microbatch and over `total` images, and that of a gradient for scale."""

    def product(params: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        size = None if len(batch[1]) == batch_size else batch_size
        examples = curvature.Examples(batch, microbatch_size=size)
        return curvature.hessian_operator(loss_fn, params, examples)(vector)

    def temporary(size: int) -> float:
        images = jax.ShapeDtypeStruct((size, 32, 32, 3), jnp.float32)
        labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        compiled: Any = jax.jit(product).lower(params, params, (images, labels)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    return {"one_mib": temporary(batch_size), "all_mib": temporary(total), "images": total}


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints what products and eigenvalues cost; with `--out`, writes the record too."""
    config = resolve(
        method="sgd", dataset="cifar10", epochs=arguments.epochs, train_size=arguments.images, eval_every=1000
    )
    dataset = data.subset(data.load("cifar10", arguments.data_dir), arguments.images, 0)
    trainer = compiled.build(config, dataset)
    # The accuracy of these weights is of no interest: one image tests them.
    tiny = dataset._replace(test=dataset.test.first(1))
    variables = loop.train(config, tiny, trainer=trainer).variables
    variables = jax.tree.map(jnp.asarray, variables)
    model = models.create("resnet20", 10)
    train = dataset.train.first(None)
    images = data.normalize(jnp.asarray(train.images), dataset.pixels)
    labels = jnp.asarray(train.labels)

    def loss_fn(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.apply({"params": params, "batch_stats": variables["batch_stats"]}, batch[0])
        assert isinstance(logits, jax.Array)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    record: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    batch = (images[: arguments.batch_size], labels[: arguments.batch_size])
    record["product"] = row = measure_product(loss_fn, variables["params"], batch, arguments.repeats)
    cli.console.print(
        f"ResNet20, {arguments.batch_size} images: gradient {row['gradient_seconds']:.3f} s, Hessian-vector product"
        f" {row['product_seconds']:.3f} s ({row['time_ratio']:.2f} x); temporary memory {row['gradient_mib']:.0f} and"
        f" {row['product_mib']:.0f} MiB ({row['memory_ratio']:.2f} x); medians of {arguments.repeats}."
    )
    record["memory"] = row = measure_memory(loss_fn, variables["params"], arguments.batch_size)
    cli.console.print(
        f"Product over {row['images']:,} images in microbatches of {arguments.batch_size}: {row['all_mib']:.1f} MiB,"
        f" over one microbatch {row['one_mib']:.1f} MiB."
    )
    size = arguments.batch_size
    batches = [(images[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]
    results = [top_eigenvalues(loss_fn, variables["params"], batches, arguments.k, arguments.rtol)]
    reason = peers.missing() if arguments.with_peers else "with_peers is off"
    if reason is None:
        network = peers.resnet(variables)
        torch_batches = peers.split_batches(np.asarray(images), np.asarray(labels), size)
        seconds = peers.gradient_and_product_seconds(network, torch_batches[0], arguments.repeats)
        record["torch_product"] = dict(zip(("gradient_seconds", "product_seconds"), seconds, strict=True))
        cli.console.print(f"PyTorch on the same batch: gradient {seconds[0]:.3f} s, product {seconds[1]:.3f} s.")
        results += peers.eigenthings_top(network, torch_batches, arguments.k, arguments.rtol)
        settings = [(tol, 1000) for tol in arguments.pyhessian_tol] or peers.PYHESSIAN_SETTINGS
        results.append(peers.pyhessian_top(network, torch_batches, arguments.k, arguments.rtol, settings=settings))
    record["eigenvalues"] = [
        r._asdict() | {"eigenvalues": r.eigenvalues.tolist(), "residuals": r.residuals.tolist()} for r in results
    ]
    table = Table("tool", "products", "seconds", "worst residual", "eigenvalues", box=box.SIMPLE_HEAD, pad_edge=False)
    for r in results:
        values = " ".join(f"{x:.4g}" for x in r.eigenvalues)
        name = f"{r.name} ({r.setting})" if r.setting else r.name
        table.add_row(name, str(r.num_products), f"{r.seconds:.1f}", f"{r.residuals.max():.1e}", values)
    cli.console.print(table)
    cli.console.print(
        f"Top {arguments.k} Hessian eigenvalues of the mean cross-entropy over {arguments.images:,} real images,"
        f" running BatchNorm statistics, to a relative residual of {arguments.rtol:g}; compilation apart."
        + ("" if reason is None else f" The PyTorch tools were left out: {reason}.")
    )
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

"""What bfloat16 computation does to each quantity of a HERO step: `python -m benchmarks.precision`.

At the same float32 weights and images, the gradient g, the perturbed gradient g*, their difference d, the product
H(w*) D d and the direction g* + 2 gamma H(w*) D d are computed in bfloat16 (parameters, BatchNorm statistics, loss and
what `hero` itself does float32) and compared with float32; as a yardstick, float32 is compared with float64. Each
computation goes its own way from g on: its errors add up. Two rows take w* and d of float32 instead, so that the pass
alone differs. Beside them, in float32 and float64, the product by a difference of two gradients against the exact one
of that type, at the same w* and d. Measured at the initial weights and after some steps of SGD, on several batches.

The figures are those of the device and compiler: XLA may keep more than bfloat16 between operations that it merges.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.table import Table

from benchmarks.step_cost import gradient_function
from experiments import cli, data
from experiments.config import resolve
from experiments.config.methods import Hero
from experiments.storage import claims, environment, records, runs
from experiments.training import compiled
from hero_jax import curvature, errors, models, perturbations

PyTree = Any
Quantities = dict[str, PyTree]
QUANTITIES = ("g", "g*", "d", "H(w*) D d", "direction", "g*, same w*", "H(w*) D d, same w*, d")
BY_DIFFERENCE = "H(w*) D d by a difference, same w*, d"
# What is judged, and by what.
EXACT = "exact"
COMPARED = (("bfloat16", "float32"), ("float32", "float64"))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: str = "resnet20"
    """A name in hero_jax.models."""
    dataset: str = "digits"
    """digits (embedded) or cifar10 (prepared for tensorflow-datasets)."""
    steps: int = 100
    """Steps of SGD between the two measurements."""
    batch_size: int = 64
    """Images of a batch, of SGD and of the measurements."""
    batches: int = 4
    """Batches measured, for mean and standard deviation."""
    rho: float | None = None
    """Radius of the perturbation; default the preset of the data set."""
    gamma: float | None = None
    """Strength of the penalty in the direction; default the preset of the data set."""
    data_dir: Path | None = None
    """Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("batches", 2)):
            errors.integer(name, getattr(self, name), low=low)


def averaged_product(
    grad_fn: Callable[[PyTree], PyTree],
    perturbed: PyTree,
    d: PyTree,
    product: Callable[..., PyTree] = curvature.grad_product,
) -> PyTree:
    """H(w*) D d, as the penalty "detached" of `hero` computes it."""
    vector = jax.tree.map(lambda x: x * (x.ndim > 1) / x.size, d)
    peak = optax.tree.norm(vector, ord="inf")
    return optax.tree.scale(peak, product(grad_fn, perturbed, optax.tree.scale(1 / peak, vector)))


class Computation:
    """A HERO step in one type: what it computes from the weights, and from w* and d of another computation."""

    def __init__(self, model: str, num_classes: int, dtype: str, rho: float, gamma: float) -> None:
        self.dtype = dtype
        # That of everything but the network.
        self.wide = jnp.promote_types(dtype, jnp.float32)
        gradient = gradient_function(models.create(model, num_classes, dtype=jnp.dtype(dtype)))

        def step(params: PyTree, *rest: PyTree) -> Quantities:
            def grad_fn(params: PyTree) -> PyTree:
                return gradient(params, *rest)[0]

            g = grad_fn(params)
            perturbed = optax.tree.add(params, perturbations.ascent(params, g, rho, adaptive=True))
            perturbed_grads = grad_fn(perturbed)
            d = optax.tree.sub(perturbed_grads, g)
            product = averaged_product(grad_fn, perturbed, d)
            direction = optax.tree.add_scale(perturbed_grads, 2 * gamma, product)
            return dict(zip(("w*", *QUANTITIES), (perturbed, g, perturbed_grads, d, product, direction), strict=False))

        def alone(perturbed: PyTree, d: PyTree, *rest: PyTree) -> Quantities:
            def grad_fn(params: PyTree) -> PyTree:
                return gradient(params, *rest)[0]

            quotient = averaged_product(grad_fn, perturbed, d, curvature.grad_difference)
            products = grad_fn(perturbed), averaged_product(grad_fn, perturbed, d), quotient
            return dict(zip((*QUANTITIES[-2:], BY_DIFFERENCE), products, strict=True))

        self._step, self._alone = jax.jit(step), jax.jit(alone)

    def step(self, *arguments: PyTree) -> Quantities:
        """(params, batch_stats, images, labels) -> w*, g, g*, d, H(w*) D d and the direction, on the host."""
        return self._call(self._step, arguments)

    def alone(self, *arguments: PyTree) -> Quantities:
        """(w*, d, batch_stats, images, labels) -> g*, and H(w*) D d exact and by a difference, on the host."""
        return self._call(self._alone, arguments)

    def _call(self, function: Callable[..., Quantities], arguments: tuple[PyTree, ...]) -> Quantities:
        with jax.enable_x64(self.dtype == "float64"):
            return jax.device_get(function(*jax.tree.map(self._cast, arguments)))

    def _cast(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.wide) if jnp.issubdtype(x.dtype, jnp.floating) else x


def weights(arguments: Arguments, dataset: data.Dataset) -> dict[str, tuple[PyTree, PyTree]]:
    """(params, batch_stats) on the host, at the start and after `arguments.steps` steps of SGD in float32."""
    size, batch_size = dataset.train.size, arguments.batch_size
    config = resolve(
        method="sgd",
        dataset=arguments.dataset,
        model=arguments.model,
        batch_size=batch_size,
        epochs=-(-arguments.steps // (size // batch_size)),
    )
    trainer = compiled.build(config, dataset)
    images, labels = trainer.layout.replicate(dataset.train)
    state = trainer.init(0)
    first = runs.snapshot((state.params, state.batch_stats))
    epochs = (data.epoch_order(0, epoch, size, batch_size) for epoch in itertools.count())
    for indices in itertools.islice(itertools.chain.from_iterable(epochs), arguments.steps):
        state, _ = trainer.step(state, images, labels, indices)
    return {"initial": first, f"after {arguments.steps} steps": runs.snapshot((state.params, state.batch_stats))}


def compare(found: PyTree, exact: PyTree) -> dict[str, float]:
    """||found - exact|| / ||exact|| and the cosine of the two, over all leaves, in float64."""
    x, y = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]).astype(float) for tree in (found, exact))
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return {"error": float(np.linalg.norm(x - y) / np.linalg.norm(y)), "cosine": float(x @ y / lengths)}


def measure(
    computations: dict[str, Computation], params: PyTree, batch_stats: PyTree, batches: list[tuple[Any, Any]]
) -> list[dict[str, Any]]:
    """One row a pair of types and quantity: mean and standard deviation over batches of error and cosine; d / g."""
    seen: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for images, labels in batches:
        rest = (batch_stats, images, labels)
        steps = {dtype: computation.step(params, *rest) for dtype, computation in computations.items()}
        given = steps["float32"]["w*"], steps["float32"]["d"]
        for dtype, computation in computations.items():
            steps[dtype] |= computation.alone(*given, *rest)
        for (found, exact), name in itertools.product(COMPARED, QUANTITIES):
            row = compare(steps[found][name], steps[exact][name])
            row["size"] = float(optax.tree.norm(steps[exact][name]) / optax.tree.norm(steps[exact]["g"]))
            seen.setdefault((found, exact, name), []).append(row)
        for dtype in ("float32", "float64"):
            row = compare(steps[dtype][BY_DIFFERENCE], steps[dtype][QUANTITIES[-1]])
            row["size"] = float(optax.tree.norm(steps[dtype][QUANTITIES[-1]]) / optax.tree.norm(steps[dtype]["g"]))
            seen.setdefault((dtype, EXACT, BY_DIFFERENCE), []).append(row)
    rows = []
    for (found, exact, name), values in seen.items():
        row: dict[str, Any] = {"dtype": found, "reference": exact, "quantity": name}
        for key in ("error", "cosine", "size"):
            row[key] = statistics.mean(value[key] for value in values)
            row[f"{key}_std"] = statistics.stdev(value[key] for value in values)
        rows.append(row)
    return rows


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints how far each quantity is from that of a wider type; with `--out`, writes the record too."""
    preset = resolve(
        method="hero", dataset=arguments.dataset, model=arguments.model, rho=arguments.rho, gamma=arguments.gamma
    )
    assert isinstance(preset.method, Hero)
    dataset = data.load(arguments.dataset, arguments.data_dir)
    size = arguments.batch_size
    batches = []
    if arguments.batches * size > dataset.train.size:
        raise ValueError(
            f"`batches` x batch_size must be at most the {dataset.train.size} training images; got"
            f" {arguments.batches} x {size}."
        )
    train = dataset.train.first(arguments.batches * size)
    for i in range(0, arguments.batches * size, size):
        images, labels = (x[i : i + size] for x in train)
        batches.append((np.asarray(data.normalize(jnp.asarray(images), dataset.pixels)), labels))
    computations = {
        dtype: Computation(arguments.model, dataset.num_classes, dtype, preset.method.rho, preset.method.gamma)
        for dtype in ("bfloat16", "float32", "float64")
    }
    points = weights(arguments, dataset)
    record: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    record |= {"rho": preset.method.rho, "gamma": preset.method.gamma, "rows": []}
    for where, (params, batch_stats) in points.items():
        rows = measure(computations, params, batch_stats, batches)
        record["rows"] += [{"weights": where, **row} for row in rows]
        table = Table(title=where, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in ("quantity", "bfloat16 error", "cosine", "float32 error", "size"):
            table.add_column(name, justify="left" if name == "quantity" else "right", no_wrap=True)
        by_type = [[r for r in rows if (r["dtype"], r["reference"]) == compared] for compared in COMPARED]
        for narrow, yardstick in zip(*by_type, strict=True):
            table.add_row(
                narrow["quantity"],
                f"{narrow['error']:.2g} ± {narrow['error_std']:.1g}",
                f"{narrow['cosine']:.4f}",
                f"{yardstick['error']:.1e} ± {yardstick['error_std']:.0e}",
                f"{narrow['size']:.2g}",
            )
        cli.console.print(table)
        for row in rows:
            if row["reference"] == EXACT:
                cli.console.print(
                    f"{row['quantity']}, {row['dtype']}: error {row['error']:.2g} ± {row['error_std']:.1g} of the"
                    f" exact product, cosine {row['cosine']:.4f} ± {row['cosine_std']:.1g}"
                )
    versions, device = record["environment"]["versions"], record["environment"]["device"]
    cli.console.print(
        f"{arguments.model} on {arguments.dataset}, batch {size}, rho {preset.method.rho:g},"
        f" gamma {preset.method.gamma:g}; relative error and cosine against"
        f" float32, error of float32 against float64, size in norms of g; mean ± standard"
        f" deviation over {arguments.batches} batches. {device['kind']}; jax {versions['jax']}."
    )
    records.write_record(arguments.out, record)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

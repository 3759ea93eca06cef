"""Trains one network and leaves a run folder: `python -m experiments.train --method hero --dataset digits`."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import cli, data, methods, plots, progress, runs
from experiments.config import TrainConfig
from hero_jax import curvature, models, quantize, spectrum

PyTree = Any
EVAL_BATCH = 500
# Most products for the eigenvalue, and probes for the norm, at one point of training.
CURVATURE_PRODUCTS = 100
CURVATURE_PROBES = 10


class TrainState(NamedTuple):
    """Everything a step changes. `key` is constant; the step number makes the augmentation of a step from it."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


class Trainer(NamedTuple):
    """The compiled parts of a run, shared by runs that differ in their seed only.

    init: `seed -> TrainState`.
    step: `(state, images, labels, indices) -> (state, mean loss of the batch at the unperturbed weights)`.
    evaluate: `(variables, split) -> {"accuracy": fraction, "loss": mean cross-entropy}`, running BatchNorm statistics.
    forward: `(variables, images) -> logits` of raw images, running BatchNorm statistics.
    statistics: `(variables, images) -> batch_stats` after a batch of raw images in training mode.
    hessian: `(variables, split) -> (matvec, example)`, the Hessian of the mean cross-entropy over a split, normalised
      by the running BatchNorm statistics, without augmentation or weight decay; and a tree shaped like its vectors.
    """

    init: Callable[[int], TrainState]
    step: Callable[..., tuple[TrainState, jax.Array]]
    evaluate: Callable[[PyTree, data.Split], dict[str, float]]
    forward: Callable[[PyTree, jax.Array], jax.Array]
    statistics: Callable[[PyTree, jax.Array], PyTree]
    hessian: Callable[[PyTree, data.Split], tuple[Callable[[PyTree], PyTree], PyTree]]


class Diverged(cli.Failed):
    """The loss stopped being finite."""


class Result(NamedTuple):
    """A finished run: its last evaluation, and the variables on the host that it was made with."""

    metrics: dict[str, float]
    variables: PyTree


def build(config: TrainConfig, dataset: data.Dataset) -> Trainer:
    """Makes the trainer of a resolved configuration; what is compiled does not depend on the seed."""
    assert config.model is not None
    assert config.batch_size is not None
    size = len(dataset.train.labels)
    if size < config.batch_size:
        raise ValueError(f"`batch_size` must be at most the {size} training images; got {config.batch_size}.")
    model = models.create(config.model, dataset.num_classes)
    apply: Callable[..., Any] = model.apply
    tx = methods.optimizer(config, size // config.batch_size)
    pixels, shape = dataset.pixels, dataset.train.images.shape[1:]

    def init(seed: int) -> TrainState:
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        variables = jax.jit(model.init)(key_init, jnp.zeros((1, *shape)))
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(params, batch_stats, tx.init(params), jnp.zeros((), jnp.int32), key_steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array):
        x, y = data.normalize(images[indices], pixels), labels[indices]
        if pixels.augment:
            x = data.crop_and_flip(jax.random.fold_in(state.key, state.step), x)

        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, mutated = apply(variables, x, train=True, mutable=["batch_stats"])
            return _cross_entropy(logits, y), mutated.get("batch_stats", {})

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        # The perturbed passes normalise with batch statistics, and theirs are dropped: those of the clean pass stay.
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, grad_fn=lambda params: jax.grad(loss_fn, has_aux=True)(params)[0]
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state, state.step + 1, state.key), loss

    def forward(variables: PyTree, images: jax.Array) -> jax.Array:
        return apply(variables, data.normalize(images, pixels))

    @jax.jit
    def statistics(variables: PyTree, images: jax.Array) -> PyTree:
        x = data.normalize(images, pixels)
        return apply(variables, x, train=True, mutable=["batch_stats"])[1].get("batch_stats", {})

    def mean_loss(variables: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _cross_entropy(forward(variables, batch[0]), batch[1])

    def hessian(variables: PyTree, split: data.Split) -> tuple[Callable[[PyTree], PyTree], PyTree]:
        size = len(split.labels)
        batches = [tuple(x[i : i + EVAL_BATCH] for x in split) for i in range(0, size, EVAL_BATCH)]
        # The statistics are arguments as the parameters are, so that what is compiled serves all runs.
        mask = {"params": True, "batch_stats": False}
        matvec = curvature.hessian_operator(mean_loss, variables, batches=batches, mask=mask)
        return matvec, curvature.restrict(variables, mask)

    classify = quantize.classifier(forward, batch_size=EVAL_BATCH)

    def evaluate(variables: PyTree, split: data.Split) -> dict[str, float]:
        found = classify(variables, *split)
        return {name: found[name] for name in ("accuracy", "loss")}

    return Trainer(init, step, evaluate, forward, statistics, hessian)


def load(run: Path, data_dir: Path | None, display: Any) -> tuple[TrainConfig, Trainer, PyTree, data.Dataset]:
    """The configuration, the trainer, the last saved variables and the data of a run folder."""
    variables = runs.load_variables(run)
    config = TrainConfig(**json.loads((run / "config.json").read_text()))
    dataset = data.load(config.dataset, data_dir, progress.task(display, f"decoding {config.dataset}"))
    dataset = data.subset(dataset, config.train_size, config.validation_size)
    return config, build(config, dataset), jax.tree.map(jnp.asarray, variables), dataset


def train(
    config: TrainConfig,
    dataset: data.Dataset,
    folder: runs.RunFolder | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    trainer: Trainer | None = None,
) -> Result:
    """Runs one training.

    Args:
      config: what to run.
      dataset: the data, after `data.subset`.
      folder: where metrics and checkpoints go; None keeps them in memory only.
      report: called with the metrics of each epoch.
      trainer: a trainer built for the same configuration up to its seed, to share its compilation.

    Returns:
      The last evaluation and the variables it was made with.

    Raises:
      Diverged: the loss stopped being finite; the last good state is in the folder's checkpoint.
    """
    config = config.resolved()
    assert config.epochs is not None
    assert config.batch_size is not None
    trainer = trainer or build(config, dataset)
    images, labels = (jnp.asarray(x) for x in dataset.train)
    state = trainer.init(config.seed)
    good, metrics, last_loss = runs.snapshot(state._replace(key=())), {}, float("nan")
    follow = _follow_curvature(trainer, dataset.train, config.curvature_size, config.seed)
    saved_at = time.monotonic()
    for epoch in range(config.epochs):
        order = data.epoch_order(config.seed, epoch, len(labels), config.batch_size)
        started = time.monotonic()
        try:
            state, losses = _epoch(trainer, state, images, labels, order)
        except KeyboardInterrupt:
            _save(folder, good)
            raise
        elapsed = time.monotonic() - started
        finite = np.isfinite(losses)
        if not finite.all():
            first = int(np.argmin(finite))
            last_loss = float(losses[first - 1]) if first else last_loss
            _save(folder, good)
            message = (
                f"The loss of {config.method} stopped being finite at step {epoch * len(order) + first + 1} (epoch"
                f" {epoch + 1}); the last finite one was {last_loss:.4g}. The last good state is that of step"
                f" {int(good.step)}. A smaller rho, gamma or learning_rate may help."
            )
            if folder is not None:
                folder.status("diverged", message)
            raise Diverged(message)
        last_loss = float(losses[-1])
        row = {"epoch": epoch + 1, "train_loss": float(losses.mean()), "images_per_second": order.size / elapsed}
        is_last = epoch + 1 == config.epochs
        is_measured = config.every is not None and (is_last or (epoch + 1) % config.every == 0)
        if is_last or is_measured or (epoch + 1) % config.eval_every == 0:
            good = runs.snapshot(state._replace(key=()))
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            metrics = trainer.evaluate(variables, dataset.test)
            row |= {"step": int(good.step), **metrics, **_hero_metrics(state.opt_state)}
            if is_measured:
                row |= follow(variables)
            if folder is not None:
                folder.log(row)
            if is_last or time.monotonic() - saved_at > 60 * config.save_minutes:
                _save(folder, good)
                saved_at = time.monotonic()
        if report is not None:
            report(row)
    return Result(metrics, {"params": good.params, "batch_stats": good.batch_stats})


def _epoch(
    trainer: Trainer, state: TrainState, images: jax.Array, labels: jax.Array, order: np.ndarray
) -> tuple[TrainState, np.ndarray]:
    """The state after the batches in `order`, and their losses; the host waits for the device once, at the end."""
    losses = []
    for indices in order:
        state, loss = trainer.step(state, images, labels, indices)
        losses.append(loss)
    return state, np.array(jax.device_get(losses))


def _follow_curvature(
    trainer: Trainer, split: data.Split, size: int, seed: int
) -> Callable[[PyTree], dict[str, float]]:
    """Measures the top Hessian eigenvalue and the norm on `size` images, each time from the last eigenvectors."""
    images = data.Split(*(x[:size] for x in split))
    keys = jax.random.split(jax.random.key(seed))
    last = None

    def measure(variables: PyTree) -> dict[str, float]:
        nonlocal last
        matvec, example = trainer.hessian(variables, images)
        # The second one is followed too, so that its overtaking the first is seen.
        pairs = spectrum.top_eigenpairs(matvec, example, keys[0], k=2, v0=last, max_matvecs=CURVATURE_PRODUCTS)
        last = pairs.eigenvectors
        norm = spectrum.hessian_norm(matvec, example, keys[1], num_probes=CURVATURE_PROBES)
        return {
            "eigenvalue": float(pairs.eigenvalues[0]),
            "eigenvalue_residual": float(pairs.residuals[0]),
            "eigenvalue_products": int(pairs.num_matvecs),
            "hessian_norm": float(norm.mean),
            "hessian_norm_sem": float(norm.sem),
        }

    return measure


def _save(folder: runs.RunFolder | None, state: TrainState) -> None:
    if folder is not None:
        tree = {"params": state.params, "batch_stats": state.batch_stats, "opt_state": state.opt_state}
        folder.save(int(state.step), tree)


def _hero_metrics(opt_state: PyTree) -> dict[str, float]:
    """The metrics of the transformation at the last step, where the method has any."""
    metrics = getattr(opt_state[0], "metrics", None)
    return {} if metrics is None else {k: float(v) for k, v in metrics._asdict().items()}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Trains one network on one data set and leaves a run folder.

    Args:
        config: The run.
        out: Run folder, new or empty; default runs/DATASET-MODEL-METHOD-sSEED.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    config = config.resolved()
    assert config.epochs is not None
    out = out or config.default_folder()
    cli.console.print(f"{config.method} on {config.dataset}, {config.model}, {config.epochs} epochs, into {out}")
    with progress.bar() as bar:
        dataset = data.load(config.dataset, data_dir, progress.task(bar, f"decoding {config.dataset}"))
        dataset = data.subset(dataset, config.train_size, config.validation_size)
        advance = progress.epochs(bar, config.method, config.epochs)
        with runs.RunFolder(out, config) as folder:
            result = train(config, dataset, folder, advance)
    if config.every is not None:
        plots.curvature_along_training(runs.read_metrics(out), out / "curvature.png")
    where = "validation" if config.validation_size else "test"
    cli.console.print(
        f"{where} accuracy {result.metrics['accuracy']:.2%}, loss {result.metrics['loss']:.4f} after the last epoch"
        f" (n = 1 run, {len(dataset.test.labels)} images)"
    )


if __name__ == "__main__":
    cli.run(main)

"""Trains one network and leaves a run folder: `python -m experiments.train --method hero --dataset digits`."""

from __future__ import annotations

import contextlib
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
from optax import microbatching

from experiments import cli, data, methods, parallel, plots, progress, runs
from experiments.config import TrainConfig
from experiments.parallel import TrainState
from hero_jax import curvature, models, quantize, spectrum

PyTree = Any
EVAL_BATCH = 500
# Most products for the eigenvalue, and probes for the norm, at one point of training.
CURVATURE_PRODUCTS = 100
CURVATURE_PROBES = 10


class Trainer(NamedTuple):
    """The compiled parts of a run, shared by runs that differ in their seed only.

    layout: where state, data and batches lie.
    init: `seed -> TrainState`, laid out.
    step: `(state, images, labels, indices, penalize=True) -> (state, mean loss of the batch at the unperturbed
      weights)`, with the images and labels on every device (`layout.replicate`) and the indices of the whole batch on
      the host; without `penalize` the step is one of SAM, ASAM or SGD.
    evaluate: `(variables, split) -> {"accuracy": fraction, "loss": mean cross-entropy}`, running BatchNorm statistics.
    forward: `(variables, images) -> logits` of raw images, running BatchNorm statistics.
    statistics: `(variables, images) -> batch_stats` after a batch of raw images in training mode.
    hessian: `(variables, split) -> (matvec, example)`, the Hessian of the mean cross-entropy over a split, normalised
      by the running BatchNorm statistics, without augmentation or weight decay; and a tree shaped like its vectors.
    """

    layout: parallel.One
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
    """Makes the trainer of a resolved configuration; what is compiled does not depend on the seed.

    The step sees the whole batch, or under a mapped axis the rows of one device, and averages over that axis.
    """
    assert config.model is not None
    assert config.batch_size is not None
    size = len(dataset.train.labels)
    if size < config.batch_size:
        raise ValueError(f"`batch_size` must be at most the {size} training images; got {config.batch_size}.")
    batch_size = config.batch_size
    layout = parallel.layout(config)
    rows = batch_size // layout.num_parts
    if config.microbatch_size is not None and rows % config.microbatch_size:
        raise ValueError(f"`microbatch_size` must divide the {rows} images of a part; got {config.microbatch_size}.")
    # Else BatchNorm takes those of the rows it sees: all of them, or with sync=False those of the device.
    shares_statistics = config.sync and layout.axis_name is not None
    options = {"axis_name": layout.axis_name} if shares_statistics else {}
    model = models.create(config.model, dataset.num_classes, **options)
    apply: Callable[..., Any] = model.apply
    tx = methods.optimizer(config, size // batch_size, layout.axis_name)
    pixels, shape = dataset.pixels, dataset.train.images.shape[1:]

    def init(seed: int) -> TrainState:
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        variables = jax.jit(model.init)(key_init, jnp.zeros((1, *shape)))
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        key = jax.random.key_data(key_steps)
        return TrainState(params, batch_stats, tx.init(params), jnp.zeros((), jnp.int32), key)

    def step(state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array, *, penalize: bool):
        x, y = data.normalize(images[indices], pixels), labels[indices]
        if pixels.augment:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            x = data.crop_and_flip(key, x, batch_size=batch_size, first_row=layout.first_row(len(indices)))

        def loss_fn(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree]:
            variables = {"params": layout.whole(params), "batch_stats": state.batch_stats}
            logits, mutated = apply(variables, x, train=True, mutable=["batch_stats"])
            return _cross_entropy(logits, y), mutated.get("batch_stats", {})

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if config.microbatch_size is not None:
            value_and_grad = microbatching.microbatch(
                value_and_grad, (1, 2), config.microbatch_size, microbatching.AccumulationType.MEAN
            )

        def grad_fn(params: PyTree) -> PyTree:
            # Perturbed passes normalise with batch statistics, and theirs are dropped: those of the clean pass stay.
            return layout.split(value_and_grad(params, x, y)[1])

        (loss, batch_stats), grads = value_and_grad(state.params, x, y)
        updates, opt_state = tx.update(
            layout.split(grads), state.opt_state, state.params, grad_fn=grad_fn, penalize=penalize
        )
        params = optax.apply_updates(state.params, updates)
        batch_stats = batch_stats if shares_statistics else layout.mean(batch_stats)
        return TrainState(params, batch_stats, opt_state, state.step + 1, state.key), layout.mean(loss)

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

    shards = 1 if layout.examples is None else layout.examples.num_devices
    classify = quantize.classifier(forward, batch_size=-(-EVAL_BATCH // shards) * shards, sharding=layout.examples)

    def evaluate(variables: PyTree, split: data.Split) -> dict[str, float]:
        found = classify(variables, *split)
        return {name: found[name] for name in ("accuracy", "loss")}

    compiled = {penalize: layout.compile(functools.partial(step, penalize=penalize)) for penalize in (True, False)}

    def compiled_step(*arguments: Any, penalize: bool = True) -> tuple[TrainState, jax.Array]:
        return compiled[penalize](*arguments)

    init = functools.partial(layout.init, init)
    return Trainer(layout, init, compiled_step, evaluate, forward, statistics, hessian)


def load(run: Path, data_dir: Path | None, display: Any) -> tuple[TrainConfig, Trainer, PyTree, data.Dataset]:
    """The configuration, the trainer, the last saved variables and the data of a run folder."""
    variables = runs.load_variables(run)
    config = TrainConfig(**json.loads((run / "config.json").read_text())).on_one_device()
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
    images, labels = trainer.layout.replicate(dataset.train)
    state = trainer.init(config.seed)
    good, metrics, last_loss = _keep(folder, trainer.layout.to_host(state)), {}, float("nan")
    follow = _follow_curvature(trainer, dataset.train, config.curvature_size, config.seed)
    begun_at = saved_at = time.monotonic()
    for epoch in range(config.epochs):
        order = data.epoch_order(config.seed, epoch, len(labels), config.batch_size)
        started = time.monotonic()
        first_step = epoch * len(order)
        is_penalized = [(first_step + i) % (config.interval or 1) == 0 for i in range(len(order))]
        state, losses = _epoch(trainer, state, images, labels, order, is_penalized)
        elapsed = time.monotonic() - started
        finite = np.isfinite(losses)
        if not finite.all():
            first = int(np.argmin(finite))
            last_loss = float(losses[first - 1]) if first else last_loss
            message = (
                f"The loss of {config.method} stopped being finite at step {first_step + first + 1} (epoch"
                f" {epoch + 1}); the last finite one was {last_loss:.4g}. The last good state is that of step"
                f" {int(good.step)}. A smaller rho, gamma or learning_rate may help."
            )
            if folder is not None:
                folder.status("diverged", message)
            raise Diverged(message)
        last_loss = float(losses[-1])
        row = {"epoch": epoch + 1, "train_loss": float(losses.mean()), "images_per_second": order.size / elapsed}
        is_over = _is_over(config, time.monotonic() - begun_at)
        is_last = is_over or epoch + 1 == config.epochs
        is_measured = config.every is not None and (is_last or (epoch + 1) % config.every == 0)
        if is_last or is_measured or (epoch + 1) % config.eval_every == 0:
            good = _keep(folder, trainer.layout.to_host(state))
            variables = jax.tree.map(jnp.asarray, {"params": good.params, "batch_stats": good.batch_stats})
            metrics = trainer.evaluate(variables, dataset.test)
            row |= {"step": int(good.step), **metrics, **_hero_metrics(good.opt_state)}
            if is_measured:
                row |= follow(variables)
            if folder is not None:
                folder.log(row)
            if is_last or time.monotonic() - saved_at > 60 * config.save_minutes:
                if folder is not None:
                    folder.save(*_saved(good))
                saved_at = time.monotonic()
        if report is not None:
            report(row)
        if is_over and epoch + 1 < config.epochs:
            if folder is not None:
                folder.status("interrupted", f"max_minutes {config.max_minutes} passed in epoch {epoch + 1}.")
            break
    return Result(metrics, {"params": good.params, "batch_stats": good.batch_stats})


def _epoch(
    trainer: Trainer,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    order: np.ndarray,
    is_penalized: list[bool],
) -> tuple[TrainState, np.ndarray]:
    """The state after the batches in `order`, and their losses; the host waits for the device once, at the end."""
    losses = []
    for indices, penalize in zip(order, is_penalized, strict=True):
        state, loss = trainer.step(state, images, labels, indices, penalize=penalize)
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


def _is_over(config: TrainConfig, seconds: float) -> bool:
    """Whether `max_minutes` have passed, by the clock of process 0."""
    return config.max_minutes is not None and parallel.agreed(seconds > 60 * config.max_minutes)


def _keep(folder: runs.RunFolder | None, state: TrainState) -> TrainState:
    """The same state on the host, which an early end will save."""
    if folder is not None:
        folder.keep(*_saved(state))
    return state


def _saved(state: TrainState) -> tuple[int, PyTree]:
    """The step, and what a checkpoint holds of a state on the host."""
    return int(state.step), {"params": state.params, "batch_stats": state.batch_stats, "opt_state": state.opt_state}


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
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> None:
    """Trains one network on one data set and leaves a run folder.

    Several processes (docs/parallel.md) are started by one command each, the same but for --process-id; process 0
    writes and prints. They wait 300 s for all to join, notice after at most 60 s that one has died, and wait 60 s at
    the end.

    Args:
        config: The run.
        out: Run folder, new or empty; default runs/DATASET-MODEL-METHOD-sSEED.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
        coordinator: HOST:PORT of process 0, which must be free there.
        num_processes: Processes in all.
        process_id: Which of them this is, from 0.
        distributed: Ask the cluster (Slurm, Open MPI, Kubernetes, TPU pods) for these three.
    """
    parallel.join(coordinator, num_processes, process_id, distributed)
    config = config.resolved()
    assert config.epochs is not None
    out = out or config.default_folder()
    is_writer = jax.process_index() == 0
    cli.console.quiet = not is_writer
    cli.console.print(f"{config.method} on {config.dataset}, {config.model}, {config.epochs} epochs, into {out}")
    with progress.bar() as bar:
        dataset = data.load(config.dataset, data_dir, progress.task(bar, f"decoding {config.dataset}"))
        dataset = data.subset(dataset, config.train_size, config.validation_size)
        advance = progress.epochs(bar, config.method, config.epochs)
        with runs.RunFolder(out, config) if is_writer else contextlib.nullcontext() as folder, parallel.watched():
            result = train(config, dataset, folder, advance)
    if config.every is not None and is_writer:
        plots.curvature_along_training(runs.read_metrics(out), out / "curvature.png")
    where = "validation" if config.validation_size else "test"
    cli.console.print(
        f"{where} accuracy {result.metrics['accuracy']:.2%}, loss {result.metrics['loss']:.4f} after the last epoch"
        f" (n = 1 run, {len(dataset.test.labels)} images)"
    )


if __name__ == "__main__":
    cli.run(main)

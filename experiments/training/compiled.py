"""The compiled parts of a run: its step on the layout of its devices, its evaluation, its Hessian."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import microbatching

from experiments import data
from experiments.config import TrainConfig
from experiments.config.fields import number
from experiments.data import label_noise
from experiments.storage import files, runs
from experiments.training import layouts, methods
from experiments.training.layouts import TrainState
from hero_jax import curvature, models, parallel
from hero_jax.evaluate import classifier

PyTree = Any
EVAL_BATCH = 500
# Called with what is done, how much of it, and the total.
Report = Callable[[str, int, int], None]


class Trainer(NamedTuple):
    """The compiled parts of a run, shared by runs that differ in their seed only.

    layout: where state, data and batches lie.
    init: `seed -> TrainState`, laid out.
    step: `(state, images, labels, indices, kind=0) -> (state, mean loss of the batch)`, the loss at the unperturbed
      weights (with `noise_bits` at the noisy ones, of MSAM at the perturbed ones, whose BatchNorm statistics are kept
      too; with `ascent_batch_size` of those images), with the images and labels on every device (`layout.replicate`)
      and the indices of the whole batch on the host; `kind` is that of `methods.phases`. Of a stream:
      `(state, images, labels, kind=0)`, with those of the rows of this process (`layout.local_rows`), on the host.
    kind: the kind of a step, by its number.
    lower: `() -> the program of step` for the devices of the layout, which need not be here; nothing is run.
    steps: `step` for the indices (steps, batch) of several batches, in one compiled call; not of a stream.
    evaluate: `(variables, split) -> {"accuracy": fraction, "loss": mean cross-entropy}`.
    forward: logits of raw images; as all that follow the step, without augmentation or weight decay.
    statistics: those of BatchNorm after a batch of raw images in training mode; the others take the running ones.
    hessian: that of the mean cross-entropy over a split, on trees without the statistics.
    """

    layout: layouts.Layout
    init: Callable[[int], TrainState]
    step: layouts.Step
    lower: Callable[[], jax.stages.Lowered]
    kind: Callable[[int], int]
    steps: layouts.Step
    evaluate: Callable[[PyTree, data.Split | data.Stream], dict[str, float]]
    forward: Callable[[PyTree, jax.Array], jax.Array]
    statistics: Callable[[PyTree, jax.Array], PyTree]
    hessian: Callable[[PyTree, data.Split], curvature.Operator]


def build(config: TrainConfig, dataset: data.Dataset, devices: Sequence[Any] | None = None) -> Trainer:
    """Makes the trainer of a resolved configuration; what is compiled does not depend on the seed.

    `devices` are those it is for, all there are by default. The step sees the whole batch, or under a mapped axis the
    rows of one device, and averages over that axis.
    """
    how, batch_size, size = config.layout, config.budget.batch_size, dataset.train.size
    is_streamed, calls = isinstance(dataset.train, data.Stream), config.pace.steps_per_call
    if is_streamed and calls > 1:
        raise ValueError(f"`steps_per_call` must be 1 for a data set that is streamed; got {calls}.")
    check_batch_size(batch_size, size)
    layout = layouts.Layout(config, devices, streamed=is_streamed)
    axis_name, rows = layout.axis_name, batch_size // layout.num_parts
    if how.microbatch_size != "all" and rows % how.microbatch_size:
        raise ValueError(f"`microbatch_size` must divide the {rows} images of a part; got {how.microbatch_size}.")
    penalty_stride, ascent_stride = (_stride(config, f"{part}_batch_size", rows) for part in ("penalty", "ascent"))
    # Else BatchNorm takes those of the rows it sees: all of them, or with sync=False those of the device.
    shares_statistics = how.sync and axis_name is not None
    options: dict[str, Any] = {"axis_name": axis_name} if shares_statistics else {}
    model = models.create(config.task.model, dataset.num_classes, **options)
    model_in_step = model if how.dtype == "float32" else model.clone(dtype=jnp.dtype(how.dtype))
    apply_in_step: Callable[..., Any] = model_in_step.apply
    tx = methods.optimizer(config, size // batch_size, axis_name)
    kinds, kind_of = methods.phases(config, size // batch_size)
    pixels, shape = dataset.pixels, dataset.train.shape
    first_variables = jax.jit(model.init)

    def init(seed: int) -> TrainState:
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        variables = {"batch_stats": {}, **first_variables(key_init, jnp.zeros((1, *shape)))}
        params, batch_stats = variables["params"], variables["batch_stats"]
        opt_state = methods.seeded(tx.init(params), jax.random.key_data(jax.random.fold_in(key_init, 1)))
        step, key = jnp.zeros((), jnp.int32), jax.random.key_data(key_steps)
        averaged = methods.averaged(config, variables, variables, step)
        return TrainState(params, batch_stats, averaged, opt_state, step, key)

    def step(
        state: TrainState, images: jax.Array, y: jax.Array, indices: jax.Array | None = None, *, phase: methods.Phase
    ) -> tuple[TrainState, jax.Array]:
        if indices is not None:
            images, y = images[indices], y[indices]
        x = data.normalize(images, pixels)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        # Of the numbers folded into a key, those below 2 are what a split makes: crop and flip.
        noise = methods.noise(config, jax.random.fold_in(key, 2), state.params)
        if pixels.augment:
            first_row = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
            x = data.crop_and_flip(key, x, batch_size=batch_size, first_row=first_row)

        def loss_fn(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree]:
            noisy = params if noise is None else optax.tree.add(params, noise)
            variables = {"params": layout.whole(noisy), "batch_stats": state.batch_stats}
            logits, mutated = apply_in_step(variables, x, train=True, mutable=["batch_stats"])
            return _cross_entropy(logits.astype(jnp.float32), y), mutated.get("batch_stats", {})

        if how.remat:
            loss_fn = jax.checkpoint(loss_fn, policy=jax.checkpoint_policies.dots_saveable)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if how.microbatch_size != "all":
            mean = microbatching.AccumulationType.MEAN
            value_and_grad = microbatching.microbatch(value_and_grad, (1, 2), how.microbatch_size, mean)

        def at(params: PyTree, every: int) -> tuple[tuple[jax.Array, PyTree], PyTree]:
            part = (leaf.reshape(-1, every, *leaf.shape[1:])[:, 0] for leaf in (x, y))
            if axis_name is not None:  # else `shard_map` makes of it the sum of all devices
                params = parallel.vary(params, axis_name)
            loss_and_statistics, grads = value_and_grad(params, *part)
            return loss_and_statistics, layout.split(grads)

        def grad_fn(every: int) -> Callable[[PyTree], PyTree]:
            # Perturbed passes normalise with batch statistics, and theirs are dropped: those of the clean pass stay.
            return lambda params: at(params, every)[1]

        # Without the perturbation the gradient is the direction, which is that of the whole batch.
        every = ascent_stride if phase.perturb else 1
        (loss, batch_stats), grads = at(state.params, every)
        of_part = {"penalty_grad_fn": penalty_stride, "part_grad_fn": every}
        grad_fns = {name: None if stride == 1 else grad_fn(stride) for name, stride in of_part.items()}
        given = {"grad_fn": grad_fn(1), **grad_fns, **phase._asdict()}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **given)
        params = optax.apply_updates(state.params, updates)
        batch_stats = batch_stats if shares_statistics else parallel.mean(batch_stats, axis_name)
        variables = {"params": params, "batch_stats": batch_stats}
        averaged = methods.averaged(config, state.averaged, variables, state.step)
        state = TrainState(params, batch_stats, averaged, opt_state, state.step + 1, state.key)
        return state, parallel.mean(loss, axis_name)

    of_kind = [functools.partial(step, phase=phase) for phase in kinds]

    def steps(
        state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def one(state: TrainState, indices: jax.Array) -> tuple[TrainState, jax.Array]:
            return jax.lax.switch(kind_of(state.step), of_kind, state, images, labels, indices)

        return jax.lax.scan(one, state, order)

    compiled = list(map(layout.compile, of_kind))

    def compiled_step(*arguments: Any, kind: int = 0) -> tuple[TrainState, jax.Array]:
        return compiled[kind](*arguments)

    def lower() -> jax.stages.Lowered:
        rows = batch_size if is_streamed else size
        shapes = [((rows, *shape), np.uint8), ((rows,), np.int32), ((batch_size,), np.int32)]
        arguments = itertools.starmap(jax.ShapeDtypeStruct, shapes[:2] if is_streamed else shapes)
        return layout.lower(of_kind[0], jax.eval_shape(init, 0), *arguments)

    measures = _measures(model.apply, pixels, layout)
    laid_out = functools.partial(layout.init, init)
    return Trainer(layout, laid_out, compiled_step, lower, kind_of, layout.compile(steps), *measures)


def _measures(apply: Callable[..., Any], pixels: data.Pixels, layout: layouts.Layout) -> tuple[Callable[..., Any], ...]:
    """`evaluate`, `forward`, `statistics` and `hessian` of a `Trainer`."""

    def forward(variables: PyTree, images: jax.Array) -> jax.Array:
        return apply(variables, data.normalize(images, pixels))

    @jax.jit
    def statistics(variables: PyTree, images: jax.Array) -> PyTree:
        x = data.normalize(images, pixels)
        return apply(variables, x, train=True, mutable=["batch_stats"])[1].get("batch_stats", {})

    def mean_loss(variables: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _cross_entropy(forward(variables, batch[0]), batch[1])

    def hessian(variables: PyTree, split: data.Split) -> curvature.Operator:
        batches = [tuple(x[i : i + EVAL_BATCH] for x in split) for i in range(0, split.size, EVAL_BATCH)]
        # The statistics are arguments as the parameters are, so that what is compiled serves all runs.
        mask = {"params": True, "batch_stats": False}
        return curvature.hessian_operator(mean_loss, variables, curvature.Stream(batches), mask=mask)

    shards = layout.examples.num_devices
    classify = classifier(forward, batch_size=-(-EVAL_BATCH // shards) * shards, sharding=layout.examples)

    def evaluate(variables: PyTree, split: data.Split | data.Stream) -> dict[str, float]:
        found = [(part.size / split.size, classify(variables, *part)) for part in split.parts(EVAL_BATCH)]
        return {name: sum(share * of_part[name] for share, of_part in found) for name in ("accuracy", "loss")}

    return evaluate, forward, statistics, hessian


def _stride(config: TrainConfig, name: str, rows: int) -> int:
    """Every how many images of a batch one is of the part that a field names; 1 where it is the whole batch.

    Raises ValueError where the part is not evenly spread over the `rows` that are taken together.
    """
    batch_size, microbatch_size = config.budget.batch_size, config.layout.microbatch_size
    size = number(getattr(config.method, name)) or batch_size
    stride = batch_size // size
    if batch_size % size or rows % stride:
        raise ValueError(f"`{name}` must be {batch_size} / k where k divides the {rows} images of a part; got {size}.")
    if microbatch_size != "all" and rows // stride % microbatch_size:
        part = f"the {rows // stride} images of a part that `{name}` takes"
        raise ValueError(f"`microbatch_size` must divide {part}; got {microbatch_size}.")
    return stride


def load(
    run: Path, data_dir: Path | None, report: Report | None = None, all_test: bool = False
) -> tuple[TrainConfig, Trainer, PyTree, data.Dataset]:
    """The configuration, the trainer, the last saved variables and the data of a run folder.

    `report(what, done, total)` is called while a data set is decoded for the first time. all_test: with all test images
    of the data set, although the run was evaluated on some.
    """
    saved = runs.load_variables(run)
    config = runs.config(run).on_one_device()
    name = config.task.dataset
    dataset = data.load(name, data_dir, None if report is None else functools.partial(report, f"decoding {name}"))
    evaluated = config.replace(test_size="all") if all_test else config
    dataset = with_label_noise(config, subset(evaluated, dataset))
    trainer = build(config, dataset)
    made = jax.eval_shape(functools.partial(trainer.init, config.seed))
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (saved, runs.evaluated(made._asdict()))]
    if shapes[0] != shapes[1]:
        raise files.Failed(
            f"{run} has a checkpoint of another network than the {config.task.model} of its config.json."
        )
    return config, trainer, jax.tree.map(jnp.asarray, saved), dataset


def check_batch_size(batch_size: int, train_size: int) -> None:
    """Raises ValueError where a batch is larger than what there is to train on."""
    if train_size < batch_size:
        raise ValueError(f"`batch_size` must be at most the {train_size} training images; got {batch_size}.")


def subset(config: TrainConfig, dataset: data.Dataset) -> data.Dataset:
    """The images that a run has for training, validation and testing, before its label noise."""
    task = config.task
    pixels = dataset.pixels._replace(augment=dataset.pixels.augment and task.augment)
    sizes = number(task.train_size), config.validation_size, number(task.test_size)
    return data.subset(dataset._replace(pixels=pixels), *sizes)


def with_label_noise(config: TrainConfig, dataset: data.Dataset) -> data.Dataset:
    """The data that a run is trained on: with the labels that its seed alters."""
    labels = config.labels
    if labels.label_noise == 0:
        return dataset
    return label_noise.alter(dataset, labels.label_noise, labels.label_noise_kind, config.seed)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

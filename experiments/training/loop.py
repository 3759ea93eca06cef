"""Runs one training, or the rest of one."""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments.config import TrainConfig
from experiments.data import streams
from experiments.storage import files, runs
from experiments.training import curvature, interrupts, layouts, methods
from experiments.training.compiled import Trainer, build, with_label_noise
from experiments.training.layouts import TrainState

PyTree = Any
# Called with the metrics of each epoch.
Report = Callable[[dict[str, float]], None]
logger = logging.getLogger(__name__)
# Most products for the eigenvalue at one point of training.
CURVATURE_PRODUCTS = 100
# Altered training images, the first so many, on which memorisation is measured.
MEMORIZED_SIZE = 2000
# Calls of the step between the points at which several processes agree to save or stop.
AGREE_EVERY = 10


class Diverged(files.Failed):
    """The loss stopped being finite."""


class Result(NamedTuple):
    """A run that has ended: its last evaluation, empty where none was made, and its last variables, on the host."""

    metrics: dict[str, float]
    variables: PyTree


def train(
    config: TrainConfig,
    dataset: data.Dataset,
    folder: runs.RunFolder | None = None,
    report: Report | None = None,
    trainer: Trainer | None = None,
) -> Result:
    """Runs one training, or the rest of one.

    Args:
      config: what to run.
      dataset: the data, after `trainer.subset`; the labels that the seed alters are altered here.
      folder: where metrics and checkpoints go, and what is continued if it holds a checkpoint; None keeps all in
        memory.
      report: called with the metrics of each epoch.
      trainer: a trainer built for the same configuration up to its seed, to share its compilation.

    Returns:
      The last evaluation and the variables.

    Raises:
      Diverged: the loss stopped being finite; the last good state is in the folder's checkpoint.
      KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the call of the step (with several processes, after at most
        `AGREE_EVERY` of them) and a checkpoint; a second one at once.
    """
    run = _Run(config, dataset, trainer or build(config, dataset), folder, report)
    last = config.budget.epochs * run.steps_per_epoch
    with interrupts.deferred() as is_interrupted, contextlib.closing(run):
        clock = _Clock(config, is_interrupted)
        while run.step < last:
            run.advance()
            is_epoch_end = run.step % run.steps_per_epoch == 0
            if is_epoch_end:
                run.end_epoch()
            wanted = clock.wanted(is_epoch_end, run.state)
            if wanted > _Wanted.NOTHING or run.step == last:
                run.save()
            if wanted == _Wanted.INTERRUPTION:
                raise KeyboardInterrupt
            if wanted == _Wanted.END and run.step < last:
                run.status("interrupted", f"max_minutes {config.pace.max_minutes} passed; step {run.step} of {last}.")
                return Result(run.metrics, run.variables())
    return Result(run.metrics or run.evaluate(), run.variables())


class _Run:
    """A run under way.

    step: steps called so far.
    state: that after them, which the devices may still be making.
    steps_per_epoch: how many an epoch has.
    metrics: the last evaluation that was made here; empty before the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.Dataset,
        trainer: Trainer,
        folder: runs.RunFolder | None,
        report: Report | None,
    ) -> None:
        self.config, self.trainer, self.folder, self.report = config, trainer, folder, report
        dataset = with_label_noise(config, dataset)
        train, batch_size = dataset.train, config.budget.batch_size
        size = train.size
        self.step, self.steps_per_epoch = 0, size // batch_size
        self.metrics: dict[str, float] = {}
        self._dataset = dataset
        self._altered = _altered(dataset)
        # A stream brings its batches itself.
        self._train: Any = () if isinstance(train, data.Stream) else trainer.layout.replicate(train)
        self._order = functools.lru_cache(1)(lambda epoch: data.epoch_order(config.seed, epoch, size, batch_size))
        self.state = trainer.init(config.seed)
        # Of the epoch begun; the host waits for the device only where it looks at them.
        self._losses: list[Any] = []
        host = trainer.layout.to_host(self.state)
        self._curvature = _Curvature(config, trainer, train, host.params)
        self._set_good(host)
        # Process 0 alone has the folder.
        restored = layouts.from_first(None if folder is None else folder.restore(self._good), self._good)
        if restored is not None:
            # Before its successor comes: the devices may not have room for both.
            del self.state
            self.state = trainer.layout.to_devices(TrainState(*(restored[name] for name in TrainState._fields)))
            self.step = int(restored["step"])
            self._losses = [restored["losses"][: self.step % self.steps_per_epoch]]
            self._curvature.eigenvectors = restored["eigenvectors"]
            self._good = restored
            is_over = self.step == config.budget.epochs * self.steps_per_epoch
            logger.info("done already" if is_over else f"continuing after step {self.step}")
        self._batches = self._read_ahead(train) if isinstance(train, data.Stream) else None
        self._begun = self.step, time.monotonic()

    def advance(self) -> None:
        """Makes one call: `steps_per_call` steps, or those that are left of the epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = self._order(epoch)[done : done + self.config.pace.steps_per_call]
        if self.config.pace.steps_per_call > 1:
            images, labels = self._train
            self.state, losses = self.trainer.steps(self.state, images, labels, order)
        else:
            batch = (order[0],) if self._batches is None else next(self._batches)
            self.state, losses = self.trainer.step(self.state, *self._train, *batch, kind=self.trainer.kind(self.step))
        self._losses.append(losses)
        if self._batches is not None and len(self._losses) > streams.AHEAD:
            # The device keeps the images of every step that it has not made.
            jax.block_until_ready(self._losses[-1 - streams.AHEAD])
        self.step += len(order)

    def end_epoch(self) -> None:
        """Evaluates where that is due, logs and reports."""
        config, epoch, losses = self.config, self.step // self.steps_per_epoch, self._checked_losses()
        first, started = self._begun
        speed = (self.step - first) * config.budget.batch_size / (time.monotonic() - started)
        row = {"epoch": epoch, "train_loss": float(losses.mean()), "images_per_second": speed}
        is_last = epoch == config.budget.epochs
        is_measured = config.watch.every != "never" and (is_last or epoch % config.watch.every == 0)
        self._losses = []
        if is_last or is_measured or epoch % config.watch.eval_every == 0:
            host = self.trainer.layout.to_host(self.state)
            variables = _variables(host._asdict())
            self.metrics = self._measured(variables)
            row |= {"step": self.step, **self.metrics, **methods.metrics(host.opt_state)}
            if is_measured:
                row |= self._curvature(variables)
            if self.folder is not None:
                self.folder.log(row)
            self._set_good(host)
        if self.report is not None:
            self.report(row)
        self._begun = self.step, time.monotonic()

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._batches is not None:
            self._batches.close()

    def save(self) -> None:
        """Writes a checkpoint of where the run is; no process goes on before process 0 has written it."""
        if int(self._good["step"]) != self.step:
            losses = self._checked_losses()
            self._set_good(self.trainer.layout.to_host(self.state), losses)
        if self.folder is not None:
            self.folder.save(self.step, self._good)
        layouts.agreed(0)

    def status(self, status: str, message: str) -> None:
        """Records where the run stands, if it has a folder."""
        if self.folder is not None:
            self.folder.status(status, message)

    def variables(self) -> PyTree:
        """The variables of the last good state that are evaluated, on the host."""
        return runs.evaluated(self._good)

    def evaluate(self) -> dict[str, float]:
        """The evaluation of the last good state."""
        return self._measured(_variables(self._good))

    def _read_ahead(self, train: data.Stream) -> Generator[data.Split]:
        """The rows of this process in the batches that are left."""
        config = self.config
        local, last = (
            self.trainer.layout.local_rows(config.budget.batch_size),
            config.budget.epochs * self.steps_per_epoch,
        )

        def wanted() -> Iterator[tuple[int, np.ndarray]]:
            for step in range(self.step, last):
                epoch, done = divmod(step, self.steps_per_epoch)
                yield epoch, self._order(epoch)[done][local]

        def read(rows: tuple[int, np.ndarray]) -> data.Split:
            epoch, indices = rows
            return train.rows(indices, augment=(config.seed, epoch) if config.task.augment else None)

        return streams.prefetch(read, wanted())

    def _measured(self, variables: PyTree) -> dict[str, float]:
        """Accuracy and loss on the test images and on those held out; of altered training labels, what was learnt."""
        found = self.trainer.evaluate(variables, self._dataset.test)
        if self._dataset.validation is not None:
            validation = self.trainer.evaluate(variables, self._dataset.validation)
            found |= {f"validation_{name}": value for name, value in validation.items()}
        for name, split in self._altered.items():
            found[name] = self.trainer.evaluate(variables, split)["accuracy"]
        return found

    def _set_good(self, host: TrainState, losses: np.ndarray | None = None) -> None:
        """Takes a state on the host as the last good one: what is saved, here or if the run ends early."""
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(host.params)):
            self._fail(f"The weights of {self.config.method.name} stopped being finite by step {self.step}.")
        padded = np.zeros(self.steps_per_epoch, np.float32)
        if losses is not None:
            padded[: len(losses)] = losses
        self._good = host._asdict() | {"losses": padded, "eigenvectors": self._curvature.eigenvectors}
        if self.folder is not None:
            self.folder.keep(int(host.step), self._good)

    def _checked_losses(self) -> np.ndarray:
        """The losses of the epoch begun; raises Diverged where one is not finite."""
        losses = np.concatenate([np.zeros(0, np.float32), *map(np.atleast_1d, jax.device_get(self._losses))])
        is_finite = np.isfinite(losses)
        if is_finite.all():
            return losses
        first = int(np.argmin(is_finite))
        before = f"; the one before was {losses[first - 1]:.4g}" if first else ""
        step = self.step - len(losses) + first + 1
        where = f"step {step} (epoch {(step - 1) // self.steps_per_epoch + 1})"
        return self._fail(f"The loss of {self.config.method.name} stopped being finite at {where}{before}.")

    def _fail(self, message: str) -> NoReturn:
        """Ends a run that has diverged."""
        message += f" The last good state is that of step {int(self._good['step'])}."
        message += " A smaller rho, gamma or learning_rate may help."
        self.status("diverged", message)
        raise Diverged(message)


class _Wanted(enum.IntEnum):
    """What is to be done after a call, by urgency."""

    NOTHING = 0
    SAVE = 1
    END = 2
    INTERRUPTION = 3


class _Clock:
    """Says what is wanted: a checkpoint (`save_minutes`), the end (`max_minutes`), an interruption.

    Several processes agree on it, at the end of an epoch and after every `AGREE_EVERY` calls; process 0 has the clock.
    """

    def __init__(self, config: TrainConfig, is_interrupted: Callable[[], bool]) -> None:
        self._config, self._is_interrupted = config, is_interrupted
        self._begun_at = self._saved_at = time.monotonic()
        self._calls = 0

    def wanted(self, is_epoch_end: bool, state: TrainState) -> _Wanted:
        """What is wanted after a call, which gives `state`; all processes must ask after the same calls."""
        self._calls += 1
        if jax.process_count() > 1 and not is_epoch_end and self._calls % AGREE_EVERY:
            return _Wanted.NOTHING
        now, config, wanted = time.monotonic(), self._config, _Wanted.NOTHING
        if jax.process_index() == 0:
            if now - self._saved_at > 60 * config.pace.save_minutes:
                wanted = _Wanted.SAVE
            if config.pace.max_minutes != "never" and now - self._begun_at > 60 * config.pace.max_minutes:
                wanted = _Wanted.END
        if self._is_interrupted():
            wanted = _Wanted.INTERRUPTION
        wanted = _Wanted(layouts.agreed(wanted, after=state))
        if wanted > _Wanted.NOTHING:
            self._saved_at = now
        return wanted


class _Curvature:
    """Measures the top Hessian eigenvalue and the norm on `curvature_size` images, where `every` asks for it.

    eigenvectors: those of the last measurement, at first random ones, from which the next begins: a tree shaped like
      the parameters with two vectors along a new first axis; empty without `every`.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer, train: data.Split | data.Stream, params: PyTree) -> None:
        self._trainer = trainer
        key_start, *keys = jax.random.split(jax.random.key(config.seed), 3)
        self._keys = keys[0], keys[1]
        self.eigenvectors: PyTree = {}
        if config.watch.every != "never":
            self._images = train.first(config.watch.curvature_size)
            # The second one is followed too, so that its overtaking the first is seen.
            pairs = jax.tree.map(lambda x: np.zeros((2, *x.shape), np.float32), params)
            self.eigenvectors = runs.snapshot(optax.tree.random_like(key_start, pairs, jax.random.normal))

    def __call__(self, variables: PyTree) -> dict[str, Any]:
        operator = self._trainer.hessian(variables, self._images)
        start = {**operator.like, "params": self.eigenvectors}
        found, vectors = curvature.measure(operator, self._keys, CURVATURE_PRODUCTS, k=2, v0=start)
        self.eigenvectors = runs.snapshot(vectors["params"])
        return found | {"curvature_images": self._images.size}


def _altered(dataset: data.Dataset) -> dict[str, data.Split]:
    """Training images whose label was altered, with that label ("memorized") and with the true one ("recovered")."""
    train = dataset.train
    if dataset.true_labels is None or isinstance(train, data.Stream):
        return {}
    which = np.flatnonzero(train.labels != dataset.true_labels)[:MEMORIZED_SIZE]
    altered = train.take(which)
    return (
        {"memorized": altered, "recovered": altered._replace(labels=dataset.true_labels[which])} if len(which) else {}
    )


def _variables(state: dict[str, PyTree]) -> PyTree:
    """The variables of a state on the host that are evaluated, on the default device."""
    return jax.tree.map(jnp.asarray, runs.evaluated(state))

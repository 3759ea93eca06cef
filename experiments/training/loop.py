"""Runs one training, or the rest of one."""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import math
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments.config import TrainConfig
from experiments.config.fields import number
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
      dataset: the data, after `compiled.subset`; the labels that the seed alters are altered here.
      folder: where metrics and checkpoints go, and what is continued if it holds a checkpoint; None keeps all in
        memory.
      report: called with the metrics of each epoch.
      trainer: one built for the same configuration up to its seed, to share its compilation.

    Raises:
      Diverged: the loss stopped being finite; the last good state is in the folder's checkpoint.
      KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the call of the step (with several processes, after at most
        `AGREE_EVERY` of them) and a checkpoint; a second one at once.
    """
    run = _Run(config, dataset, trainer or build(config, dataset), folder, report or (lambda row: None))
    with interrupts.deferred() as is_interrupted, contextlib.closing(run.batches):
        while run.step < run.last:
            run.advance()
            is_epoch_end = run.step % run.steps_per_epoch == 0
            if is_epoch_end:
                run.end_epoch()
            wanted = run.wanted(is_epoch_end, is_interrupted)
            if wanted > _Wanted.NOTHING or run.step == run.last:
                run.save()
            if wanted == _Wanted.INTERRUPTION:
                raise KeyboardInterrupt
            if wanted == _Wanted.END and run.step < run.last:
                if folder is not None:
                    told = f"max_minutes {config.pace.max_minutes} passed; step {run.step} of {run.last}."
                    folder.status("interrupted", told)
                return Result(run.metrics, runs.evaluated(run.good))
    return Result(run.metrics or run.measured(_variables(run.good)), runs.evaluated(run.good))


class _Wanted(enum.IntEnum):
    """What is to be done after a call, by urgency."""

    NOTHING = 0
    SAVE = 1
    END = 2
    INTERRUPTION = 3


class _Run:
    """A run under way.

    step: steps called so far, of `last`; an epoch has `steps_per_epoch`.
    state: that after them, which the devices may still be making.
    good: the last good state on the host, by name: what is saved, here or if the run ends early.
    metrics: the last evaluation that was made here; empty before the first.
    batches: those of a stream, to be closed.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.Dataset,
        trainer: Trainer,
        folder: runs.RunFolder | None,
        report: Report,
    ) -> None:
        self.config, self.trainer, self.folder, self.report = config, trainer, folder, report
        self._dataset = with_label_noise(config, dataset)
        train, batch_size = self._dataset.train, config.budget.batch_size
        self._is_streamed = isinstance(train, data.Stream)
        self.step, self.steps_per_epoch = 0, train.size // batch_size
        self.last = config.budget.epochs * self.steps_per_epoch
        self.metrics: dict[str, float] = {}
        self._evaluated = frozenset(config.evaluated_epochs())
        # A stream brings its batches itself.
        self._train: Any = () if self._is_streamed else trainer.layout.replicate(train)
        self._order = functools.lru_cache(2)(lambda epoch: data.epoch_order(config.seed, epoch, train.size, batch_size))
        self.state = trainer.init(config.seed)
        # Of the epoch begun; the host waits for the device only where it looks at them.
        self._losses: list[Any] = []
        host = self._on_host()
        # Those of the last measurement of the Hessian, from which the next begins: at first random, and none where it
        # is never measured. The second one is followed too, so that its overtaking the first is seen.
        key_start, *self._curvature_keys = jax.random.split(jax.random.key(config.seed), 3)
        self._eigenvectors: PyTree = {}
        if config.watch.every != "never":
            self._curvature_images = train.first(config.watch.curvature_size)
            pairs = jax.tree.map(lambda x: np.zeros((2, *x.shape), np.float32), host.params)
            self._eigenvectors = runs.snapshot(optax.tree.random_like(key_start, pairs, jax.random.normal))
        self._set_good(host)
        # Process 0 alone has the folder.
        restored = None if folder is None else folder.restore(self.good, self.steps_per_epoch)
        restored = layouts.from_first(restored, self.good)
        if restored is not None:
            # What is empty on the devices stays so: the weights of MSAM that are evaluated are on the host alone.
            saved = [restored[name] if jax.tree.leaves(tree) else tree for name, tree in self.state._asdict().items()]
            # Before its successor comes: the devices may not have room for both.
            del self.state
            self.state = trainer.layout.to_devices(TrainState(*saved))
            self.step = int(restored["step"])
            self._losses = [restored["losses"][: self.step % self.steps_per_epoch]]
            self.good, self._eigenvectors = restored, restored["eigenvectors"]
            logger.info("done already" if self.step == self.last else f"continuing after step {self.step}")
        self.batches = self._read_ahead()
        self._calls, self._begun_at = 0, time.monotonic()
        self._saved_at, self._epoch_begun = self._begun_at, (self.step, self._begun_at)

    def advance(self) -> None:
        """Makes one call: `steps_per_call` steps, or those that are left of the epoch."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = self._order(epoch)[done : done + self.config.pace.steps_per_call]
        if self.config.pace.steps_per_call > 1:
            self.state, losses = self.trainer.steps(self.state, *self._train, order)
        else:
            batch = next(self.batches) if self._is_streamed else (order[0],)
            self.state, losses = self.trainer.step(self.state, *self._train, *batch, kind=self.trainer.kind(self.step))
        self._losses.append(losses)
        if self._is_streamed and len(self._losses) > streams.AHEAD:
            # The device keeps the images of every step that it has not made.
            jax.block_until_ready(self._losses[-1 - streams.AHEAD])
        self.step += len(order)

    def wanted(self, is_epoch_end: bool, is_interrupted: Callable[[], bool]) -> _Wanted:
        """What is wanted after a call: of several processes at the end of an epoch and after `AGREE_EVERY` calls."""
        self._calls += 1
        if jax.process_count() > 1 and not is_epoch_end and self._calls % AGREE_EVERY:
            return _Wanted.NOTHING
        now, pace, wanted = time.monotonic(), self.config.pace, _Wanted.NOTHING
        # Process 0 has the clock.
        if jax.process_index() == 0 and now - self._saved_at > 60 * pace.save_minutes:
            wanted = _Wanted.SAVE
        if jax.process_index() == 0 and now - self._begun_at > 60 * (number(pace.max_minutes) or math.inf):
            wanted = _Wanted.END
        if is_interrupted():
            wanted = _Wanted.INTERRUPTION
        wanted = _Wanted(layouts.agreed(wanted, after=self.state))
        if wanted > _Wanted.NOTHING:
            self._saved_at = now
        return wanted

    def end_epoch(self) -> None:
        """Evaluates where that is due, logs and reports."""
        config, watch, epoch = self.config, self.config.watch, self.step // self.steps_per_epoch
        losses, (first, started) = self._checked_losses(), self._epoch_begun
        speed = (self.step - first) * config.budget.batch_size / (time.monotonic() - started)
        row = {"epoch": epoch, "train_loss": float(losses.mean()), "images_per_second": speed}
        self._losses = []
        if epoch in self._evaluated:
            host = self._on_host()
            variables = _variables(host._asdict())
            self.metrics = self.measured(variables)
            row |= {"step": self.step, **self.metrics, **methods.metrics(host.opt_state)}
            if watch.every != "never" and (self.step == self.last or epoch % watch.every == 0):
                row |= self._measured_curvature(variables)
            if self.folder is not None:
                self.folder.log(row)
            self._set_good(host)
        self.report(row)
        self._epoch_begun = self.step, time.monotonic()

    def save(self) -> None:
        """Writes a checkpoint of where the run is; no process goes on before process 0 has written it."""
        if int(self.good["step"]) != self.step:
            self._set_good(self._on_host())
        if self.folder is not None:
            self.folder.save(self.step, self.good)
        layouts.agreed(0)

    def measured(self, variables: PyTree) -> dict[str, float]:
        """Accuracy and loss on the test images and those held out; of altered training labels, what was learnt."""
        evaluate = functools.partial(self.trainer.evaluate, variables)
        found = evaluate(self._dataset.test)
        if self._dataset.validation is not None:
            found |= {f"validation_{name}": value for name, value in evaluate(self._dataset.validation).items()}
        return found | {name: evaluate(split)["accuracy"] for name, split in self._altered.items()}

    def _measured_curvature(self, variables: PyTree) -> dict[str, Any]:
        """The top Hessian eigenvalue and the norm on `curvature_size` images."""
        operator = self.trainer.hessian(variables, self._curvature_images)
        start = {**operator.like, "params": self._eigenvectors}
        found, vectors = curvature.measure(operator, self._curvature_keys, CURVATURE_PRODUCTS, k=2, v0=start)
        self._eigenvectors = runs.snapshot(vectors["params"])
        return found | {"curvature_images": self._curvature_images.size}

    @functools.cached_property
    def _altered(self) -> dict[str, data.Split]:
        """Training images whose label was altered, with that label ("memorized") and the true one ("recovered")."""
        train, true = self._dataset.train, self._dataset.true_labels
        if true is None or isinstance(train, data.Stream):
            return {}
        which = np.flatnonzero(train.labels != true)[:MEMORIZED_SIZE]
        altered = train.take(which)
        return {"memorized": altered, "recovered": altered._replace(labels=true[which])} if len(which) else {}

    def _read_ahead(self) -> Generator[data.Split]:
        """The rows of this process in the batches that are left, of a stream; of images in memory none."""
        config, train = self.config, self._dataset.train
        local = self.trainer.layout.local_rows(config.budget.batch_size)

        def read(step: int) -> data.Split:
            assert isinstance(train, data.Stream)
            epoch, done = divmod(step, self.steps_per_epoch)
            return train.rows(self._order(epoch)[done][local], (config.seed, epoch) if config.task.augment else None)

        return streams.prefetch(read, range(self.step, self.last) if self._is_streamed else ())

    def _on_host(self) -> TrainState:
        """The state on the host of every process, with what is evaluated of it; all must call it."""
        return methods.on_host(self.config, self.trainer.layout.to_host(self.state))

    def _set_good(self, host: TrainState) -> None:
        """Takes a state on the host, and the losses of the epoch begun, as the last good ones."""
        losses = self._checked_losses()
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(host.params)):
            self._fail(f"The weights of {self.config.method.name} stopped being finite by step {self.step}.")
        padded = np.pad(losses, (0, self.steps_per_epoch - len(losses)))
        self.good = host._asdict() | {"losses": padded, "eigenvectors": self._eigenvectors}
        if self.folder is not None:
            self.folder.keep(int(host.step), self.good)

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
        message += f" The last good state is that of step {int(self.good['step'])}."
        message += " A smaller rho, gamma or learning_rate may help."
        if self.folder is not None:
            self.folder.status("diverged", message)
        raise Diverged(message)


def _variables(state: dict[str, PyTree]) -> PyTree:
    """The variables of a state on the host that are evaluated, on the default device."""
    return jax.tree.map(jnp.asarray, runs.evaluated(state))

"""How a run lies on devices: on one, on several by pmap or by jit over a mesh, in one process or in several.

A step is written once, `(state, images, labels, indices) -> (state, loss)`, for one device that has the whole batch,
and so is a call that takes several, whose indices have an axis of steps before that of the batch. A layout says where
the state, the data set and the batch lie, wraps the step for that, and brings the state to the host and back. The data
set is copied whole to every device and the rows of a batch are gathered there, so that a step moves indices only; a
process sends those of its own rows. Where the data set is streamed the step is `(state, images, labels) -> (state,
loss)` and a process reads and sends the images of its own rows.

                   state                           batch                        averages
    One            on one device                   on one device                none
    Groups         on one device                   `groups` parts, by vmap      the step, over the vmapped axis
    Pmap           a copy on every device          a part on every device       the step, over the mapped axis
    Mesh           a copy on every device, or      a part on every device       XLA, where the program of one
                   split over them (FSDP)                                       device needs it
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from experiments.config import TrainConfig
from experiments.storage import files, runs
from hero_jax import errors, parallel

PyTree = Any
logger = logging.getLogger(__name__)
AXIS = "data"
# How long, in seconds, a process waits for the others: to join, without a sign of life, at the end.
JOIN_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 60
SHUTDOWN_TIMEOUT = 60


class TrainState(NamedTuple):
    """Everything a step changes.

    averaged: {"params", "batch_stats"}, those that are evaluated instead (averages; the weights of MSAM without the
      perturbation); empty where there are none.
    key: the data of a constant key, which makes augmentation and noise with the step number.
    """

    params: PyTree
    batch_stats: PyTree
    averaged: PyTree
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


Step = Callable[..., tuple[TrainState, jax.Array]]
CompiledStep = Callable[..., tuple[TrainState, jax.Array]]


class One:
    """Everything on the default device: the definition that the other layouts agree with.

    axis_name: the mapped axis inside the step; None where the step sees the whole batch.
    num_parts: how many parts of the batch take a step of their own over that axis.
    examples: sharding of the examples that are evaluated at a time; None on one device.
    """

    axis_name: str | None = None
    num_parts: int = 1
    examples: NamedSharding | None = None

    def init(self, init: Callable[[int], TrainState], seed: int) -> TrainState:
        """The state of `init(seed)`, laid out."""
        return init(seed)

    def replicate(self, tree: PyTree) -> PyTree:
        """A tree of host arrays on every device of this layout."""
        return jax.tree.map(jax.numpy.asarray, tree)

    def compile(self, step: Step, *, streamed: bool = False) -> CompiledStep:
        """The step, or several in one call, compiled for this layout.

        It takes the indices of global batches, (batch) or (steps, batch), and gives their mean losses. With `streamed`,
        it takes the images and labels of the rows of this process (`local_rows`), from the host.
        """
        program = self._program(step, (None, 0, 0) if streamed else (None, None, None, 0))

        def run(state: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
            if streamed:
                return program(state, *(self._placed(x, axis=0) for x in arguments))
            *whole, indices = arguments
            local = indices[..., self.local_rows(indices.shape[-1])]
            return program(state, *whole, self._placed(local, axis=indices.ndim - 1))

        return run

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that are on devices of this process."""
        return slice(0, batch_size)

    def _program(self, step: Step, in_axes: tuple[int | None, ...]) -> CompiledStep:
        """The compiled step; of its arguments, those of axis 0 are parts of the batch, made by `_placed`."""
        del in_axes
        return jax.jit(step, donate_argnums=0)

    def _placed(self, x: np.ndarray, axis: int) -> Any:
        """The rows of this process, along `axis`, as the program takes them."""
        del axis
        return x

    def first_row(self, rows: int) -> jax.typing.ArrayLike:
        """Inside the step, where it sees `rows` rows: the number in the global batch of the first of them."""
        return 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * rows

    def mean(self, tree: PyTree) -> PyTree:
        """Inside the step: the mean over the parts of the batch."""
        return parallel.mean(tree, self.axis_name)

    def whole(self, params: PyTree) -> PyTree:
        """Inside the step: the parameters as the network needs them, whole on every device."""
        return params

    def split(self, grads: PyTree) -> PyTree:
        """Inside the step: gradients, laid out as the parameters are between passes."""
        return grads

    def to_host(self, tree: PyTree) -> PyTree:
        """A copy of (part of) a state on the host of every process; all processes must call it."""
        return runs.snapshot(tree)

    def to_devices(self, state: TrainState) -> TrainState:
        """A state from the host, laid out."""
        return jax.tree.map(jax.numpy.asarray, state)


class Groups(One):
    """One device; each of `groups` equal parts of the batch takes the step of a device."""

    axis_name = AXIS

    def __init__(self, groups: int) -> None:
        self.num_parts = groups

    def _program(self, step: Step, in_axes: tuple[int | None, ...]) -> CompiledStep:
        return jax.jit(jax.vmap(step, in_axes=in_axes, out_axes=None, axis_name=AXIS), donate_argnums=0)

    def _placed(self, x: np.ndarray, axis: int) -> np.ndarray:
        return _parts(x, self.num_parts, axis)


class _Many(One):
    """A copy of the state on every device, unless `shardings` says otherwise."""

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = list(devices)
        self._mesh = jax.sharding.Mesh(np.array(self._devices), (AXIS,))  # Auto axes; make_mesh makes Explicit ones
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        local = [d for d in self._devices if d.process_index == jax.process_index()]
        self._local = slice(self._devices.index(local[0]), self._devices.index(local[-1]) + 1)
        self.examples = NamedSharding(jax.sharding.Mesh(np.array(local), (AXIS,)), PartitionSpec(AXIS))

    def init(self, init: Callable[[int], TrainState], seed: int) -> TrainState:
        # Made where it lies, by a program without arguments, which may run on devices of other processes.
        def make() -> TrainState:
            return init(seed)

        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: _laid_out(x, self._replicated), tree)

    def to_devices(self, state: TrainState) -> TrainState:
        return jax.tree.map(_laid_out, state, self.shardings(state))

    def local_rows(self, batch_size: int) -> slice:
        rows = batch_size // len(self._devices)
        return slice(self._local.start * rows, self._local.stop * rows)

    def shardings(self, state: TrainState) -> TrainState:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda _: self._replicated, state)


class Pmap(_Many):
    """Data parallelism: every device takes the step on its rows, and the step averages over `axis_name`."""

    axis_name = AXIS

    def __init__(self, devices: Sequence[Any]) -> None:
        super().__init__(devices)
        self.num_parts = len(self._devices)

    def _program(self, step: Step, in_axes: tuple[int | None, ...]) -> CompiledStep:
        # What every device has a copy of is not mapped, and so has no leading axis outside.
        options: Any = {"axis_name": AXIS, "in_axes": in_axes, "out_axes": None, "devices": self._devices}
        return jax.pmap(step, donate_argnums=0, **options)

    def _placed(self, x: np.ndarray, axis: int) -> np.ndarray:
        return _parts(x, self._local.stop - self._local.start, axis)


class Mesh(_Many):
    """The program of one device on a batch split over a mesh; XLA puts the averages in.

    Args:
      devices: the devices of the mesh.
      shard_params: split parameters, optimizer state and gradients over the devices, each leaf along its largest axis
        that the number of devices divides, or whole where there is none. The network gathers the parameters in every
        pass.
    """

    def __init__(self, devices: Sequence[Any], *, shard_params: bool) -> None:
        super().__init__(devices)
        self._shard_params = shard_params

    def _program(self, step: Step, in_axes: tuple[int | None, ...]) -> CompiledStep:
        del in_axes

        def laid_out(*arguments: Any) -> tuple[TrainState, jax.Array]:
            state, loss = step(*arguments)
            return jax.lax.with_sharding_constraint(state, self.shardings(state)), loss

        return jax.jit(laid_out, donate_argnums=0)

    def _placed(self, x: np.ndarray, axis: int) -> jax.Array:
        by_rows = NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS))
        return jax.make_array_from_process_local_data(by_rows, x)

    def shardings(self, state: TrainState) -> TrainState:
        whole = super().shardings(state)
        if not self._shard_params:
            return whole
        split = {name: getattr(state, name) for name in ("params", "averaged", "opt_state")}
        return whole._replace(**jax.tree.map(self._along_largest, split))

    def whole(self, params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, self._replicated) if self._shard_params else params

    def split(self, grads: PyTree) -> PyTree:
        if not self._shard_params:
            return grads
        return jax.lax.with_sharding_constraint(grads, jax.tree.map(self._along_largest, grads))

    def to_host(self, tree: PyTree) -> PyTree:
        def gathered(x: jax.Array) -> jax.Array | np.ndarray:
            # One leaf after the other: no device holds the whole state.
            return x if x.is_fully_addressable else np.array(jax.jit(_same, out_shardings=self._replicated)(x))

        return runs.snapshot(jax.tree.map(gathered, tree))

    def _along_largest(self, leaf: jax.Array) -> NamedSharding:
        """Split along the largest axis that the devices divide, or a copy on each."""
        dividing = [axis for axis, size in enumerate(leaf.shape) if size and size % len(self._devices) == 0]
        if not dividing:
            return self._replicated
        largest = max(dividing, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self._mesh, PartitionSpec(*[None] * largest, AXIS))


def _same(x: jax.Array) -> jax.Array:
    return x


def _laid_out(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on their devices; each brings what its own devices hold."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def _parts(x: np.ndarray, num_parts: int, axis: int) -> np.ndarray:
    """(..., rows, ...) with the rows along `axis`, as those of each part: (parts, ..., rows / parts, ...)."""
    return np.moveaxis(x.reshape(*x.shape[:axis], num_parts, -1, *x.shape[axis + 1 :]), axis, 0)


def layout(config: TrainConfig) -> One:
    """The layout of a resolved configuration on the devices there are.

    Raises:
      ValueError: fewer devices than asked for, a batch that devices or groups do not divide, several processes that
        would each do the same.
    """
    how = config.layout
    if how.parallel == "none":
        if jax.process_count() > 1:
            raise ValueError(f"`parallel` must be 'pmap' or 'jit' with {jax.process_count()} processes; got 'none'.")
        if how.groups == 1:
            return One()
        _check_divides(config.budget.batch_size, how.groups, "groups")
        return Groups(how.groups)
    # Ordered by process, so that the rows of a process are neighbors.
    available = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    wanted = len(available) if how.devices == "all" else how.devices
    if wanted > len(available):
        raise ValueError(f"`devices` must be at most {len(available)}, which is what there is; got {wanted}.")
    if wanted < len(available) and jax.process_count() > 1:
        raise ValueError(
            f"`devices` must be all {len(available)} of the {jax.process_count()} processes; got {wanted}."
        )
    _check_divides(config.budget.batch_size, wanted, "devices")
    if not how.sync and wanted == 1:
        raise ValueError("`sync` must be True on 1 device: there are no others to differ from; got False.")
    if how.parallel == "pmap":
        return Pmap(available[:wanted])
    return Mesh(available[:wanted], shard_params=how.shard_params)


def with_devices(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of devices, where that is a part of what is computed: parts of m-sharpness."""
    if config.layout.sync or config.layout.parallel == "none" or config.layout.devices != "all":
        return config
    return config.replace(devices=jax.device_count())


def _check_divides(batch_size: int, parts: int, name: str) -> None:
    if batch_size % parts:
        raise ValueError(f"`batch_size` must be a multiple of the {parts} {name}; got {batch_size}.")


def agreed(urgency: int, after: PyTree = None) -> int:
    """The greatest of the numbers that the processes give, in each of them; all must call it.

    `after`: what programs still in flight make. It is waited for, since XLA:CPU may run a small program before a large
    one that was called earlier, and processes whose collectives change places take each other's messages.
    """
    if jax.process_count() == 1:
        return urgency
    jax.block_until_ready(after)
    return int(multihost_utils.process_allgather(np.array(urgency)).max())


def from_first(tree: PyTree | None, like: PyTree) -> PyTree | None:
    """The tree of host arrays, or None, that process 0 has, in every process; `like` is shaped as it."""
    if jax.process_count() == 1 or not agreed(tree is not None):
        return tree
    return multihost_utils.broadcast_one_to_all(like if tree is None else tree)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool = False) -> None:
    """Makes this one of several processes, before JAX has touched a device; with nothing given, does nothing.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which this is, from 0.
      distributed: ask the cluster for these three, which JAX knows how to for Slurm, Open MPI, Kubernetes and TPU pods.

    Raises:
      ValueError: arguments that do not go together, or no cluster to ask.

    Where not all are there within `JOIN_TIMEOUT` seconds, and where one is lost later, JAX ends the process itself.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if distributed and len(missing) < 3:
        name = next(name for name, value in given.items() if value is not None)
        raise ValueError(f"`{name}` has no effect with `distributed`, which asks the cluster; got {given[name]!r}.")
    if not distributed and len(missing) == 3:
        return
    if not distributed:
        if missing:
            raise ValueError(f"`coordinator`, `num_processes` and `process_id` go together; {missing[0]} is missing.")
        assert coordinator is not None
        assert num_processes is not None
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"`coordinator` must be HOST:PORT; got {coordinator!r}.")
        errors.integer("num_processes", num_processes, low=1)
        errors.integer("process_id", process_id, low=0, high=num_processes - 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM and do nothing
    where = "the others" if coordinator is None else f"all {num_processes} processes at {coordinator}"
    logger.info("waiting for %s, at most %d s", where, JOIN_TIMEOUT)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except ValueError as error:
        if not distributed:
            raise
        raise ValueError(
            f"`distributed` needs a cluster that JAX knows; got none ({error}) Give `coordinator`, `num_processes` and"
            " `process_id` instead."
        ) from error


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Turns the error of a collective whose other end is gone into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).split("\n")[0]
        raise files.Failed(f"One of the {jax.process_count()} processes is gone ({reason}).") from error

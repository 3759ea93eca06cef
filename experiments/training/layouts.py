"""How a run lies on devices: on one, on several by pmap, shard_map or jit over a mesh, in one process or in several.

A step is written once, `(state, images, labels, indices) -> (state, loss)`, for one device that has the whole batch,
and so is a call that takes several, whose indices have an axis of steps before that of the batch. The data set is
copied whole to every device and the rows of a batch are gathered there, so that a step moves indices only; a process
sends those of its own rows. Where the data set is streamed the step is `(state, images, labels) -> (state, loss)` and a
process reads and sends the images of its own rows.

                      state                           batch                     averages
    One               on one device                   on one device             none
    One, in groups    on one device                   `groups` parts, by vmap   the step, over the vmapped axis
    Mesh, mapped      a copy on every device          a part on every device    the step, over the mapped axis
    Mesh              a copy on every device, or      a part on every device    XLA, where the program of one
                      split over them (FSDP)                                    device needs it
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
from hero_jax import errors

PyTree = Any
logger = logging.getLogger(__name__)
AXIS = "data"
# How long, in seconds, a process waits for the others: to join, without a sign of life, at the end.
JOIN_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 60
SHUTDOWN_TIMEOUT = 60


class TrainState(NamedTuple):
    """Everything a step changes.

    averaged: {"params", "batch_stats"}, those that are evaluated instead, averages; empty where there are none.
    key: the data of a constant key, which makes augmentation and noise with the step number.
    """

    params: PyTree
    batch_stats: PyTree
    averaged: PyTree
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


Step = Callable[..., tuple[TrainState, jax.Array]]


class Program(NamedTuple):
    """A step, or several in one call, compiled for a layout: called as `One.compile` says.

    run: the call, which brings the rows of a batch to the devices first.
    lower: the program that a step runs, for arguments of these shapes (those of the whole batch), lowered for the
      devices of the layout, which need not be here; nothing is run.
    """

    run: Step
    lower: Callable[..., jax.stages.Lowered]

    def __call__(self, *arguments: Any) -> tuple[TrainState, jax.Array]:
        return self.run(*arguments)


class One:
    """Everything on one device: the definition that `Mesh` agrees with.

    axis_name: the mapped axis inside the step; None where the step sees the whole batch.
    num_parts: how many equal parts of the batch take a step of their own over that axis.
    examples: sharding of the examples that are evaluated at a time; None on one device.

    Args:
      num_parts: None where the step sees the whole batch.
      device: what programs are lowered for; what runs does so on the default device.
    """

    examples: NamedSharding | None = None

    def __init__(self, num_parts: int | None = None, device: Any = None) -> None:
        self.axis_name = None if num_parts is None else AXIS
        self.num_parts = num_parts or 1
        self._device = device
        # The parts that lie on devices of this process, and how many there are.
        self._local, self._all = slice(0, self.num_parts), self.num_parts

    def init(self, init: Callable[[int], TrainState], seed: int) -> TrainState:
        """The state of `init(seed)`, laid out."""
        return init(seed)

    def replicate(self, tree: PyTree) -> PyTree:
        """A tree of host arrays on every device of this layout."""
        return jax.tree.map(jax.numpy.asarray, tree)

    def to_devices(self, state: TrainState) -> TrainState:
        """A state from the host, laid out."""
        return self.replicate(state)

    def to_host(self, tree: PyTree) -> PyTree:
        """A copy of (part of) a state on the host of every process; all processes must call it."""
        return runs.snapshot(tree)

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that are on devices of this process."""
        rows = batch_size // self._all
        return slice(self._local.start * rows, self._local.stop * rows)

    def whole(self, params: PyTree) -> PyTree:
        """Inside the step: the parameters as the network needs them, whole on every device."""
        return params

    def split(self, grads: PyTree) -> PyTree:
        """Inside the step: gradients, laid out as the parameters are between passes."""
        return grads

    def compile(self, step: Step, *, streamed: bool = False) -> Program:
        """The step, or several in one call, compiled for this layout.

        It takes the indices of global batches, (batch) or (steps, batch), and gives their mean losses. With `streamed`,
        it takes the images and labels of the rows of this process (`local_rows`), from the host.
        """
        # Which axis is that of the batch; None for what is whole on every device.
        axes = (0, 0) if streamed else (None, None, -1)
        program = self._program(step, axes)

        def run(state: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
            if streamed:
                return program(state, *(self._placed(x, axis=0) for x in arguments))
            *whole, indices = arguments
            local = indices[..., self.local_rows(indices.shape[-1])]
            return program(state, *whole, self._placed(local, axis=indices.ndim - 1))

        def lower(state: TrainState, *arguments: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
            laid_out = (
                self._abstract_whole(x) if axis is None else self._abstract_rows(x)
                for x, axis in zip(arguments, axes, strict=True)
            )
            return program.lower(self._abstract_state(state), *laid_out)

        return Program(run, lower)

    def _abstract_state(self, state: TrainState) -> TrainState:
        """The shapes of a state, with where it lies."""
        return jax.tree.map(self._abstract_whole, state)

    def _abstract_whole(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The shape of what is whole on every device."""
        return _shape(x, None if self._device is None else jax.sharding.SingleDeviceSharding(self._device))

    def _abstract_rows(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The shape of a batch, as `_placed` makes it of all its rows."""
        if self.axis_name is not None:
            x = jax.ShapeDtypeStruct((self.num_parts, x.shape[0] // self.num_parts, *x.shape[1:]), x.dtype)
        return self._abstract_whole(x)

    def _program(self, step: Step, axes: tuple[int | None, ...]) -> Any:
        """The compiled step; its arguments that have an axis of the batch are made by `_placed`."""
        if self.axis_name is not None:
            step = jax.vmap(step, in_axes=(None, *_first(axes)), out_axes=None, axis_name=AXIS)
        return jax.jit(step, donate_argnums=0)

    def _placed(self, x: np.ndarray, axis: int) -> Any:
        """The rows of this process, along `axis`, as the program takes them: (parts, ..., rows of a part, ...)."""
        if self.axis_name is None:
            return x
        parts = self._local.stop - self._local.start
        return np.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 0)


class Mesh(One):
    """A batch split over devices: by the program of one device, where XLA puts the averages in, or mapped.

    Args:
      devices: the devices of the mesh.
      mapped: None, or "pmap" or "shard_map": every device takes the step on its rows, and the step averages over
        `axis_name`.
      shard_params: split parameters, optimizer state and gradients over the devices, each leaf along its largest axis
        that the number of devices divides, or whole where there is none. The network gathers the parameters in every
        pass. Not mapped.
    """

    def __init__(self, devices: Sequence[Any], *, mapped: str | None, shard_params: bool) -> None:
        super().__init__(len(devices) if mapped else None)
        self._devices, self._shard_params = list(devices), shard_params
        self._is_pmapped, self._is_shard_mapped = mapped == "pmap", mapped == "shard_map"
        self._mesh = jax.sharding.Mesh(np.array(self._devices), (AXIS,))  # Auto axes; make_mesh makes Explicit ones
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        local = [i for i, device in enumerate(self._devices) if device.process_index == jax.process_index()]
        self._local, self._all = slice(local[0], local[-1] + 1), len(self._devices)
        here = jax.sharding.Mesh(np.array(self._devices[self._local]), (AXIS,))
        self.examples = NamedSharding(here, PartitionSpec(AXIS))

    def init(self, init: Callable[[int], TrainState], seed: int) -> TrainState:
        # Made where it lies, by a program without arguments, which may run on devices of other processes.
        def make() -> TrainState:
            return init(seed)

        return jax.jit(make, out_shardings=self._shardings(jax.eval_shape(make)))()

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: _laid_out(x, self._replicated), tree)

    def to_devices(self, state: TrainState) -> TrainState:
        return jax.tree.map(_laid_out, state, self._shardings(state))

    def to_host(self, tree: PyTree) -> PyTree:
        def gathered(x: jax.Array) -> jax.Array | np.ndarray:
            # One leaf after the other: no device holds the whole state.
            is_here = x.is_fully_addressable or x.is_fully_replicated
            return x if is_here else multihost_utils.process_allgather(x, tiled=True)

        return runs.snapshot(jax.tree.map(gathered, tree))

    def whole(self, params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, self._replicated) if self._shard_params else params

    def split(self, grads: PyTree) -> PyTree:
        if not self._shard_params:
            return grads
        return jax.lax.with_sharding_constraint(grads, jax.tree.map(self._along_largest, grads))

    def _abstract_state(self, state: TrainState) -> TrainState:
        return state if self._is_pmapped else jax.tree.map(_shape, state, self._shardings(state))

    def _abstract_whole(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x if self._is_pmapped else _shape(x, self._replicated)

    def _abstract_rows(self, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return super()._abstract_rows(x) if self._is_pmapped else _shape(x, self._by_rows(0))

    def _program(self, step: Step, axes: tuple[int | None, ...]) -> Any:
        if self._is_pmapped:
            # What every device has a copy of is not mapped, and so has no leading axis outside.
            options: Any = {"axis_name": AXIS, "in_axes": (None, *_first(axes)), "out_axes": None}
            return jax.pmap(step, donate_argnums=0, devices=self._devices, **options)

        def mapped(state: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
            of_arguments = [
                PartitionSpec() if axis is None else self._by_rows(axis % x.ndim).spec
                for x, axis in zip(arguments, axes, strict=True)
            ]
            specs: Any = {"in_specs": (PartitionSpec(), *of_arguments), "out_specs": PartitionSpec()}
            return jax.shard_map(step, mesh=self._mesh, **specs)(state, *arguments)

        def laid_out(*arguments: Any) -> tuple[TrainState, jax.Array]:
            state, loss = mapped(*arguments) if self._is_shard_mapped else step(*arguments)
            return jax.lax.with_sharding_constraint(state, self._shardings(state)), loss

        return jax.jit(laid_out, donate_argnums=0)

    def _placed(self, x: np.ndarray, axis: int) -> Any:
        if self._is_pmapped:
            return super()._placed(x, axis)
        return jax.make_array_from_process_local_data(self._by_rows(axis), x)

    def _by_rows(self, axis: int) -> NamedSharding:
        """A part on every device along an axis, that of the batch."""
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS))

    def _shardings(self, state: TrainState) -> TrainState:
        """The sharding of each leaf of the state."""
        whole = jax.tree.map(lambda _: self._replicated, state)
        if not self._shard_params:
            return whole
        split = {name: getattr(state, name) for name in ("params", "averaged", "opt_state")}
        return whole._replace(**jax.tree.map(self._along_largest, split))

    def _along_largest(self, leaf: jax.Array) -> NamedSharding:
        """Split along the largest axis that the devices divide, or a copy on each."""
        dividing = [axis for axis, size in enumerate(leaf.shape) if size and size % len(self._devices) == 0]
        if not dividing:
            return self._replicated
        largest = max(dividing, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self._mesh, PartitionSpec(*[None] * largest, AXIS))


def _first(axes: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The axes of the parts that `One._placed` makes, which it puts first."""
    return tuple(None if axis is None else 0 for axis in axes)


def _shape(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _laid_out(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on their devices; each brings what its own devices hold."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def layout(config: TrainConfig, devices: Sequence[Any] | None = None) -> One:
    """The layout of a resolved configuration on these devices, or those there are.

    Raises:
      ValueError: it does not fit them.
    """
    how, batch_size, processes = config.layout, config.budget.batch_size, jax.process_count()
    # Ordered by process, so that the rows of a process are neighbors.
    available = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    wanted = len(available) if how.devices == "all" else how.devices
    parts, name = (how.groups, "groups") if how.parallel == "none" else (wanted, "devices")
    if how.parallel == "none" and processes > 1:
        raise ValueError(f"`parallel` must be 'pmap', 'shard_map' or 'jit' with {processes} processes; got 'none'.")
    if wanted > len(available):
        raise ValueError(f"`devices` must be at most {len(available)}, which is what there is; got {wanted}.")
    if wanted < len(available) and processes > 1:
        raise ValueError(f"`devices` must be all {len(available)} of the {processes} processes; got {wanted}.")
    if batch_size % parts:
        raise ValueError(f"`batch_size` must be a multiple of the {parts} {name}; got {batch_size}.")
    if how.parallel == "none":
        return One(how.groups if how.groups > 1 else None, None if devices is None else available[0])
    if not how.sync and wanted == 1:
        raise ValueError("`sync` must be True on 1 device: there are no others to differ from; got False.")
    mapped = None if how.parallel == "jit" else how.parallel
    return Mesh(available[:wanted], mapped=mapped, shard_params=how.shard_params)


def with_devices(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of devices, where that is a part of what is computed: parts of m-sharpness."""
    if config.layout.sync or config.layout.parallel == "none" or config.layout.devices != "all":
        return config
    return config.replace(devices=jax.device_count())


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

    `coordinator` is HOST:PORT of process 0, and `process_id` counts from 0. With `distributed` JAX asks the cluster for
    all three. Where not all processes are there within `JOIN_TIMEOUT` seconds, and where one is lost later, JAX ends
    the process itself.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if distributed:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` has no effect with `distributed`, which asks the cluster; got {value!r}.")
    elif len(missing) == 3:
        return
    elif coordinator is None or num_processes is None or process_id is None:
        raise ValueError(f"`coordinator`, `num_processes` and `process_id` go together; {missing[0]} is missing.")
    else:
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
        instead = "Give `coordinator`, `num_processes` and `process_id` instead."
        raise ValueError(f"`distributed` needs a cluster that JAX knows; got none ({error}) {instead}") from error


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

"""How a run lies on devices: on one, on several by pmap, shard_map or jit over a mesh, in one process or in several.

A step is written once, `(state, images, labels, indices) -> (state, loss)`, for one device that has the whole batch,
and so is a call that takes several, whose indices have an axis of steps before that of the batch. The data set is
copied whole to every device and the rows of a batch are gathered there, so that a step moves indices only; a process
sends those of its own rows. Where the data set is streamed the step is `(state, images, labels) -> (state, loss)` and a
process reads and sends the images of its own rows.

    parallel             state                           batch                     averages
    none                 on one device                   on one device             none
    none, in groups      on one device                   `groups` parts, by vmap   the step, over the vmapped axis
    pmap, shard_map      a copy on every device          a part on every device    the step, over the mapped axis
    jit                  a copy on every device, or      a part on every device    XLA, where the program of one
                         split over all (FSDP) or over                             device needs it
                         neighbours (hybrid)
"""

from __future__ import annotations

import contextlib
import functools
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
# The axes of the mesh: copies of the parameters, and the devices that share one; the batch is split over both.
COPIES, AXIS = "copies", "data"
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


class Layout:
    """Where state, data and batches lie, and the programs that are compiled for that.

    axis_name: the mapped axis inside the step; None where the step sees the whole batch.
    num_parts: how many equal parts of the batch take a step of their own over that axis.
    examples: sharding of the examples that are evaluated at a time, over the devices of this process.

    Args:
      config: a resolved configuration.
      devices: those that there are; by default JAX's.
      streamed: a step takes the images and labels of a batch, not indices.

    Raises:
      ValueError: the configuration does not fit the devices.
    """

    def __init__(self, config: TrainConfig, devices: Sequence[Any] | None = None, *, streamed: bool = False) -> None:
        how = config.layout
        self._parallel, self._shard_params, self._devices = how.parallel, how.shard_params, _chosen(config, devices)
        is_mapped = how.groups > 1 or how.parallel in ("pmap", "shard_map")
        self.axis_name = AXIS if is_mapped else None
        self.num_parts = how.groups * len(self._devices) if is_mapped else 1
        # The axis of the batch in what a step takes beside the state; None for what is whole on every device.
        self._is_streamed, self._axes = streamed, (0, 0) if streamed else (None, None, -1)
        # Whether the program takes a batch as (parts, rows of a part).
        self._is_stacked = how.groups > 1 or how.parallel == "pmap"
        axes, sizes = ((AXIS,), (-1,)) if how.shard_devices == "all" else ((COPIES, AXIS), (-1, how.shard_devices))
        # Auto axes; make_mesh makes Explicit ones.
        self._mesh = jax.sharding.Mesh(np.array(self._devices).reshape(sizes), axes)
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        local = [i for i, device in enumerate(self._devices) if device.process_index == jax.process_index()]
        self._local = slice(local[0], local[-1] + 1)
        here = jax.sharding.Mesh(np.array(self._devices[self._local]), (AXIS,))
        self.examples = NamedSharding(here, PartitionSpec(AXIS))

    def init(self, init: Callable[[int], TrainState], seed: int) -> TrainState:
        """The state of `init(seed)`, laid out."""
        if self._parallel == "none":
            return jax.device_put(init(seed), self._replicated)
        # Made where it lies, by a program without arguments, which may run on devices of other processes.
        make = functools.partial(init, seed)
        return jax.jit(make, out_shardings=self._shardings(jax.eval_shape(make)))()

    def replicate(self, tree: PyTree) -> PyTree:
        """A tree of host arrays on every device of this layout."""
        return jax.tree.map(lambda x: _laid_out(x, self._replicated), tree)

    def to_devices(self, state: TrainState) -> TrainState:
        """A state from the host, laid out."""
        return jax.tree.map(_laid_out, state, self._shardings(state))

    def to_host(self, tree: PyTree) -> PyTree:
        """A copy of (part of) a state on the host of every process; all processes must call it."""

        def gathered(x: jax.Array) -> jax.Array | np.ndarray:
            # One leaf after the other: no device holds the whole state.
            is_here = x.is_fully_addressable or x.is_fully_replicated
            return x if is_here else multihost_utils.process_allgather(x, tiled=True)

        return runs.snapshot(jax.tree.map(gathered, tree))

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that are on devices of this process."""
        rows = batch_size // len(self._devices)
        return slice(self._local.start * rows, self._local.stop * rows)

    def whole(self, params: PyTree) -> PyTree:
        """Inside the step: the parameters as the network needs them, whole on every device."""
        return jax.lax.with_sharding_constraint(params, self._replicated) if self._shard_params else params

    def split(self, grads: PyTree) -> PyTree:
        """Inside the step: gradients, laid out as the parameters are between passes."""
        if not self._shard_params:
            return grads
        return jax.lax.with_sharding_constraint(grads, jax.tree.map(self._along_largest, grads))

    def compile(self, step: Step) -> Step:
        """The step, or several in one call, compiled: it takes global indices, or the `local_rows` of a stream."""
        program = self._program(step)

        def run(state: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
            if not self._is_streamed:
                *whole, indices = arguments
                arguments = *whole, indices[..., self.local_rows(indices.shape[-1])]
            placed = (self._placed(x, axis) for x, axis in zip(arguments, self._axes, strict=True))
            return program(state, *placed)

        return run

    def lower(self, step: Step, state: TrainState, *arguments: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """The program of a step on these shapes, of the whole batch; the devices need not be here: nothing is run."""

        def laid_out(x: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
            if axis is None:
                return x.update(sharding=self._replicated)
            parts = (self.num_parts, x.shape[0] // self.num_parts) if self._is_stacked else x.shape[:1]
            return x.update(shape=(*parts, *x.shape[1:]), sharding=self._by_rows(0))

        state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, self._shardings(state))
        placed = (laid_out(x, axis) for x, axis in zip(arguments, self._axes, strict=True))
        return self._program(step).lower(state, *placed)

    def _program(self, step: Step) -> Any:
        """The compiled step; what has an axis of the batch is made by `_placed`."""
        # What every device has a copy of is not mapped, and so has no leading axis outside.
        stacked: Any = {"in_axes": (None, *(None if axis is None else 0 for axis in self._axes)), "out_axes": None}
        if self._parallel == "pmap":
            return jax.pmap(step, AXIS, donate_argnums=0, devices=self._devices, **stacked)

        # By this name profiles and the cache of compiled programs know it.
        def step_laid_out(state: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
            mapped = step
            if self._is_stacked:
                mapped = jax.vmap(step, axis_name=AXIS, **stacked)
            elif self._parallel == "shard_map":
                placed = zip(arguments, self._axes, strict=True)
                specs = [PartitionSpec() if axis is None else self._by_rows(axis % x.ndim).spec for x, axis in placed]
                mapped = jax.shard_map(
                    step, mesh=self._mesh, in_specs=(PartitionSpec(), *specs), out_specs=PartitionSpec()
                )
            state, loss = mapped(state, *arguments)
            return jax.lax.with_sharding_constraint(state, self._shardings(state)), loss

        return jax.jit(step_laid_out, donate_argnums=0)

    def _placed(self, x: Any, axis: int | None) -> Any:
        """An argument as the program takes it: the rows of this process, where its parts are stacked those of each."""
        if axis is None or (self._parallel == "none" and not self._is_stacked):
            return x
        place = axis % x.ndim
        if not self._is_stacked:
            return jax.make_array_from_process_local_data(self._by_rows(place), x)
        parts = self.num_parts * self.examples.num_devices // len(self._devices)
        return np.moveaxis(x.reshape(*x.shape[:place], parts, -1, *x.shape[place + 1 :]), place, 0)

    def _by_rows(self, axis: int) -> NamedSharding:
        """A part on every device along an axis, that of the batch."""
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, self._mesh.axis_names))

    def _shardings(self, state: TrainState) -> TrainState:
        """The sharding of each leaf of the state."""
        whole = jax.tree.map(lambda _: self._replicated, state)
        if not self._shard_params:
            return whole
        split = {name: getattr(state, name) for name in ("params", "averaged", "opt_state")}
        return whole._replace(**jax.tree.map(self._along_largest, split))

    def _along_largest(self, leaf: jax.Array) -> NamedSharding:
        """Split along the largest axis that the devices that share a copy divide, or a copy on each."""
        dividing = [axis for axis, size in enumerate(leaf.shape) if size and size % self._mesh.shape[AXIS] == 0]
        if not dividing:
            return self._replicated
        largest = max(dividing, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self._mesh, PartitionSpec(*[None] * largest, AXIS))


def _laid_out(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on their devices; each brings what its own devices hold."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def _chosen(config: TrainConfig, devices: Sequence[Any] | None) -> list[Any]:
    """The devices that a configuration takes, in the order of the processes: the rows of a process are neighbors."""
    how, batch_size, processes = config.layout, config.budget.batch_size, jax.process_count()
    available = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    wanted = how.devices if how.devices != "all" else 1 if how.parallel == "none" else len(available)
    parts, name = wanted * how.groups, "groups" if how.parallel == "none" else "devices"
    if how.parallel == "none" and processes > 1:
        raise ValueError(f"`parallel` must be 'pmap', 'shard_map' or 'jit' with {processes} processes; got 'none'.")
    if wanted > len(available):
        raise ValueError(f"`devices` must be at most {len(available)}, which is what there is; got {wanted}.")
    if wanted < len(available) and processes > 1:
        raise ValueError(f"`devices` must be all {len(available)} of the {processes} processes; got {wanted}.")
    if batch_size % parts:
        raise ValueError(f"`batch_size` must be a multiple of the {parts} {name}; got {batch_size}.")
    if how.shard_devices != "all" and wanted % how.shard_devices:
        raise ValueError(f"`shard_devices` must divide the {wanted} devices; got {how.shard_devices}.")
    if not how.sync and how.parallel != "none" and wanted == 1:
        raise ValueError("`sync` must be True on 1 device: there are no others to differ from; got False.")
    return available[:wanted]


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
    if distributed:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"`{name}` has no effect with `distributed`, which asks the cluster; got {value!r}.")
    elif coordinator is None or num_processes is None or process_id is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 3:
            return
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

"""Where many runs are made: one after the other in this process, or at once by Ray, on one machine or on a cluster.

Ray gives each run a core, and a GPU where there are any, and starts a run again whose worker died. What a run gives is
in its folder, which all machines must see under the same path.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from hero_jax import errors

Job = TypeVar("Job")
# Makes the jobs that it is called with, one after the other.
Maker = Callable[[Any], None]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Engine:
    """What makes the runs; none of it changes what they give."""

    workers: int = 1
    """Runs that are made at once on this machine; above 1 by the package ray."""
    ray_address: str | None = None
    """Make the runs on this Ray cluster, such as auto or HOST:6379."""

    def __post_init__(self) -> None:
        errors.integer("workers", self.workers, low=1)
        if self.ray_address is not None and self.workers > 1:
            raise ValueError(f"`workers` must be left out with ray_address: the cluster says; got {self.workers}.")
        if not self.is_here and importlib.util.find_spec("ray") is None:
            name = "workers" if self.ray_address is None else "ray_address"
            raise ValueError(f"`{name}` needs the package ray: pip install 'ray>=2.40'.")

    @property
    def is_here(self) -> bool:
        """Whether the runs are made in this process."""
        return self.workers == 1 and self.ray_address is None

    def make(self, jobs: Sequence[Job], begin: Callable[..., Maker], shared: Any, done: Callable[[Job], None]) -> None:
        """Gives `jobs`, values that can be pickled, to workers of Ray.

        In each worker `begin`, a function of a module, makes of `shared` what its jobs are given to. `done` is called
        here with each job when it has ended or is given up. What a job raises is raised here. Whatever ends this ends
        the jobs under way as Ctrl-C does, and waits until they have; a second Ctrl-C does not.
        """
        ray = self._connected()
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(_make)
        # Compiled programs are of this machine.
        cache = jax.config.jax_compilation_cache_dir if self.ray_address is None else None  # pyright: ignore[reportAttributeAccessIssue]
        # In a list, Ray hands the reference on instead of what it refers to.
        references = [ray.put(shared)]
        waiting = {task.remote(begin, references, job, cache, sys.argv): job for job in jobs}
        try:
            while waiting:
                (ended,), _ = ray.wait(list(waiting))
                job = waiting.pop(ended)
                try:
                    ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    logger.info("%s is given up: %s", job, str(error).split("\n")[0])
                done(job)
        finally:
            for reference in waiting:
                ray.cancel(reference)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting))

    def _connected(self) -> Any:
        """Ray, connected to a cluster: that of before, the one of the address, or a new one on this machine."""
        import ray  # an extra, and it takes a second

        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            before = signal.getsignal(signal.SIGTERM)
            with warnings.catch_warnings():
                # JAX warns of the fork that starts the processes of Ray, which run no code of this one.
                warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                ray.init(
                    self.ray_address or "local",
                    num_cpus=self.workers if self.ray_address is None else None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            # Ray took it.
            signal.signal(signal.SIGTERM, before)
            # The memory of an accelerator is for the workers.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return ray


def _make(begin: Callable[..., Maker], references: list[Any], job: Any, cache: str | None, command: list[str]) -> None:
    """On a worker: makes one job."""
    sys.argv = command  # what a run says it was made by
    # By SIGINT Ray ends a task; a shell in the background has its processes ignore that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_compilation_cache_dir", cache)
    _maker(begin, references[0])(job)


@functools.lru_cache(maxsize=1)
def _maker(begin: Callable[..., Maker], reference: Any) -> Maker:
    """What the jobs of a worker are given to, with what it keeps from one to the next."""
    import ray

    return begin(ray.get(reference))

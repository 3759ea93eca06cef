"""The checkpoints of a run folder, RUN/checkpoint/STEP/, by orbax, with a digest of every array.

The digests, by the path of the array in the state, are the `custom_metadata` of the step: {"digests": {PATH: DIGEST}}.
A digest is type, shape and the CRC-32 of the bytes, which finds every flipped bit and every run of 32 of them, and
misses other damage once in four billion times; SHA-256 costs twice as much. Version 0.1 has none, and is not checked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.storage import files
from experiments.storage.files import Failed

PyTree = Any
# Where orbax keeps the `custom_metadata` of a step; asked for them, it reads the whole tree again.
METADATA = "_CHECKPOINT_METADATA"
# Of what fails beside the error that is told, asyncio logs a traceback for each array when it collects them.
logging.getLogger("asyncio").addFilter(lambda record: not re.search("orbax|tensorstore", record.getMessage()))
# What orbax finds damaged, it prints; here it is told once.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class _Manager(ocp.CheckpointManager):
    """One that does not ask JAX's preemption service, which is off: signals are ours."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """Those of one run folder, to be read; with `keep` the last so many are kept, and this process writes them."""

    def __init__(self, run: Path, *, keep: int | None = None) -> None:
        # One process writes; the others do not take part.
        self.run, this = run, jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=keep is not None,
            multiprocessing_options=ocp.options.MultiprocessingOptions(this, {this}),
        )
        # What a checkpoint is does not depend on what the last one looks like.
        self._manager = _Manager(
            (run / "checkpoint").absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps of which there is one, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: PyTree) -> None:
        """Writes one of `state`, a dict of trees of arrays, unless a later one is there already."""
        if step > max(self.steps(), default=-1):
            metadata = {"digests": digests(state)}
            with files.on_disk(self.run), _quiet_callbacks():
                try:
                    self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=metadata)
                except ValueError as error:
                    # What tensorstore makes of an error of the disk.
                    code = re.search(r"os_error_code='(\d+)'", str(error))
                    if code is None:
                        raise
                    raise OSError(int(code[1]), os.strerror(int(code[1]))) from error

    def load(self, like: PyTree = None) -> tuple[int, Any, list[int]]:
        """(step, content, damaged later steps) of the last one that can be read; warns of each that cannot.

        One of which an array is not what was saved is one that cannot be read. The content is a tree shaped as `like`,
        or without it of dicts and lists. Raises Failed where none can be read.
        """
        reasons: dict[int, str] = {}
        for step in self.steps():
            try:
                metadata = json.loads((self.run / "checkpoint" / str(step) / METADATA).read_bytes())
                saved = (metadata.get("custom_metadata") or {}).get("digests")  # none in version 0.1
                with _quiet_callbacks():
                    restored = self._manager.restore(step, args=ocp.args.StandardRestore(like))
                differing = set() if saved is None else saved.items() ^ digests(restored).items()
                if differing:
                    raise ValueError(f"array {min(name for name, _ in differing)} is not what was saved")
            except Exception as error:  # whatever a damaged file raises
                reasons[step] = str(error).split("\n")[0][:200]
            else:
                for later, reason in reasons.items():
                    warnings.warn(f"The checkpoint of step {later} in {self.run} is damaged ({reason}).", stacklevel=3)
                return step, restored, list(reasons)
        step, reason = next(iter(reasons.items()))
        raise Failed(f"No checkpoint in {self.run} can be read (the last is that of step {step}: {reason}).")

    def set_aside(self, steps: list[int]) -> None:
        """Moves damaged ones to RUN/damaged-STEP."""
        with files.on_disk(self.run):
            for step in steps:
                aside, more = self.run / f"damaged-{step}", itertools.count(2)
                while aside.exists():
                    aside = self.run / f"damaged-{step}-{next(more)}"
                (self.run / "checkpoint" / str(step)).rename(aside)
        if steps:
            self._manager.reload()


def digests(state: PyTree) -> dict[str, str]:
    """The digest of every array of a tree, by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = f"{_name(array.dtype)}{array.shape} {zlib.crc32(content):08x}"
    return found


@functools.cache
def _name(kind: np.dtype) -> str:
    return kind.name  # which takes as long as the rest


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Drops what orbax's callbacks print after a failure: a page for each that finds the event loop closed."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield
    # Not reached after a failure: callbacks come later than the error.
    sys.unraisablehook = before

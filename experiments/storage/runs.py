"""Run folders: what a run was, what it measured, its weights, and what it is continued from.

config.json        the resolved configuration
environment.json   versions, device, commit, command; those of later parts of the run under "continued"
metrics.jsonl      one JSON line an evaluation
status.json        running, done, diverged, interrupted or failed; with a message
checkpoint/STEP/   orbax: params, batch_stats and whatever else the run saves of itself (the last two)
damaged-STEP/      a checkpoint that could not be read
lock               locked by the process that writes here, for as long as it lives
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.config import Grouped
from experiments.storage import environment, files
from experiments.storage.files import Failed, read_json, write_json

PyTree = Any


class RunFolder:
    """Writes the folder of one run. Use as a context manager: leaving it settles the checkpoints and the status.

    A folder that already holds a part of the same run is continued: `restore` gives what its last checkpoint holds.
    """

    def __init__(self, path: Path, config: Grouped, may_differ: Collection[str] = ()) -> None:
        """Makes the folder, or opens that of the same run.

        Args:
          path: where; new, empty, or the folder of this run.
          config: the run.
          may_differ: settings of `config` in which parts of one run may differ.

        Raises:
          FileExistsError: the folder holds something else, or another run.
          Busy: another process is writing it.
          Failed: it cannot be written.
        """
        self.path = path
        self._kept: tuple[int, PyTree] | None = None
        with files.on_disk(path), contextlib.ExitStack() as undo:
            file = path / "config.json"
            files.claim_unless(file, besides=("lock",))
            undo.enter_context(files.locked(path))
            if not file.exists():
                write_json(file, files.to_json(config))
            files.check_same(path, config, may_differ)
            self._is_done = read_json(path / "status.json").get("status") == "done"
            if not self._is_done:
                self._begin()
            # One process writes; the others do not take part.
            writer = jax.process_index()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2,
                create=False,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=ocp.options.MultiprocessingOptions(writer, {writer}),
            )
            (path / "checkpoint").mkdir(exist_ok=True)
            self._checkpoints = _checkpoints(path, options)
            self._exit = undo.pop_all()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self._exit, contextlib.closing(self._checkpoints):
            try:
                if error is not None and self._kept is not None:
                    self.save(*self._kept)
            finally:
                if isinstance(error, KeyboardInterrupt) and not self._is_done:
                    self.status("interrupted")
                elif read_json(self.path / "status.json").get("status") == "running":
                    self.status(*(("done",) if error is None else ("failed", str(error))))

    def status(self, status: str, message: str = "") -> None:
        """Records where the run stands."""
        with files.on_disk(self.path):
            write_json(self.path / "status.json", {"status": status, "message": message})

    def log(self, row: dict[str, Any]) -> None:
        """Appends one evaluation to metrics.jsonl."""
        with files.on_disk(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(files.finite(row), allow_nan=False) + "\n")

    def keep(self, step: int, state: PyTree) -> None:
        """Names the state, a tree of host arrays, to save if the run ends early: interrupted, diverged or failed."""
        self._kept = step, state

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint of `state`, a dict of trees of arrays, unless a later one is saved already."""
        if step <= max(self._checkpoints.all_steps(), default=-1):
            return
        try:
            with _quiet_callbacks():
                self._checkpoints.save(step, args=ocp.args.StandardSave(state))
        except (OSError, ValueError) as error:  # ValueError is what tensorstore makes of a full disk
            raise files.unwritten(self.path, error) from error

    def restore(self, like: PyTree) -> PyTree | None:
        """The state of the last checkpoint that can be read, a tree shaped as `like`; None where there is none at all.

        Damaged ones after it are moved aside, with a warning, and the evaluations after it dropped: both will be made
        again.

        Raises:
          Failed: there are checkpoints and none can be read, or the run is done and has none.
        """
        if not self._checkpoints.all_steps():
            if self._is_done:
                raise Failed(f"{self.path} is a run that is done, and its checkpoint is gone; remove what is left.")
            self._forget_after(0)
            return None
        step, restored, damaged = _last_readable(self._checkpoints, self.path, like)
        for later in damaged:
            names = itertools.chain([f"damaged-{later}"], (f"damaged-{later}-{i}" for i in itertools.count(2)))
            aside = next(self.path / name for name in names if not (self.path / name).exists())
            (self.path / "checkpoint" / str(later)).rename(aside)
        if damaged:
            self._checkpoints.reload()
            if self._is_done:
                self._is_done = False
                self._begin()
        self._forget_after(step)
        return restored

    def _begin(self) -> None:
        """Records that, and where, a part of the run takes place."""
        now = environment.current()
        first = read_json(self.path / "environment.json")
        write_json(
            self.path / "environment.json",
            first | {"continued": [*first.get("continued", []), now]} if first else now,
        )
        self.status("running")

    def _forget_after(self, step: int) -> None:
        """Drops the evaluations after a step; the file is written whole or not at all."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            text = file.read_text()
            kept = "".join(f"{line}\n" for line in text.split("\n")[:-1] if json.loads(line)["step"] <= step)
            if kept != text:
                with files.on_disk(self.path):
                    files.write(file, kept)


def _checkpoints(path: Path, options: Any = None) -> ocp.CheckpointManager:
    """The checkpoints of a run folder; what a checkpoint is does not depend on what the last one looks like."""
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager((path / "checkpoint").absolute(), options=options, item_handlers=handler)


def _last_readable(
    manager: ocp.CheckpointManager, path: Path, like: PyTree | None = None
) -> tuple[int, Any, list[int]]:
    """(step, content, damaged later steps) of the last checkpoint that can be read; warns of each that cannot."""
    reasons: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            with _quiet_callbacks():
                restored = manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:  # whatever a damaged file raises
            reasons[step] = str(error).split("\n")[0][:200]
            continue
        for later, reason in reasons.items():
            warnings.warn(f"The checkpoint of step {later} in {path} is damaged ({reason}).", stacklevel=3)
        return step, restored, list(reasons)
    step, reason = next(iter(reasons.items()))
    raise Failed(f"No checkpoint in {path} can be read (the last is that of step {step}: {reason}).")


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


def status(path: Path) -> str | None:
    """Where a run stands: running, done, diverged, interrupted or failed; None where there is no run."""
    return read_json(path / "status.json").get("status")


def load_variables(path: Path) -> PyTree:
    """The network's variables, {"params": ..., "batch_stats": ...}, of the last readable checkpoint in a run folder.

    Raises:
      FileNotFoundError: there is no checkpoint in it.
      Failed: none can be read.
    """
    if not (path / "checkpoint").exists():
        raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; got {path}.")
    with _checkpoints(path) as manager:
        if not manager.all_steps():
            raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; {path} has none yet.")
        _, restored, _ = _last_readable(manager, path)
    return evaluated(restored)


def evaluated(state: dict[str, PyTree]) -> PyTree:
    """The variables of a state that are evaluated: the averages where there are any."""
    return {name: (state.get("averaged") or state)[name] for name in ("params", "batch_stats")}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first; a last line that a killed run left unfinished is dropped."""
    lines = (path / "metrics.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def snapshot(tree: PyTree) -> PyTree:
    """A copy on the host that later donation of the buffers cannot touch."""
    return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))

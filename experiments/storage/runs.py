"""Run folders: what a run was, what it measured, its weights, and what it is continued from.

config.json        the resolved configuration
environment.json   versions, device, commit, command, and the configuration again; of later parts under "continued"
metrics.jsonl      one JSON line an evaluation
status.json        running, done, diverged, interrupted or failed; with a message
checkpoint/STEP/   orbax: params, batch_stats and whatever else the run saves of itself (the last two)
damaged-STEP/      a checkpoint that could not be read
lock               locked by the process that writes here, for as long as it lives
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired

import jax
import numpy as np
from typing_extensions import TypedDict

from experiments.config import TrainConfig
from experiments.storage import claims, environment, files, records
from experiments.storage.checkpoints import Checkpoints
from experiments.storage.files import Failed

PyTree = Any
# Where a run stands.
State = Literal["running", "done", "diverged", "interrupted", "failed"]


@records.schema
class Status(TypedDict):
    """status.json."""

    status: State
    message: NotRequired[str]


@records.schema
class Environment(environment.Part, total=False):
    """environment.json; the configuration is that of config.json, which people write too."""

    config: dict[str, Any]
    continued: list[environment.Part]


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """Writes the folder of one run. Use as a context manager: leaving it settles the checkpoints and the status.

    A folder that already holds a part of the same run is continued: `restore` gives what its last checkpoint holds.
    """

    def __init__(self, path: Path, config: TrainConfig, may_differ: Collection[str] = ()) -> None:
        """Makes the folder, or opens that of the same run, whose parts may differ in the settings `may_differ`.

        Raises FileExistsError where it holds something else or another run, Busy where another process is writing it,
        Failed where it cannot be written.
        """
        self.path, self._config = path, config
        self._kept: tuple[int, PyTree] | None = None
        with files.on_disk(path), contextlib.ExitStack() as undo:
            file = path / "config.json"
            claims.claim(path, besides=("lock",), unless=file.name)
            undo.enter_context(claims.locked(path))
            if not file.exists():
                records.write_settings(file, claims.to_json(config))
            check_same(path, config, may_differ)
            self._is_done = status(path) == "done"
            if not self._is_done:
                self._begin()
            folder = path / "checkpoint"
            if folder.exists() and not folder.is_dir():
                raise FileExistsError(f"`out` must be a run folder; {folder} is no folder.")
            folder.mkdir(exist_ok=True)
            self._checkpoints = Checkpoints(path, keep=2)
            self._exit = undo.pop_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self._exit, self._checkpoints:
            try:
                if error is not None and self._kept is not None:
                    self.save(*self._kept)
            finally:
                if isinstance(error, KeyboardInterrupt) and not self._is_done:
                    self.status("interrupted")
                elif status(self.path) == "running":
                    self.status("done" if error is None else "failed", "" if error is None else str(error))

    def status(self, status: State, message: str = "") -> None:
        """Records where the run stands."""
        records.write(self.path / "status.json", {"status": status, "message": message})

    def log(self, row: dict[str, Any]) -> None:
        """Appends one evaluation to metrics.jsonl."""
        records.append(self.path / "metrics.jsonl", row)

    def keep(self, step: int, state: PyTree) -> None:
        """Names the state, a tree of host arrays, to save if the run ends early: interrupted, diverged or failed."""
        self._kept = step, state

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint of `state`, a dict of trees of arrays, unless a later one is saved already."""
        self._checkpoints.save(step, state)

    def restore(self, like: PyTree, steps_per_epoch: int) -> PyTree | None:
        """The state of the last checkpoint that can be read, a tree shaped as `like`; None where there is none at all.

        Damaged ones after it are moved aside, with a warning, and the evaluations after it dropped: both will be made
        again. Raises Failed where there are checkpoints and none can be read, the run is done and has none, an
        evaluation is damaged, or one that is due before the checkpoint is missing.
        """
        if not self._checkpoints.steps():
            if self._is_done:
                raise Failed(f"{self.path} is a run that is done, and its checkpoint is gone; remove what is left.")
            self._forget_after(0, steps_per_epoch)
            return None
        step, restored, damaged = self._checkpoints.load(like)
        self._forget_after(step, steps_per_epoch)
        self._checkpoints.set_aside(damaged)
        return restored

    def _begin(self) -> None:
        """Records that, and where, a part of the run takes place."""
        first, now = _environment(self.path), environment.current()
        if first:
            record = {**first, "continued": [*first.get("continued", []), now]}
        else:
            record = {**now, "config": records.read(self.path / "config.json")}
        records.write(self.path / "environment.json", record)
        self.status("running")

    def _forget_after(self, step: int, steps_per_epoch: int) -> None:
        """Drops the evaluations after a step, where all that are due until then are there.

        A run that was done and loses some is not done any more.
        """
        file = self.path / "metrics.jsonl"
        rows = read_metrics(self.path) if file.exists() else []
        kept = [row for row in rows if row.get("step", 0) <= step]
        due = [epoch for epoch in self._config.evaluated_epochs() if epoch * steps_per_epoch <= step]
        check_rows(self.path, kept, due)
        if self._is_done and len(kept) < len(rows):
            self._is_done = False
            self._begin()
        text = records.lines(kept)
        if file.exists() and text.encode() != file.read_bytes():
            files.write(file, text)


def status(path: Path) -> str | None:
    """Where a run stands; None where there is no run, or a crash of the machine has left the record empty."""
    return records.read(path / "status.json", Status, may_be_empty=True).get("status")


def config(path: Path) -> TrainConfig:
    """The configuration of a run folder; where it is older than a setting, with the default.

    Raises FileNotFoundError where there is none, Damaged where it is none of a run, or not the one it began with.
    """
    file = path / "config.json"
    settings = records.read(file)
    if not settings:
        raise FileNotFoundError(f"`run` must be a run folder with a config.json; {path} has none.")
    check_begun(path, settings)
    try:
        return TrainConfig.of_saved(settings)
    except (ValueError, TypeError) as error:
        raise records.Damaged(file, str(error)) from None


def check_same(path: Path, config: TrainConfig, may_differ: Collection[str]) -> None:
    """Raises FileExistsError at the folder of another run, by its configuration, Damaged where that was changed."""
    claims.check_same(path, config, may_differ)
    begun = _environment(path).get("config")
    found = begun and claims.difference(begun, config, may_differ)
    if found:
        name, theirs, ours = found
        raise _changed(path, name, repr(ours), repr(theirs))


def check_begun(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises Damaged where settings of a run are not those with which it began, which version 0.1 did not record."""
    begun = _environment(path).get("config", settings)
    for name in sorted(settings.keys() | begun.keys()):
        found, wanted = (repr(each[name]) if name in each else "missing" for each in (settings, begun))
        if found != wanted:
            raise _changed(path, name, found, wanted)


def _environment(path: Path) -> Environment:
    """environment.json; empty where there is none, or a crash of the machine has left it empty."""
    return records.read(path / "environment.json", Environment, may_be_empty=True)


def _changed(path: Path, name: str, found: str, wanted: str) -> records.Damaged:
    return records.Damaged(path / "config.json", f"`{name}` is {found}, but the run began with {wanted}")


def load_variables(path: Path) -> PyTree:
    """The network's variables, {"params": ..., "batch_stats": ...}, of the last readable checkpoint in a run folder.

    Warns where that is not the last one. Raises FileNotFoundError where there is no checkpoint in it, Failed where none
    can be read.
    """
    if not (path / "checkpoint").is_dir():
        raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; got {path}.")
    with Checkpoints(path) as checkpoints:
        if not checkpoints.steps():
            raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; {path} has none yet.")
        step, restored, damaged = checkpoints.load()
    rows = read_metrics(path) if status(path) == "done" and (path / "metrics.jsonl").exists() else []
    if not damaged and any(row.get("step", step) > step for row in rows):
        warnings.warn(f"The last checkpoint of {path} is gone; that of step {step} takes its place.", stacklevel=2)
    return evaluated(restored)


def evaluated(state: dict[str, PyTree]) -> PyTree:
    """The variables of a state that are evaluated: the averages where there are any."""
    return {name: (state.get("averaged") or state)[name] for name in ("params", "batch_stats")}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first; a last line that a killed run left unfinished is dropped.

    Raises Damaged where one is not what was written.
    """
    return [records.numbers(row) for row in records.read_lines(path / "metrics.jsonl", records.Numbers)]


def history(path: Path, config: TrainConfig) -> list[dict[str, Any]]:
    """The evaluations of a run that is done; raises Damaged where one that is due is not there."""
    rows = read_metrics(path)
    check_rows(path, rows, config.evaluated_epochs())
    return rows


def check_rows(path: Path, rows: Sequence[Mapping[str, Any]], due: Sequence[int]) -> None:
    """Raises Damaged where the evaluations of a run are not those of the epochs that are due, in their order."""
    for i, row in enumerate(rows, 1):
        for name in ("epoch", "step", "accuracy"):
            if name not in row:
                raise records.Damaged(path / "metrics.jsonl", f"line {i} lacks `{name}`")
    found = [row["epoch"] for row in rows]
    for epoch, wanted in itertools.zip_longest(found, due):
        if epoch != wanted:
            told = f"it lacks the evaluation of epoch {wanted}" if wanted not in found else f"epoch {epoch} is not due"
            raise records.Damaged(path / "metrics.jsonl", told)


def snapshot(tree: PyTree) -> PyTree:
    """A copy on the host that later donation of the buffers cannot touch."""
    return jax.tree.map(np.array, jax.device_get(tree))

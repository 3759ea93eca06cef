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
import dataclasses
import errno
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import cli

PyTree = Any
# What the name of a file has at its end while it is being written.
UNFINISHED = r"\.[0-9a-f]{8}\.tmp$"


class Busy(FileExistsError):
    """Another process is writing the folder."""


class RunFolder:
    """Writes the folder of one run. Use as a context manager: leaving it settles the checkpoints and the status.

    A folder that already holds a part of the same run is continued: `restore` gives what its last checkpoint holds.
    """

    def __init__(self, path: Path, config: Any, may_differ: Collection[str] = ()) -> None:
        """Makes the folder, or opens that of the same run.

        Args:
          path: where; new, empty, or the folder of this run.
          config: the run, a dataclass.
          may_differ: fields of `config` in which parts of one run may differ.

        Raises:
          FileExistsError: the folder holds something else, or another run.
          Busy: another process is writing it.
          cli.Failed: it cannot be written.
        """
        self.path = path
        self._kept: tuple[int, PyTree] | None = None
        with _disk(path), contextlib.ExitStack() as undo:
            file = path / "config.json"
            _claim_unless(file, besides=("lock",))
            undo.enter_context(locked(path))
            if not file.exists():
                write_json(file, to_json(config))
            check_same(path, config, may_differ)
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
        with _disk(self.path):
            write_json(self.path / "status.json", {"status": status, "message": message})

    def log(self, row: dict[str, Any]) -> None:
        """Appends one evaluation to metrics.jsonl."""
        with _disk(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

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
            raise _unwritten(self.path, error) from error

    def restore(self, like: PyTree) -> PyTree | None:
        """The state of the last checkpoint that can be read, a tree shaped as `like`; None where there is none at all.

        Damaged ones after it are moved aside, with a warning, and the evaluations after it dropped: both will be made
        again.

        Raises:
          cli.Failed: there are checkpoints and none can be read, or the run is done and has none.
        """
        if not self._checkpoints.all_steps():
            if self._is_done:
                raise cli.Failed(f"{self.path} is a run that is done, and its checkpoint is gone; remove what is left.")
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
        now = environment()
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
                with _disk(self.path):
                    _write(file, kept)


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
    raise cli.Failed(f"No checkpoint in {path} can be read (the last is that of step {step}: {reason}).")


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns a disk that does not take what is written into one line."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise _unwritten(path, error) from error


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


def _unwritten(path: Path, error: Exception) -> cli.Failed:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0].split(": ")[-1]
    return cli.Failed(f"{path} could not be written ({reason}); what was saved before is whole.")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder; the system lets go of it when the process ends, however it ends.

    Raises Busy where another process holds it, or with `wait` says so and lasts until that lets go of it.
    """
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Busy(f"`out` must be free; another process is writing {path}.") from None
            cli.console.print(f"waiting for another process that is writing {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"{path} is on a file system without locks: write it from one process only.", stacklevel=4)
        yield


def check_same(path: Path, config: Any, may_differ: Collection[str]) -> None:
    """Raises FileExistsError at the folder of another run, with the first field that differs, or at a damaged one."""
    there = read_json(path / "config.json")
    wanted = "`out` must be a new or empty folder, or that of the same run"
    if not there:
        raise FileExistsError(f"{wanted}; {path / 'config.json'} is damaged. Name another, or remove it first.")
    found = difference(there, config, may_differ)
    if found is not None:
        name, theirs, ours = found
        raise FileExistsError(
            f"{wanted}; {path} has {name} {theirs!r}, not {ours!r}. Name another, or remove it first."
        )


def difference(there: Mapping[str, Any], config: Any, may_differ: Collection[str]) -> tuple[str, Any, Any] | None:
    """The first field, and its two values, in which a saved configuration is not `config` (a dataclass).

    A field that the saved one lacks, since it is older than the field, has its default, or what such runs did
    (`TrainConfig.before`).
    """
    theirs = {field.name: field.default for field in dataclasses.fields(config)}
    if hasattr(config, "before"):
        theirs |= config.before(there.get("method", ""))
    theirs |= dict(there)
    for name, value in json.loads(json.dumps(_finite(to_json(config)))).items():
        if name not in may_differ and json.loads(json.dumps(theirs[name], default=str)) != value:
            return name, theirs[name], value
    return None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none, or a crash of the machine left it unfinished."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def claim(path: Path, besides: Collection[str] = ()) -> None:
    """Makes an empty folder; raises FileExistsError rather than write into one that holds something `besides` these.

    What a process left of a file that it did not finish (`atomic`) counts as nothing.
    """
    if path.exists() and (not path.is_dir() or any(_is_there(file.name, besides) for file in path.iterdir())):
        raise FileExistsError(f"`out` must be a new or empty folder; {path} exists. Name another, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)


def _is_there(name: str, besides: Collection[str]) -> bool:
    return re.search(UNFINISHED, name) is None and name not in besides


def _claim_unless(file: Path, besides: Collection[str]) -> None:
    """Claims the folder of a file unless that is there, or another process writes it at this moment."""
    try:
        if not file.exists():
            claim(file.parent, besides)
    except FileExistsError:
        if not file.exists():
            raise


def claim_same(path: Path, config: Any, may_differ: Collection[str] = (), besides: Collection[str] = ()) -> None:
    """Makes an empty folder for work that `config` (a dataclass) describes, or opens that of the same work.

    Raises FileExistsError where the folder holds something `besides` these names but no such work, or work that
    differs in more than `may_differ`.
    """
    file = path / "config.json"
    _claim_unless(file, besides)
    if file.exists():
        check_same(path, config, may_differ)
    write_json(file, to_json(config))


def status(path: Path) -> str | None:
    """Where a run stands: running, done, diverged, interrupted or failed; None where there is no run."""
    return read_json(path / "status.json").get("status")


def load_variables(path: Path) -> PyTree:
    """The network's variables, {"params": ..., "batch_stats": ...}, of the last readable checkpoint in a run folder.

    Raises:
      FileNotFoundError: there is no checkpoint in it.
      cli.Failed: none can be read.
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


def environment() -> dict[str, Any]:
    """Versions, device, commit and command: what it takes to say where a number came from."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "orbax-checkpoint", "tensorflow-datasets", "scikit-learn")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "machine": {"processor": platform.machine(), "cores": _cores()},
        "commit": commit(),
        "command": [Path(sys.argv[0]).stem, *sys.argv[1:]],
    }


def _cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit() -> str:
    """The commit of this checkout, with "+changes" where files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()[:12] + ("+changes" if changed.stdout.strip() else "")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; numbers that are not finite, which JSON lacks, become null."""
    _write(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Writes what a benchmark found, and the folder it goes to, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def _write(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` whole, when all is written, or not at all."""
    # A name of its own: other processes may write the same file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def snapshot(tree: PyTree) -> PyTree:
    """A copy on the host that later donation of the buffers cannot touch."""
    return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

"""Run folders: what a run was, what it measured, and its weights.

config.json        the resolved configuration
environment.json   versions, device, commit, command
metrics.jsonl      one JSON line an evaluation
status.json        running, done, diverged or interrupted; with a message
checkpoint/STEP/   orbax: params, batch_stats, opt_state (the last two evaluated states that were saved)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any


class RunFolder:
    """Writes the folder of one run. Use as a context manager: leaving it settles the checkpoints and the status."""

    def __init__(self, path: Path, config: Any) -> None:
        """Makes the folder; raises FileExistsError where it holds anything already."""
        claim(path)
        self.path = path
        write_json(path / "config.json", to_json(config))
        write_json(path / "environment.json", environment())
        self.status("running")
        self._kept: tuple[int, PyTree] | None = None
        # One process writes; the others do not take part.
        writer = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(writer, {writer}),
        )
        (path / "checkpoint").mkdir()
        self._checkpoints = ocp.CheckpointManager((path / "checkpoint").absolute(), options=options)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.status("interrupted")
        elif json.loads((self.path / "status.json").read_text())["status"] == "running":
            self.status(*(("done",) if error is None else ("failed", str(error))))
        with contextlib.closing(self._checkpoints):
            if error is not None and self._kept is not None:
                self.save(*self._kept)

    def status(self, status: str, message: str = "") -> None:
        """Records where the run stands."""
        write_json(self.path / "status.json", {"status": status, "message": message})

    def log(self, row: dict[str, Any]) -> None:
        """Appends one evaluation to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def keep(self, step: int, state: PyTree) -> None:
        """Names the state, a tree of host arrays, to save if the run ends early: interrupted, diverged or failed."""
        self._kept = step, state

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint of `state`, a tree of arrays, unless that step is saved already."""
        if step not in self._checkpoints.all_steps():
            self._checkpoints.save(step, args=ocp.args.StandardSave(state))


def claim(path: Path) -> None:
    """Makes an empty folder; raises FileExistsError rather than write into one that holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"`out` must be a new or empty folder; {path} exists. Name another, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)


def load_variables(path: Path) -> PyTree:
    """The network's variables, {"params": ..., "batch_stats": ...}, of the last checkpoint in a run folder.

    Raises:
      FileNotFoundError: there is no checkpoint in it.
    """
    folder = (path / "checkpoint").absolute()
    if not folder.exists():
        raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; got {path}.")
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"`run` must be a run folder with a checkpoint; {path} has none yet.")
        restored = manager.restore(step, args=ocp.args.StandardRestore())
    return {name: restored[name] for name in ("params", "batch_stats")}


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
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "commit": commit(),
        "command": [Path(sys.argv[0]).stem, *sys.argv[1:]],
    }


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


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

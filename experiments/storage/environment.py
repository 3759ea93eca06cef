"""What it takes to say where a number came from: versions, device, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from typing_extensions import TypedDict

from experiments.storage import records


@records.schema
class Device(TypedDict, total=False):
    """The accelerators of a part of a run, those of all its processes."""

    kind: str
    platform: str
    count: int
    processes: int


@records.schema
class Machine(TypedDict, total=False):
    """Its processor, and the cores that the process could use."""

    processor: str
    cores: int | None


@records.schema
class Part(TypedDict, total=False):
    """Where a part of a run took place, or a measurement; of older ones something may be missing."""

    versions: dict[str, str]
    device: Device
    machine: Machine
    commit: str
    command: list[str]


def current() -> dict[str, Any]:
    """All of it, as JSON values; the cores are those that this process may use."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "orbax-checkpoint", "tensorflow-datasets", "scikit-learn")
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "machine": {"processor": platform.machine(), "cores": cores},
        "commit": _commit(),
        "command": [Path(sys.argv[0]).stem, *sys.argv[1:]],
    }


def _commit() -> str:
    """The commit of this checkout, with "+changes" where files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

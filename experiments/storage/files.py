"""Files that are whole or not there, folders that belong to one piece of work, locks, and JSON without NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import re
import secrets
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from experiments.config import Grouped

logger = logging.getLogger(__name__)
# What the name of a file has at its end while it is being written.
UNFINISHED = r"\.[0-9a-f]{8}\.tmp$"


class Failed(RuntimeError):
    """A run ended for a reason that its message tells; not a fault of the program."""


class Busy(FileExistsError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turns a disk that does not take what is written into one line."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: Exception) -> Failed:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0].split(": ")[-1]
    return Failed(f"{path} could not be written ({reason}); what was saved before is whole.")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder; the system lets go of it when the process ends, however it ends.

    Raises Busy where another process holds it, or with `wait` says so and lasts until that lets go of it.
    """
    # A soft lock would outlive a process that is killed.
    lock = filelock.FileLock(path / "lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise Busy(f"`out` must be free; another process is writing {path}.") from None
        logger.info("waiting for another process that is writing %s", path)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{path} is on a file system without locks: write it from one process only.", stacklevel=4)
    try:
        yield
    finally:
        lock.release()


def check_same(path: Path, config: Grouped, may_differ: Collection[str]) -> None:
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


def difference(there: Mapping[str, Any], config: Grouped, may_differ: Collection[str]) -> tuple[str, Any, Any] | None:
    """The first setting, and its two values, in which a saved configuration is not `config`.

    A setting that the saved one lacks, since it is older than the setting, has its default.
    """
    ours = json.loads(json.dumps(finite(to_json(config))))
    theirs = dict(there)
    # That of something else has settings, or values, that are not possible here: compared as they are.
    with contextlib.suppress(TypeError, ValueError):
        theirs = type(config).of_saved(there).flat()
    for name, value in ours.items():
        if name not in may_differ and json.loads(json.dumps(theirs.get(name), default=str)) != value:
            return name, theirs.get(name), value
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


def claim_unless(file: Path, besides: Collection[str]) -> None:
    """Claims the folder of a file unless that is there, or another process writes it at this moment."""
    try:
        if not file.exists():
            claim(file.parent, besides)
    except FileExistsError:
        if not file.exists():
            raise


def claim_same(path: Path, config: Grouped, may_differ: Collection[str] = (), besides: Collection[str] = ()) -> None:
    """Makes an empty folder for work that `config` describes, or opens that of the same work.

    Raises FileExistsError where the folder holds something `besides` these names but no such work, or work that
    differs in more than `may_differ`.
    """
    file = path / "config.json"
    claim_unless(file, besides)
    if file.exists():
        check_same(path, config, may_differ)
    write_json(file, to_json(config))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; numbers that are not finite, which JSON lacks, become null."""
    write(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Writes what a benchmark found, and the folder it goes to, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def write(path: Path, text: str) -> None:
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


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    settings = config.flat() if isinstance(config, Grouped) else dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def cache_folder() -> Path:
    """Where decoded images and compiled programs are kept: HERO_JAX_CACHE, or ~/.cache/hero_jax."""
    base = os.environ.get("HERO_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hero_jax"
    return Path(base).expanduser()

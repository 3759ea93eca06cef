"""Whose a folder is: what it was made for, and which process writes it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from experiments.config import Grouped
from experiments.storage import files, records

logger = logging.getLogger(__name__)


class Busy(FileExistsError):
    """Another process is writing the folder."""


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


def claim(path: Path, besides: Collection[str] = (), unless: str | None = None) -> None:
    """Makes an empty folder; raises FileExistsError rather than write into one that holds something `besides` these.

    With the file `unless` in it, the folder is as good as empty. What a process left of a file that it did not finish
    (`files.atomic`) counts as nothing. A folder with links in it is refused (`files.refuse_links`). Raises Failed where
    the disk does not take it.
    """
    with files.on_disk(path):
        files.refuse_links(path)
        is_taken = path.exists() and (
            not path.is_dir()
            or any(
                file.name not in besides and not re.search(f"{files.UNFINISHED}$", file.name) for file in path.iterdir()
            )
        )
        # Looked for last: another process may write it at this moment.
        if is_taken and not (unless and (path / unless).exists()):
            raise _taken(f"{path} exists.")
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def results(path: Path, ours: Collection[str]) -> Iterator[None]:
    """Claims a folder for files that a record, written last, makes whole: without it they are made anew.

    So those that a killed process left are taken away, and where an error comes, what was written until then.
    """
    claim(path, ours)
    for name in ours:
        (path / name).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        for file in filter(Path.is_file, path.iterdir()):
            file.unlink(missing_ok=True)
        raise


def claim_same(path: Path, config: Grouped, may_differ: Collection[str] = (), besides: Collection[str] = ()) -> None:
    """Makes an empty folder for the work of `config` (`claim`), or opens that of the same work (`check_same`)."""
    file = path / "config.json"
    claim(path, besides, unless=file.name)
    if file.exists():
        check_same(path, config, may_differ)
    records.write_settings(file, to_json(config))


def check_same(path: Path, config: Grouped, may_differ: Collection[str]) -> None:
    """Raises FileExistsError at the folder of another run, with the first setting that differs, or a damaged one."""
    file, or_same = path / "config.json", ", or that of the same run"
    try:
        there = records.read(file)
    except records.Damaged as error:
        raise _taken(str(error), or_same) from None
    if not there:
        raise _taken(f"{file} is damaged.", or_same)
    found = difference(there, config, may_differ)
    if found is not None:
        name, theirs, ours = found
        raise _taken(f"{path} has {name} {theirs!r}, not {ours!r}.", or_same)


def _taken(reason: str, or_same: str = "") -> FileExistsError:
    return FileExistsError(f"`out` must be a new or empty folder{or_same}; {reason} Name another, or remove it first.")


def difference(there: Mapping[str, Any], config: Grouped, may_differ: Collection[str]) -> tuple[str, Any, Any] | None:
    """The first setting, and its two values, in which a saved configuration is not `config`.

    A setting that the saved one lacks, since it is older than the setting, has its default.
    """
    theirs = dict(there)
    # That of something else has settings, or values, that are not possible here: compared as they are.
    with contextlib.suppress(TypeError, ValueError):
        theirs = to_json(type(config).of_saved(there))
    for name, value in to_json(config).items():
        if name not in may_differ and theirs.get(name) != value:
            return name, theirs.get(name), value
    return None


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as it is read back from JSON."""
    settings = config.flat() if isinstance(config, Grouped) else dataclasses.asdict(config)
    return json.loads(json.dumps(records.finite(settings), default=str))

"""Files that are whole or not there, never written through a link, and what is raised where a disk takes none."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What the name of a file has at its end while it is being written.
UNFINISHED = r"\.[0-9a-f]{8}\.tmp"


class Failed(RuntimeError):
    """A run ended for a reason that its message tells; not a fault of the program."""


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turns the OSError of a disk that does not take what is written into one line: Failed."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise Failed(f"{path} could not be written ({reason}); what was saved before is whole.") from error


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all (`atomic`)."""
    with atomic(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` whole, when all is on the disk, or not at all.

    A link of that name is replaced; what it leads to is left alone. Raises Failed where the disk does not take it.
    """
    # A name of its own: other processes may write the same file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with on_disk(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, lines: str) -> None:
    """Adds lines to a file, all or none of them, and waits until they are on the disk.

    A last line that a killed process left unfinished is dropped. Raises Failed where the disk does not take them, or
    the file is a link.
    """
    with on_disk(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            before, left = os.fstat(handle).st_size, lines.encode()
            if before and os.pread(handle, 1, before - 1) != b"\n":
                before = path.read_bytes().rfind(b"\n") + 1
                os.ftruncate(handle, before)
            try:
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, before)
                if not before:
                    path.unlink()
                raise
            if not before:
                _sync_names(path.parent)
        finally:
            os.close(handle)


def _sync_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_links(path: Path) -> None:
    """Raises FileExistsError where a folder that is written to is a link or holds one, or holds what is no plain file.

    What a link leads to, by name or as a second name of the same file, is not part of the folder.
    """
    if path.is_symlink():
        raise FileExistsError(f"`out` must be a folder; {path} is a link. Name what it leads to.")
    for base, folders, names in os.walk(path):
        for name in (*folders, *names):
            each = Path(base, name)
            with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                info = each.lstat()
                is_plain = stat.S_ISREG(info.st_mode) and info.st_nlink <= 1
                if not (is_plain or stat.S_ISDIR(info.st_mode)):
                    raise FileExistsError(
                        f"`out` must be a folder without links and devices; {each} is one. Name another, or remove it."
                    )


def cache_folder() -> Path:
    """Where decoded images and compiled programs are kept: HERO_JAX_CACHE, or ~/.cache/hero_jax."""
    base = os.environ.get("HERO_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hero_jax"
    return Path(base).expanduser()

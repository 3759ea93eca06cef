"""Records: JSON files and files of JSON lines, read back by a schema, each record with a digest of what it says.

The digest, its last entry "sha256", is the SHA-256 of the record without it as JSON with sorted keys and no spaces; in
a file of lines that of the line before comes first, so that a line that is gone or elsewhere shows. What version 0.1 or
a person wrote has none: there the schema alone is checked. A number that is not finite, which JSON lacks, is null.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic

from experiments.storage import files
from experiments.storage.files import Failed

Kind = TypeVar("Kind")
# Decorates the TypedDict of a record, also for those in it: no other entry.
schema = pydantic.with_config(pydantic.ConfigDict(extra="forbid"))
_adapter = functools.cache(pydantic.TypeAdapter)
# Numbers by name, such as an evaluation.
Numbers = dict[str, bool | int | float | None]


class Damaged(Failed):
    """A file does not hold what it must."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}).")


def read(path: Path, kind: type[Kind] = dict[str, Any], *, may_be_empty: bool = False) -> Kind:
    """The record of a file; an empty one where there is no file, or where an empty one is as none.

    Raises Damaged where it is not one of this kind, or its digest is that of another.
    """
    content = _content(path)
    if content is None or (may_be_empty and not content):
        return cast(Kind, {})
    return _checked(path, content, kind)[0]


def read_lines(path: Path, kind: type[Kind] = dict[str, Any]) -> list[Kind]:
    """The records of a file of lines; a last one that a killed process left unfinished is dropped.

    Raises Damaged as `read` does, and where there is no file.
    """
    content = _content(path)
    if content is None:
        raise Damaged(path, "it is not there")
    made: list[Kind] = []
    before = ""
    for i, text in enumerate(content.split(b"\n")[:-1], 1):
        record, before = _checked(path, text, kind, f"line {i}: ", before)
        made.append(record)
    return made


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record and its digest, whole or not at all."""
    write_settings(path, _signed(record))


def append(path: Path, *added: Mapping[str, Any]) -> None:
    """Adds records and their digests to a file of lines, all or none of them; of one process at a time."""
    whole = (_content(path) or b"").split(b"\n")[:-1]
    before = _checked(path, whole[-1], dict[str, Any], f"line {len(whole)}: ", None)[1] if whole else ""
    files.append(path, lines(added, before))


def lines(added: Iterable[Mapping[str, Any]], before: str = "") -> str:
    """Records and their digests as lines; `before` is the digest of the line before them."""
    text = ""
    for record in added:
        made = _signed(record, before)
        before = made["sha256"]
        text += json.dumps(made, allow_nan=False) + "\n"
    return text


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings by name, for people too: without a digest."""
    files.write(path, json.dumps(finite(settings), indent=2, allow_nan=False) + "\n")


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Writes what a benchmark found, and the folder it goes to, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_settings(path, record)


def finite(value: Any) -> Any:
    """JSON values with null for numbers that are not finite, and text (a path, say) as UTF-8 can write it."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of numbers as it was before `finite`."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def _signed(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    # Once through JSON: what is read back has names that are strings.
    said = json.loads(json.dumps(finite(record), allow_nan=False))
    said.pop("sha256", None)
    return said | {"sha256": _digest(said, before)}


def _digest(said: Mapping[str, Any], before: str) -> str:
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256((before + text).encode()).hexdigest()


def _content(path: Path) -> bytes | None:
    """The bytes of a plain file; None where there is nothing of that name."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # a folder, a pipe that would be waited for, a circle of links
        raise Damaged(path, "it is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(path, f"it cannot be read: {error.strerror}") from None


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _checked(path: Path, content: bytes, kind: Any, where: str = "", before: str | None = "") -> tuple[Any, str]:
    """The record of some bytes, and its digest, "" without one; with `before` None it is not compared."""
    try:
        record = json.loads(content.decode(), parse_constant=_refused)
        told = record.pop("sha256", None) if isinstance(record, dict) else None
        # Of one without it too: a number that is too large for JSON is an error here.
        found = _digest(record, before or "")
        if before is not None and told not in (None, found):
            raise ValueError("what it says is not what was written")
        _adapter(kind).validate_python(record, strict=True)
    except (ValueError, RecursionError) as error:
        reason = _rule(error) if isinstance(error, pydantic.ValidationError) else str(error)[:200]
        raise Damaged(path, where + reason) from None
    return record, str(told or "")


def _rule(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong: where, what, as one says it, and the value."""
    first: Any = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = (f"`{place}`: " if place else "") + first["msg"][:1].lower() + first["msg"][1:]
    return message if first["type"] == "missing" else f"{message}; got {str(first['input'])[:60]!r}"

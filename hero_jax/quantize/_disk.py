"""What the writers of files share: a file is whole or not there, and a missing package is named."""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes) -> None:
    """Puts a whole file in place, or leaves what is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def import_extra(function: str, module: str, install: str) -> Any:
    """An optional package; raises ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"`{function}` needs {module}: pip install {install}") from error

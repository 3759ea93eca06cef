"""What the entry points share: the console, and errors in one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import tyro
from rich.console import Console

console = Console(highlight=False)


class Failed(RuntimeError):
    """A run ended for a reason that its message tells; not a fault of the program."""


def run(main: Callable[..., Any]) -> None:
    """Calls `main` with the command line; a user's mistake or a failed run prints one line and exits with 2 or 1."""
    try:
        tyro.cli(main)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        if error.__traceback__ is None or _is_internal(error):
            raise
        sys.exit(f"error: {error}")
    except Failed as error:
        sys.exit(f"stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _is_internal(error: BaseException) -> bool:
    return False

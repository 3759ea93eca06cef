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
    """Calls `main` with the command line; a mistake in it exits with 2 and a failed run with 1, each with one line.

    An error about an argument begins with its name in backquotes (`hero_jax._check`); any other keeps its traceback.
    """
    try:
        tyro.cli(main)
    except (ValueError, TypeError, OSError) as error:
        if not str(error).startswith("`"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

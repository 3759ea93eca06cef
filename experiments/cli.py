"""What the entry points share: the console, and errors in one line instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import tyro
from rich.console import Console

console = Console(highlight=False)


class Failed(RuntimeError):
    """A run ended for a reason that its message tells; not a fault of the program."""


def run(main: Callable[..., Any]) -> None:
    """Calls `main` with the command line; a mistake in it exits with 2 and a failed run with 1, each with one line.

    An error about an argument begins with its name in backquotes (`hero_jax._check`); any other keeps its traceback.
    SIGTERM is taken as Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tyro.cli(main)
    except (ValueError, TypeError, OSError) as error:
        if not str(error).startswith("`"):
            raise
        _leave(f"error: {error}", 2)
    except Failed as error:
        _leave(f"stopped: {error}", 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(message: str, code: int) -> NoReturn:
    """Exits; as one of several processes at once, since JAX would wait for the others, and they for this one."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

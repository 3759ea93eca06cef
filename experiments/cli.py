"""What the entry points share: the console, and errors in one line instead of a traceback."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro
from rich.console import Console

from experiments.storage import files
from experiments.training import interrupts

console = Console(highlight=False)


class _Printer(logging.Handler):
    """Prints what the rooms have to say."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage())


def run(main: Callable[..., Any], *, keep_compiled: bool = True) -> None:
    """Calls `main` with the command line; a mistake in it exits with 2 and a failed run with 1, each with one line.

    An error about an argument begins with its name in backquotes (`hero_jax.errors`); any other keeps its traceback.
    SIGTERM and SIGHUP are taken as Ctrl-C. What is compiled is kept for the next time, unless compilation is what is
    measured; JAX_COMPILATION_CACHE_DIR says where, if it is set.
    """
    logger = logging.getLogger("experiments")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Printer())
    # absl, which orbax imports, prints what is logged to stderr: not these lines again.
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.addFilter(lambda record: not record.name.startswith("experiments"))
    for number in interrupts.ending():
        signal.signal(number, signal.default_int_handler)
    if not keep_compiled:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / f"compiled-{_instructions()}"))
    try:
        tyro.cli(main)
    except (ValueError, TypeError, OSError) as error:
        if not str(error).startswith("`"):
            raise
        _leave(f"error: {error}", 2)
    except files.Failed as error:
        _leave(f"stopped: {error}", 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _instructions() -> str:
    """Names the instructions of this processor: what is compiled for others may crash here, where a home is shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def _leave(message: str, code: int) -> NoReturn:
    """Exits; as one of several processes at once, since JAX would wait for the others, and they for this one."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

"""What the entry points share: the console, and errors in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro
from rich.console import Console

console = Console(highlight=False)


class Failed(RuntimeError):
    """A run ended for a reason that its message tells; not a fault of the program."""


def run(main: Callable[..., Any], *, keep_compiled: bool = True) -> None:
    """Calls `main` with the command line; a mistake in it exits with 2 and a failed run with 1, each with one line.

    An error about an argument begins with its name in backquotes (`hero_jax._check`); any other keeps its traceback.
    SIGTERM and SIGHUP are taken as Ctrl-C. What is compiled is kept for the next time, unless compilation is what is
    measured; JAX_COMPILATION_CACHE_DIR says where, if it is set.
    """
    for number in _ending():
        signal.signal(number, signal.default_int_handler)
    if not keep_compiled:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"compiled-{_instructions()}"))
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


def _ending() -> list[signal.Signals]:
    """Ctrl-C, what ends a job on a cluster, a terminal that goes away; those that `nohup` and shells ignore stay so."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]


def cache_folder() -> Path:
    """Where decoded images and compiled programs are kept: HERO_JAX_CACHE, or ~/.cache/hero_jax."""
    base = os.environ.get("HERO_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hero_jax"
    return Path(base).expanduser()


def _instructions() -> str:
    """Names the instructions of this processor: what is compiled for others may crash here, where a home is shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Takes the first Ctrl-C, SIGTERM or SIGHUP as a request that the block asks for; a second one ends it at once.

    Only the main thread gets signals: in another one nothing is ever requested.
    """
    requests: list[int] = []

    def note(number: int, frame: Any) -> None:
        if requests:
            signal.default_int_handler(number, frame)
        requests.append(number)
        # Neither `print` nor an error is safe here: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nending soon, with a checkpoint; once more ends at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in _ending()}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(message: str, code: int) -> NoReturn:
    """Exits; as one of several processes at once, since JAX would wait for the others, and they for this one."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

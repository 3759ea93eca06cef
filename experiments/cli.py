"""What the entry points share: the console, and errors in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import platform
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.config import Grouped
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
    # A cache that cannot be written costs time and nothing else; each program would say so.
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache entry")
    try:
        for number in interrupts.ending():
            signal.signal(number, signal.default_int_handler)
        if not keep_compiled:
            jax.config.update("jax_enable_compilation_cache", False)
        elif jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / f"compiled-{_instructions()}"))
        call(main, sys.argv[1:])
        interrupts.leave_at_once()
    except (Exception, KeyboardInterrupt) as error:
        interrupts.leave_at_once()
        told = in_one_line(error)
        if told is None:
            raise
        message, code = told
        print(message, file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            # Else JAX would wait for the other processes, and they for this one.
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)


def in_one_line(error: BaseException) -> tuple[str, int] | None:
    """What is printed of an error, and the exit code; None of one that is a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, files.Failed):
        return f"stopped: {error}", 1
    if isinstance(error, ValueError | TypeError | OSError | ImportError) and str(error).startswith("`"):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"stopped: {error.filename or 'a file'} could not be written ({error.strerror}).", 1
    return None


def call(main: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Calls `main` with what the flags say; a `config` of groups has the presets as its defaults."""
    kind = typing.get_type_hints(main).get("config")
    if isinstance(kind, type) and issubclass(kind, Grouped):
        main = functools.partial(main, config=kind.resolve(**_given(kind, arguments)))
    module = getattr(sys.modules["__main__"], "__spec__", None)
    tyro.cli(
        main,
        prog=f"python -m {module.name}" if module else None,
        args=arguments,
        compact_help=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
    )


def _given(kind: type[Grouped], arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that flags name: presets depend on them, and errors of theirs are one line, not tyro's box."""
    settings, given = kind.settings(), {}
    starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(arguments)]):
        flag, has_value, value = arguments[start].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        values = tuple(map(_value, [value] if has_value else arguments[start + 1 : end]))
        if flag.startswith("--no-") and name.removeprefix("no_") in settings:
            given[name.removeprefix("no_")] = False
        elif name in settings and typing.get_origin(settings[name]) is tuple:
            given[name] = values
        elif name in settings and settings[name] is bool:
            given[name] = True
        elif name in settings and values:
            given[name] = values[0]
    return given


def _value(text: str) -> int | float | str:
    """A number or a word."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _instructions() -> str:
    """Names the instructions of this processor: what is compiled for others may crash here, where a home is shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]

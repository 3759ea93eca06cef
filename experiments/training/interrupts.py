"""Ctrl-C, SIGTERM and SIGHUP: in training the first as a request, the second at once; before and after it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Gives what says whether a signal has come since; outside the main thread, which alone gets signals, none has."""
    requests: list[int] = []

    def note(number: int, frame: Any) -> None:
        if requests:
            signal.default_int_handler(number, frame)
        requests.append(number)
        # Neither `print` nor an error is safe here: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nending soon, with a checkpoint; once more ends at once\n")

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in ending()} if is_main else {}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once() -> None:
    """Makes a signal end the process with one line: while modules are imported, and after all, no work is lost."""

    def leave(number: int, frame: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(130)

    for number in ending():
        signal.signal(number, leave)


def ending() -> list[signal.Signals]:
    """Ctrl-C, what ends a job on a cluster, a terminal that goes away; those that `nohup` and shells ignore stay so."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]

"""The first Ctrl-C, SIGTERM or SIGHUP as a request; the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
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
    before = {number: signal.signal(number, note) for number in ending()}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending() -> list[signal.Signals]:
    """Ctrl-C, what ends a job on a cluster, a terminal that goes away; those that `nohup` and shells ignore stay so."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]

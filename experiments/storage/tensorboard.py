"""The metrics of a run for TensorBoard, without TensorFlow: `tensorboard --logdir runs` shows them as they come."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def events(run: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A reporter of the metrics of each epoch that writes them to RUN/tensorboard; ValueError without the package.

    The first one tells TensorBoard to forget what an earlier part of the run wrote of that epoch and later ones.
    """
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ValueError(f"`tensorboard` needs its package ({error}): pip install tensorboard.") from None
    protocol: Any = event_pb2
    writers = []

    def report(row: Mapping[str, Any]) -> None:
        when = {"step": row["epoch"], "wall_time": time.time()}
        if not writers:
            writers.append(EventFileWriter(str(run / "tensorboard")))
            start = protocol.SessionLog(status=protocol.SessionLog.START)
            writers[0].add_event(protocol.Event(**when, session_log=start))
        shown = {name: x for name, x in row.items() if name not in ("epoch", "step") and math.isfinite(x)}
        values = [{"tag": name, "simple_value": x} for name, x in shown.items()]
        writers[0].add_event(protocol.Event(**when, summary={"value": values}))
        writers[0].flush()

    try:
        yield report
    finally:
        for writer in writers:
            writer.close()

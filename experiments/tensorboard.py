"""The metrics of a run for TensorBoard, without TensorFlow: `tensorboard --logdir runs` shows them as they come."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import runs


@contextlib.contextmanager
def events(run: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A reporter of the metrics of each epoch that writes them to RUN/tensorboard.

    Events of an earlier part of the run are written anew from its metrics.jsonl, so that those of steps that are made
    again are not there twice.

    Raises:
      ValueError: the package is not there.
    """
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ValueError(f"`tensorboard` needs its package ({error}): pip install tensorboard.") from None
    folder = run / "tensorboard"
    writers = []

    def write(row: Mapping[str, Any]) -> None:
        values = [
            {"tag": name, "simple_value": value}
            for name, value in row.items()
            if name not in ("epoch", "step") and math.isfinite(value)
        ]
        event: Any = event_pb2
        writers[0].add_event(event.Event(step=row["epoch"], wall_time=time.time(), summary={"value": values}))
        writers[0].flush()

    def report(row: Mapping[str, Any]) -> None:
        if not writers:
            shutil.rmtree(folder, ignore_errors=True)
            writers.append(EventFileWriter(str(folder)))
            for earlier in runs.read_metrics(run) if (run / "metrics.jsonl").exists() else ():
                if earlier["epoch"] < row["epoch"]:
                    write(earlier)
        write(row)

    try:
        yield report
    finally:
        for writer in writers:
            writer.close()

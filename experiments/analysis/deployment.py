"""The section of a report on files for other programs: size, accuracy and time at each bit width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.analysis import page, sections
from experiments.analysis.tidy import read_record
from experiments.measure.deployment import Exported, ExportRecord

HEADER = ["bits", "type", "KiB", "ideal", "accuracy", "JAX", "off by", "ms", "unpacked"]


def cells(rows: Sequence[Exported]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of files."""
    lines = []
    for row in rows:
        sizes = (f"{row[name] / 1024:,.1f}" for name in ("num_bytes", "ideal_bytes"))
        shares = (f"{100 * row[name]:.2f}" for name in ("accuracy", "jax_accuracy"))
        times = (f"{row[name]:.2f}" for name in ("ms", "ms_unpacked"))
        bits = "full" if row["bits"] is None else str(row["bits"])
        lines.append([bits, row["types"], *sizes, *shares, f"{row['difference']:.0e}", *times])
    return HEADER, lines


def told(record: ExportRecord) -> str:
    """What the numbers of a table are."""
    config, flipped = record["config"], sum(row["flipped"] for row in record["rows"])
    rounded = ", inputs and outputs of layers rounded to 8 bits" if config.get("activations") == "int8" else ""
    coded = min(row["coded"] for row in record["rows"] if row["bits"] is not None)
    return (
        f"Accuracy in percent on {record['images']:,} images by onnxruntime {record['onnxruntime']}, and in JAX, with"
        f" weights {config['spec']}, {config['step']}, which are {100 * coded:.1f} percent of the parameters{rounded}."
        f" Predictions that differ: {flipped}. Off by: the largest"
        " difference of a logit, in units of the largest logit. Ideal: KiB with codes of exactly so many bits and the"
        " other weights as they are, without scales and graph. ms: median of"
        f" {config['repeats']} calls with one image, threads: {config['threads']}; unpacked: ms where weights are"
        " unpacked when the file is opened, not at every call."
    )


def section(folders: Sequence[Path]) -> sections.Parts:
    """A table for each folder of files."""
    for folder in folders:
        record = read_record(folder / "export.json", ExportRecord)
        config = record["config"]
        layers = ", int8 activations" if config.get("activations") == "int8" else ""
        yield page.Heading(f"{record['run']}: {config['spec']}, {config['step']}{layers}")
        yield page.Table(*cells(record["rows"]), told(record), left=2)

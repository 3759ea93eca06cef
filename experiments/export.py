"""Writes a saved run to ONNX files: `python -m experiments.export runs/digits-mlp-hero-s0 --bits 8 4 2`.

One in floating point and one for each bit width, each run by onnxruntime on the test images and compared with JAX.
Leaves the files, table.md and export.json. `--show FILE` lists what is in such a file, or in one of `quantize.save`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli, progress
from experiments.analysis import tables
from experiments.analysis.deployment import cells, told
from experiments.config.fields import number
from experiments.measure.deployment import ExportConfig, export, listed, runtime
from experiments.measure.saved import load
from experiments.storage import claims, environment, files, records
from hero_jax.errors import ArgumentError
from hero_jax.quantize import MAX_BITS, MIN_BITS

OURS = ("table.md", "float32.onnx", *(f"bits-{bits}.onnx" for bits in range(MIN_BITS, MAX_BITS + 1)))


def list_file(path: Path) -> None:
    """Prints what is in a file."""
    spec, lines = listed(path)
    cli.console.print(tables.terminal(["tensor", "type", "bits", "shape", "scales", "bytes"], lines, f"{path}: {spec}"))
    cli.console.print(f"{path.stat().st_size:,} bytes in all.")


def main(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    config: Annotated[ExportConfig, tyro.conf.arg(name="")] = ExportConfig(),
    show: Path | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Writes a saved run to ONNX files of a few bits, runs each by onnxruntime, and compares it with JAX.

    Args:
        run: Run folder with a checkpoint.
        config: What to write.
        show: Instead, list what is in this ONNX or safetensors file.
        out: Folder for the files, new or empty; default export in the run.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    if (run is None) == (show is None):
        raise ArgumentError(f"`run` must be a run folder, or `show` a file; got {'none' if run is None else 'both'}.")
    if show is not None:
        list_file(show)
        return
    assert run is not None
    started = time.monotonic()
    installed = runtime().__version__
    with progress.bar() as display:
        report = progress.steps(display)
        (loaded,) = load((run,), data_dir, report, config.calibration, all_test=True).values()
        out = out or run / "export"
        with claims.results(out, OURS):
            rows = export(config, loaded, out, report)
            record: Any = {
                "config": claims.to_json(config),
                "run": run.name,
                "images": min(number(config.images) or loaded.test.size, loaded.test.size),
                "onnxruntime": installed,
                "rows": rows,
                "environment": environment.current(),
            }
            header, lines = cells(rows)
            text = told(record)
            files.write(out / "table.md", f"{tables.markdown(header, lines)}\n{text}\n")
            records.write(out / "export.json", record)
    cli.console.print(tables.terminal(header, lines, f"{run}, {config.spec}, {config.step}"))
    cli.console.print(text)
    cli.console.print(f"{time.monotonic() - started:.0f} s. Files are in {out}.")


if __name__ == "__main__":
    cli.run(main)

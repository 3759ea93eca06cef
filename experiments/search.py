"""Searches the settings of a method: `python -m experiments.search --method hero --rho 0.5 1 2 --gamma 0 100`.

Every combination (or `--rho 0.1 5 --gamma 1 1000 --trials 15`: so many settings between) is trained with the same seeds
and judged by the accuracy after the last epoch on held-out images. Leaves search.json, search.png and the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, data, progress
from experiments.analysis import tables
from experiments.config import LABELS
from experiments.measure import sweep
from experiments.measure.search import SEARCHED, AllDiverged, SearchConfig, best_of, run
from experiments.measure.workers import Engine
from experiments.storage import claims, environment, records


def main(
    config: Annotated[SearchConfig, tyro.conf.arg(name="")],
    out: Path | None = None,
    data_dir: Path | None = None,
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),
) -> None:
    """Searches the settings of a method on training images that are held out, never on the test images.

    Args:
        config: The search.
        out: Folder for everything: new, empty, or that of the same search, which is continued, with other values,
            trials and seeds if you like; default runs/search-DATASET-METHOD.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
        engine: Where the runs are made.
    """
    out = out or Path("runs") / f"search-{config.task.dataset}-{config.method}"
    with progress.bar() as display:
        dataset = data.load(config.task.dataset, data_dir, progress.decoding(display, config.task.dataset))
        sweep.check(config.runs(), dataset)
        claims.claim_same(out, config, config.may_differ(records.read(out / "config.json")))
        if not (out / "search.json").exists():
            # Tells a report that the runs below are trials, however this ends.
            records.write(out / "search.json", {"config": claims.to_json(config), "grid": [], "best": None})
        grid = run(config, dataset, out, progress.lines(display), engine)
    best = best_of(grid)
    record = {"config": claims.to_json(config), "grid": grid, "best": best, "environment": environment.current()}
    records.write(out / "search.json", record)
    if best is None:
        raise AllDiverged("Every run of the search diverged; smaller values of what is searched may help.")
    varied = [name for name in SEARCHED if len({row[name] for row in grid}) > 1]
    if len(varied) == 2 and config.trials == "grid":
        first, second = varied
        values = {(row[first], row[second]): 100 * row["validation_accuracy"] for row in grid}
        from experiments.analysis import plots  # which takes half a second of every command's help

        plots.heat_map(values, (first, second, "validation accuracy, %"), out / "search.png")
    # rho and gamma also where only one value is tried.
    shown = [x for x in SEARCHED if x in varied or (x in ("rho", "gamma") and grid[0][x] is not None)]
    lines = [
        [
            *(f"{row[name]:g}" for name in shown),
            str(row["n"]),
            tables.cell(100 * row["validation_accuracy"], 100 * row["std"]) if row["n"] else "diverged",
            "best" if row == best else "",
        ]
        for row in grid
    ]
    header = [*shown, "n", "validation accuracy, %", ""]
    cli.console.print(tables.terminal(header, lines, LABELS[config.method]))
    labels = config.labels
    noise = f", {labels.label_noise:.0%} {labels.label_noise_kind} label noise" if labels.label_noise else ""
    cli.console.print(
        f"{config.task.dataset}{noise}: accuracy after the last epoch on {config.validation_size:,} training images"
        f" that were held out, mean \u00b1 standard deviation over n seeds. The best is the best of {len(grid)}: its"
        f" own accuracy here flatters it. Runs and results are in {out}."
    )


if __name__ == "__main__":
    cli.run(main)

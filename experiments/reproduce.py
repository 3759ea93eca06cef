"""The whole set of experiments by one command: `python -m experiments.reproduce --dataset digits`.

Each of `PARTS` goes to a folder of its own and can be run alone (`python -m experiments.reproduce accuracy`); after
them comes the report. docs/experiments.md says what each trains and shows, and how a search of your own takes the place
of one here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from experiments import cli, data, landscape, progress, report, search
from experiments.config.fields import number
from experiments.measure import plan, sweep
from experiments.measure.landscape import LandscapeRecord
from experiments.measure.plan import ReproduceConfig
from experiments.measure.search import SearchRecord
from experiments.measure.workers import Engine
from experiments.storage import claims, records, runs
from hero_jax import errors

PARTS = ("search", "accuracy", "noise", "cost", "ablations", "landscape")


def main(
    config: Annotated[ReproduceConfig, tyro.conf.arg(name="")],
    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = PARTS,
    out: Path | None = None,
    data_dir: Path | None = None,
    engine: Annotated[Engine, tyro.conf.arg(name="")] = Engine(),
) -> None:
    """Runs every experiment on one data set and writes the report; given again, continues.

    Args:
        config: What to reproduce.
        parts: search, accuracy, noise, cost, ablations, landscape; in this order.
        out: Folder for everything: new, empty, or that of the same experiments; default runs/reproduce-DATASET.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
        engine: Where the runs are made.
    """
    for part in parts:
        errors.one_of("parts", part, PARTS)
    out = out or Path("runs") / f"reproduce-{config.task.dataset}"
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.task.dataset, data_dir, progress.decoding(display, config.task.dataset))
    held_out = number(config.validation_size) or dataset.train.size // (4 if config.task.dataset == "digits" else 10)
    sweep.check({"hero": config.run({}, held_out)}, dataset)
    claims.claim_same(out, config, may_differ=plan.MAY_DIFFER, besides=("search",))
    # A search that cannot be taken is refused before hours have gone by.
    plan.plan(config, "accuracy", held_out, out)
    for part in (part for part in PARTS if part in parts):
        cli.console.rule(f"{part}, {time.monotonic() - started:.0f} s")
        if part == "search":
            run_searches(config, held_out, out, data_dir, engine)
        elif part == "landscape":
            with claims.locked(out, wait=True):
                draw_landscape(config, out, data_dir)
        else:
            configs = plan.plan(config, part, held_out, out)
            with progress.bar() as display:
                begin = progress.lines(display)
                sweep.run_all(configs, range(config.seeds), dataset, out / part, begin, config.measuring, engine)
    with claims.locked(out, wait=True):
        report.main((out,))
    cli.console.print(f"{time.monotonic() - started:.0f} s")


def run_searches(
    config: ReproduceConfig, held_out: int, out: Path, data_dir: Path | None, engine: Engine = Engine()
) -> None:
    """Runs every search of the plan, each in a folder of its own.

    A method of which every run diverges is left to its preset, on noisy labels to what was found on clean ones.
    Another search that is there, the user's own, is left as it is.
    """
    for name, searched in plan.searches(config, held_out).items():
        path = out / "search" / name
        there = records.read(path / "search.json", SearchRecord).get("config")
        if there is not None and claims.difference(there, searched, ("seeds",)) is not None:
            cli.console.print(f"{path} has a search of its own, which is left as it is")
            continue
        if there is not None:
            searched = searched.replace(seeds=max(searched.seeds, there["seeds"]))
        try:
            search.main(searched, path, data_dir, engine)
        except search.AllDiverged as error:
            cli.console.print(f"{path}: {error}")


def draw_landscape(config: ReproduceConfig, out: Path, data_dir: Path | None) -> None:
    """The landscape of the first runs of SGD, ASAM and HERO, those that ended well, unless it is there.

    While one of them is still to end, and where another landscape is there, it says so instead.
    """
    if not (out / "accuracy").exists():
        raise ValueError(f"`parts` must have accuracy before landscape; {out / 'accuracy'} is not there.")
    planned = [name for name in ("sgd", "asam", "hero") if not config.variants or name in config.variants]
    status = {path: runs.status(path) for path in (out / "accuracy" / "runs" / f"{name}-s0" for name in planned)}
    left = [path.name for path, ended in status.items() if ended not in ("done", "diverged")]
    done = tuple(path for path, ended in status.items() if ended == "done")
    record = records.read(out / "landscape" / "landscape.json", LandscapeRecord)
    if left:
        cli.console.print(f"no landscape before {', '.join(left)} ended: give the command again then")
    elif record and len(record["runs"]) != len(done):
        cli.console.print(f"{out / 'landscape'} is of other runs: remove it for one of {len(done)}")
    elif done and not record:
        chosen = landscape.LandscapeConfig(images=config.measuring.curvature_size)
        landscape.main(done, chosen, out / "landscape", data_dir)


if __name__ == "__main__":
    cli.run(main)

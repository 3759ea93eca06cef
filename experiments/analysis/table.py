"""Saved runs, read back from disk and checked, in one tidy table: a row for each measured number of each run.

measured.json, beside what `experiments.storage.runs` leaves: {"quantized": {SPEC: {"full": %, "8": %, ...}}, "images":
n, "curvature": {"eigenvalue", "eigenvalue_residual", "eigenvalue_converged", "hessian_norm", "hessian_norm_sem",
"images"}}
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.analysis import networks
from experiments.analysis.tables import Frame
from experiments.config import LABELS, METHODS, TrainConfig
from experiments.measure import sweep
from experiments.storage import runs
from experiments.training import methods

# Relative residual to which training looks for the eigenvalue (the default of `spectrum.top_eigenpairs`).
RTOL = 1e-3
CLEAN = {"label_noise": 0.0, "label_noise_kind": "symmetric"}
TASK = ("dataset", "model", "train_size", "validation_size", "test_size", "augment", *CLEAN)
# Numbers of an evaluation that are shown in percent.
SHARES = ("accuracy", "validation_accuracy", "memorized", "recovered")
# metric, epoch (NaN at the end), and value; of rounded weights the quantizer and the width too.
COLUMNS = ["metric", "epoch", "value", "spec", "bits"]
Row = tuple[str, float, float, str | None, str | None]
OF_RUN = ("run", "seed", "commit", "hardware")
# Where a run is shown, and what is told of it.
PLACE = ["section", "title", "clean", "split", "noise", "kind", "method", "network", "rank", *OF_RUN]


class Found(NamedTuple):
    """What lies below some folders.

    runs: a row for each run folder, in the order of names: what `_record` says.
    table: a row for each finished run and metric (`COLUMNS`), with `run` (its row in `runs`), seed, commit, hardware,
      method, network (its name), title (of its task), clean (that of its task on clean labels), split, noise, kind,
      rank (of the network in its task) and section: main, cost (below folders named cost) or ablations (below folders
      named so, and beside each of them the networks in main of that task and method). Trials of searches are left out.
    landscapes, searches: folders of landscape.json and of search.json, in the order of names.
    """

    runs: Frame
    table: Frame
    landscapes: list[Path]
    searches: list[Path]


def read(folders: Iterable[Path]) -> Found:
    """Everything below the folders, each once.

    Raises:
      ValueError: there is no run, or one that is damaged, unknown or there twice, or a network was not measured alike.
    """
    folders = list(folders)
    paths: dict[Path, Path] = {}
    for folder in folders:
        for base, below, _ in os.walk(folder):
            below[:] = sorted(name for name in below if name != "checkpoint" and not name.startswith("damaged-"))
            paths.setdefault(Path(base).resolve(), Path(base))
    found = [record for path in paths.values() if (record := _record(path)) is not None]
    if not found:
        named = ", ".join(map(str, folders)) or "none"
        raise ValueError(f"`folders` must hold run folders (config.json, metrics.jsonl); got none below {named}.")
    landscapes = [p for p in paths.values() if p.name.startswith("landscape") and (p / "landscape.json").exists()]
    searches = [path for path in paths.values() if (path / "search.json").exists()]
    placed = _placed([run | {"run": i} for i, run in enumerate(found) if run["is_done"]], searches)
    numbers = [(i, *row) for i, run in enumerate(found) if run["is_done"] for row in run["values"]]
    table = _frame(placed, PLACE).merge(_frame(numbers, ["run", *COLUMNS]), on="run")
    return Found(pd.DataFrame(found, dtype=object), table, landscapes, searches)


def _frame(rows: Iterable[Any], columns: Sequence[str]) -> Frame:
    kinds = {"epoch": float, "value": float, "commit": "category", "hardware": "category"}
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.astype({name: kind for name, kind in kinds.items() if name in frame})


def _record(path: Path) -> dict[str, Any] | None:
    """What `read` needs of a run folder; None where it is not that of a run."""
    fields, status = read_json(path / "config.json"), read_json(path / "status.json")
    has_rows = (path / "metrics.jsonl").exists()
    if not {"method", "dataset"} <= set(fields) or not (has_rows or status):
        return None
    config = _config(path, fields)
    rows, measured = runs.read_metrics(path) if has_rows else [], read_json(path / "measured.json")
    environment, network = read_json(path / "environment.json"), networks.network(config)
    parts = [environment, *environment.get("continued", [])] if environment else []
    network |= {} if network["label_noise"] else CLEAN
    # Held-out images took the place of the test images in older runs.
    is_older = network["validation_size"] and not any("validation_accuracy" in row for row in rows)
    split, is_done = "validation" if is_older else "test", status.get("status") == "done" and bool(rows)
    numbers = values(config, rows, measured) if is_done else []
    quantized = {spec: list(row) for spec, row in measured.get("quantized", {}).items()}
    images = {name: value for name, _, value, *_ in numbers if name in ("images", "curvature_images")}

    def told(tell: Callable[[dict[str, Any]], str], between: str = " then ") -> str:
        return between.join(dict.fromkeys(map(tell, parts))) or "unknown"

    return {
        "path": path,
        "status": status.get("status", "unknown"),
        "message": status.get("message", ""),
        "is_done": is_done,
        "commit": told(lambda part: part.get("commit", "unknown")),
        "hardware": told(machine),
        "versions": told(lambda part: ", ".join(f"{n} {v}" for n, v in part.get("versions", {}).items()), "; "),
        "command": told(lambda part: " ".join(part.get("command", ["unknown"]))),
        "network": network,
        "seed": networks.settings(config)["seed"],
        "split": split,
        "task": (*((network[name] is not None, network[name]) for name in TASK), split),
        "alike": {
            "images": images.get("images"),
            "quantizers": quantized or None,
            "images for the curvature": images.get("curvature_images"),
        },
        "values": numbers,
    }


def _config(path: Path, fields: dict[str, Any]) -> TrainConfig:
    """The configuration that a folder was left with; where it is older than a setting, with the default."""
    unknown = sorted(set(fields) - set(TrainConfig.settings()))
    if unknown:
        raise ValueError(f"`folders` must hold runs of fields that are known here; {path} has {', '.join(unknown)}.")
    try:
        return TrainConfig.of_saved(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`folders` must hold runs that are possible here; {path} is not: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`folders` must hold whole files; {file} is damaged ({error}).") from None


def of_sweep(found: Iterable[sweep.Run]) -> Frame:
    """The numbers of the runs of a sweep of methods, each a network: `COLUMNS` with network, run and seed."""
    numbers = [
        (LABELS[run.name], i, networks.settings(run.config)["seed"], *row)
        for i, run in enumerate(found)
        for row in values(run.config, run.history, run.measured)
    ]
    return _frame(numbers, ["network", "run", "seed", *COLUMNS])


def values(config: TrainConfig, rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Row]:
    """The measured numbers of a run: those of each evaluation, then those of the end; `COLUMNS`.

    Those of the end: accuracy, that at the first epoch of the highest validation accuracy (at_best_validation), and
    the highest; seconds in training steps; gradients per step and in all; curvature; accuracy of rounded weights
    ("2 bit, channel-narrow"). Norm of the penalty's term over that of the gradient it is added to: penalty_share.
    """
    made: list[tuple[str, float, float]] = []
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}
        made += [(n, row["epoch"], 100 * value if n in SHARES else value) for n, value in numbers.items()]
    sizes = [row.get("penalty_grad_norm") and row["perturbed_grad_norm"] for row in rows]
    if any(sizes):
        made += [
            ("penalty_share", row["epoch"], row["penalty_grad_norm"] / size if size else math.nan)
            for row, size in zip(rows, sizes, strict=True)
        ]
    last, settings = rows[-1], networks.settings(config)
    end = {name: 100 * last[name] for name in ("accuracy", "memorized", "recovered") if name in last}
    end |= {name: last[name] for name in ("train_loss",) if name in last}
    end["highest"] = 100 * max(row["accuracy"] for row in rows)
    validated = [row for row in rows if "validation_accuracy" in row]
    if validated:
        end["at_best_validation"] = 100 * max(validated, key=lambda row: row["validation_accuracy"])["accuracy"]
    gradients, seconds = methods.gradients(config), _seconds(rows, settings["batch_size"])
    end |= {"epochs": settings["epochs"], "gradients": gradients, "gradients_in_all": gradients * last["step"]}
    end |= {} if seconds is None else {"seconds": seconds, "ms_per_step": 1000 * seconds / last["step"]}
    end |= curvature(settings, last, measured)
    end |= {"images": measured["images"]} if "images" in measured else {}
    made += [(name, math.nan, value) for name, value in end.items()]
    rounded = [
        (width_label(bits, spec), math.nan, value, spec, bits)
        for spec, row in measured.get("quantized", {}).items()
        for bits, value in row.items()
    ]
    return [*((*row, None, None) for row in made), *rounded]


def width_label(bits: str, spec: str = "") -> str:
    """The metric of an accuracy with rounded weights, or without the quantizer the name of its column."""
    return (bits if bits == "full" else f"{bits} bit") + (f", {spec}" if spec else "")


def curvature(settings: networks.Settings, last: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The curvature at the end, from measured.json or from the last epoch; empty where it was not measured."""
    if measured.get("curvature"):
        # null is what a number that is not finite was written as.
        found = {name: math.nan if value is None else value for name, value in measured["curvature"].items()}
        return {"curvature_images" if name == "images" else name: value for name, value in found.items()}
    if "eigenvalue" not in last:
        return {}
    names = ("eigenvalue", "eigenvalue_residual", "hessian_norm", "hessian_norm_sem")
    images = last.get("curvature_images", settings["curvature_size"])
    is_found = last["eigenvalue_residual"] <= RTOL
    return {name: last[name] for name in names} | {"eigenvalue_converged": is_found, "curvature_images": images}


def _seconds(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float | None:
    """Time in training steps; the speed of an evaluated epoch stands for those since the one evaluated before.

    That of the second evaluated epoch stands for the first too, in which a process may compile.
    """
    speeds: list[Any] = [row.get("images_per_second") for row in rows]
    if not all(speeds):
        return None
    speeds[:1] = speeds[1:2] or speeds[:1]
    images = (batch_size * (after - before) for before, after in itertools.pairwise([0, *(r["step"] for r in rows)]))
    return sum(n / speed for n, speed in zip(images, speeds, strict=True))


def _placed(found: Sequence[dict[str, Any]], searches: Sequence[Path]) -> list[tuple[Any, ...]]:
    """Where each run is shown and under which name: `PLACE`."""
    by_section: dict[str, list[dict[str, Any]]] = {"main": [], "ablations": [], "cost": []}
    for run in found:
        path = run["path"]
        if not any(folder in path.parents for folder in searches):
            at_equal_cost = path.parent.parent.name == "cost"
            by_section["cost" if at_equal_cost else "ablations" if "ablations" in path.parts else "main"].append(run)

    def of_task(run: Mapping[str, Any]) -> tuple[Any, ...]:
        return _title(run["network"] | CLEAN), run["split"]

    def of_method(run: Mapping[str, Any]) -> tuple[Any, ...]:
        return run["task"], run["network"]["method"]

    main, at_equal_cost = (sorted(by_section[name], key=lambda run: run["task"]) for name in ("main", "cost"))
    made = [row for group in _groups(main, of_task) for row in _named("main", group)]
    for group in _groups(by_section["ablations"], of_method):
        taken = [run["network"] for run in group]
        beside = [run for run in by_section["main"] if of_method(run) == of_method(group[0])]
        group += [run for run in beside if run["network"] not in taken]
        made += _named("ablations", group, f"{LABELS[group[0]['network']['method']]} by setting: ")
    return made + [row for group in _groups(at_equal_cost, of_task) for row in _named("cost", group)]


def _groups(found: Iterable[dict[str, Any]], by: Callable[[dict[str, Any]], Any]) -> list[list[dict[str, Any]]]:
    made: dict[Any, list[dict[str, Any]]] = {}
    for run in found:
        made.setdefault(by(run), []).append(run)
    return list(made.values())


def _named(section: str, group: Sequence[dict[str, Any]], prefix: str = "") -> list[tuple[Any, ...]]:
    """Rows of what is shown together: by task, in it methods as they are listed, the plain one first, then by setting.

    Raises:
      ValueError: a network has a seed twice, or its runs were measured on other images or with other quantizers.
    """
    networks.refuse_twice((run["path"], (networks.key(run["network"]), run["seed"])) for run in group)
    named = networks.names(run["network"] | CLEAN for run in group)

    def order(run: Mapping[str, Any]) -> tuple[Any, ...]:
        plain = run["network"] | CLEAN
        is_named = named[networks.key(plain)] != LABELS[plain["method"]]
        return list(METHODS).index(plain["method"]), is_named, *((value is not None, value) for value in plain.values())

    made = []
    for rank, of_network in enumerate(_groups(sorted(group, key=order), order)):
        name = named[networks.key(of_network[0]["network"] | CLEAN)]
        for alike in _groups(of_network, lambda run: run["task"]):
            _check_measured_alike(name, alike)
        for run in of_network:
            own, noise = run["network"], tuple(run["network"][setting] for setting in CLEAN)
            titles = (prefix + _title(settings) for settings in (own, own | CLEAN))
            row = (section, *titles, run["split"], *noise, own["method"], name, rank, *(run[what] for what in OF_RUN))
            made.append((run["task"], row))
    return [row for _, row in sorted(made, key=lambda pair: pair[0])]


def _check_measured_alike(name: str, group: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a mean over runs that were evaluated on different images or with different quantizers."""
    for what in group[0]["alike"]:
        told = [(run["path"], run["alike"][what]) for run in group if run["alike"][what] is not None]
        for path, other in told[1:]:
            if other != told[0][1]:
                raise ValueError(
                    f"`folders` must have the runs of {name} measured alike; {what}: {told[0][1]} in {told[0][0]},"
                    f" {other} in {path}."
                )


def machine(part: Mapping[str, Any]) -> str:
    """The hardware of a part of a run (environment.json)."""
    device, machine = part.get("device", {}), part.get("machine", {})
    return f"{device.get('count', '?')} x {device.get('kind', 'unknown device')}, {machine.get('cores', '?')} cores"


def _title(settings: Mapping[str, Any]) -> str:
    """A task in words."""
    sizes = {"train_size": "training images", "validation_size": "held out", "test_size": "test images"}
    parts = [settings["dataset"], str(settings["model"])]
    parts += [f"{settings[name]:,} {what}" for name, what in sizes.items() if settings[name]]
    parts += [] if settings["augment"] else ["no augmentation"]
    if settings["label_noise"]:
        parts.append(f"{100 * settings['label_noise']:g} % {settings['label_noise_kind']} label noise")
    return ", ".join(parts)

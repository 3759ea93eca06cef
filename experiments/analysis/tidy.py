"""Saved runs, read back from disk and checked, in one tidy table: a row for each measured number of each run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.analysis import networks
from experiments.analysis.tables import Frame
from experiments.config import LABELS, TrainConfig
from experiments.measure import sweep
from experiments.storage import records, runs
from experiments.training import methods

# Relative residual to which training looks for the eigenvalue (the default of `spectrum.top_eigenpairs`).
RTOL = 1e-3
CLEAN = {"label_noise": 0.0, "label_noise_kind": "symmetric"}
TASK = ("dataset", "model", "train_size", "validation_size", "test_size", "augment", *CLEAN)
# Numbers of an evaluation that are shown in percent.
SHARES = ("accuracy", "validation_accuracy", "memorized", "recovered")
# Those of the last evaluation that are numbers of the end too.
AT_END = ("accuracy", "memorized", "recovered", "train_loss")
# metric, epoch (NaN at the end), and value; of rounded weights the quantizer and the width too.
COLUMNS = ["metric", "epoch", "value", "spec", "bits"]
Row = tuple[str, float, float, str | None, str | None]
# Where a run is shown, and what is told of it.
PLACE = ["section", "title", "clean", "split", "noise", "kind", "altered", "method", "network", "rank"]
PLACE += ["run", "seed", "commit", "hardware"]


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Raises ValueError where a file that is read is damaged."""
    try:
        yield
    except records.Damaged as error:
        raise ValueError(f"`folders` must hold whole files; {error}") from None


read_record = _whole()(records.read)


class Found(NamedTuple):
    """What lies below some folders.

    runs: a row for each run folder, in the order of names: what `_record` says.
    table: a row for each finished run and metric (`COLUMNS`), with where it is shown (`PLACE`): network (its name),
      title of its task, clean (that on clean labels), altered (its label noise in words), rank of the network in its
      task, run (its row in `runs`), and section: main, cost (below folders named cost) or ablations (below folders
      named so, and beside each of them the networks in main of that task and method). Trials of searches are left out.
    landscapes, searches, exports: folders of landscape.json, search.json and export.json, in the order of names.
    """

    runs: Frame
    table: Frame
    landscapes: list[Path]
    searches: list[Path]
    exports: list[Path]


def read(folders: Iterable[Path]) -> Found:
    """Everything below the folders, each once.

    Raises:
      ValueError: there is no run, or one that is damaged, unknown or there twice, or the runs of a network were
        measured on other images or with other quantizers.
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
    searches, exports = ([p for p in paths.values() if (p / f"{name}.json").exists()] for name in ("search", "export"))
    runs_read: Frame = pd.DataFrame(found, dtype=object)
    numbers = [(i, *row) for i, run in enumerate(found) for row in run["values"]]
    table = _placed(runs_read, searches).merge(_frame(numbers, ["run"]), on="run")
    return Found(runs_read, table, landscapes, searches, exports)


def _frame(rows: list[Any], whose: list[str]) -> Frame:
    return pd.DataFrame(rows, columns=[*whose, *COLUMNS]).astype({"epoch": float, "value": float})


@_whole()
def _record(path: Path) -> dict[str, Any] | None:
    """What `read` needs of a run folder; None where it is not that of a run."""
    fields = records.read(path / "config.json")
    if not {"method", "dataset"} <= set(fields):
        return None
    status = records.read(path / "status.json", runs.Status)
    if not (status or (path / "metrics.jsonl").exists()):
        return None
    config = _config(path, fields)
    rows = runs.history(path, config) if status.get("status") == "done" else []
    measured = records.read(path / "measured.json", sweep.Measured)
    environment, network = records.read(path / "environment.json", runs.Environment), networks.network(config)
    parts = [environment, *environment.get("continued", [])] if environment else []
    network |= {} if network["label_noise"] else CLEAN
    # Held-out images took the place of the test images in older runs.
    is_older = network["validation_size"] and not any("validation_accuracy" in row for row in rows)
    split = "validation" if is_older else "test"
    section = "ablations" if "ablations" in path.parts else "main"
    numbers = values(config, rows, measured) if rows else []
    last = {name: value for name, _, value, *_ in numbers}
    # What must not differ among the runs of a network.
    alike: dict[str, Any] = {"images": last.get("images"), "images for the curvature": last.get("curvature_images")}
    alike["quantizers"] = {spec: list(row) for spec, row in measured.get("quantized", {}).items()}

    def told(tell: Callable[[dict[str, Any]], str], between: str = " then ") -> str:
        return between.join(dict.fromkeys(map(tell, parts))) or "unknown"

    return {
        "path": path,
        "status": status.get("status", "unknown"),
        "message": status.get("message", ""),
        "commit": told(lambda part: part.get("commit", "unknown")),
        "hardware": told(machine),
        "versions": told(lambda part: ", ".join(f"{n} {v}" for n, v in part.get("versions", {}).items()), "; "),
        "command": told(lambda part: " ".join(part.get("command", ["unknown"]))),
        "network": network,
        "key": networks.key(network),
        "plain": network | CLEAN,
        "method": network["method"],
        "seed": config.seed,
        "section": "cost" if path.parent.parent.name == "cost" else section,
        "title": _title(network),
        "clean": _title(network | CLEAN),
        "split": split,
        "noise": network["label_noise"],
        "kind": network["label_noise_kind"],
        "altered": _altered(network, "noise") or "clean labels",
        "task": (networks.key({name: network[name] for name in TASK}), split),
        "alike": {what: found for what, found in alike.items() if found},
        "values": numbers,
    }


def _config(path: Path, fields: dict[str, Any]) -> TrainConfig:
    """The configuration that a folder was left with; where it is older than a setting, with the default."""
    runs.check_begun(path, fields)
    if unknown := sorted(fields.keys() - TrainConfig.settings().keys()):
        raise ValueError(f"`folders` must hold runs of fields that are known here; {path} has {', '.join(unknown)}.")
    try:
        return TrainConfig.of_saved(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`folders` must hold runs that are possible here; {path} is not: {error}") from None


def of_sweep(found: Iterable[sweep.Run]) -> Frame:
    """The numbers of the runs of a sweep of methods, each a network: `COLUMNS` with network, run and seed."""
    numbers = [
        (LABELS[run.name], i, run.config.seed, *row)
        for i, run in enumerate(found)
        for row in values(run.config, run.history, run.measured)
    ]
    return _frame(numbers, ["network", "run", "seed"])


def values(config: TrainConfig, rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Row]:
    """The measured numbers of a run: those of each evaluation, then those of the end; `COLUMNS`.

    Those of the end: accuracy, that at the first epoch of the highest validation accuracy (at_best_validation), and
    the highest; seconds in training steps; gradients per step and in all; curvature; accuracy of rounded weights
    ("2 bit, channel-narrow"). Norm of the penalty's term over that of the gradient it is added to: penalty_share.
    """
    made: list[tuple[str, float, float]] = []
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}
        if row.get("penalty_grad_norm") and row["perturbed_grad_norm"]:
            numbers["penalty_share"] = row["penalty_grad_norm"] / row["perturbed_grad_norm"]
        made += [(n, row["epoch"], 100 * value if n in SHARES else value) for n, value in numbers.items()]
    last, seconds = rows[-1], _seconds(rows, config.budget.batch_size)
    end = {name: value for name, epoch, value in made if epoch == last["epoch"] and name in AT_END}
    end["highest"] = 100 * max(row["accuracy"] for row in rows)
    validated = [row for row in rows if "validation_accuracy" in row]
    if validated:
        end["at_best_validation"] = 100 * max(validated, key=lambda row: row["validation_accuracy"])["accuracy"]
    gradients = methods.gradients(config)
    end |= {"epochs": config.budget.epochs, "gradients": gradients, "gradients_in_all": gradients * last["step"]}
    end |= {} if seconds is None else {"seconds": seconds, "ms_per_step": 1000 * seconds / last["step"]}
    end |= curvature(config, last, measured)
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


def curvature(config: TrainConfig, last: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The curvature at the end, from measured.json or from the last epoch; empty where it was not measured."""
    if measured.get("curvature"):
        found = records.numbers(measured["curvature"])
        return {"curvature_images" if name == "images" else name: value for name, value in found.items()}
    if "eigenvalue" not in last:
        return {}
    found = {name: last[name] for name in ("eigenvalue", "eigenvalue_residual", "hessian_norm", "hessian_norm_sem")}
    images = last.get("curvature_images", config.watch.curvature_size)
    return found | {"eigenvalue_converged": last["eigenvalue_residual"] <= RTOL, "curvature_images": images}


def _seconds(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float | None:
    """Time in training steps; the speed of an evaluated epoch stands for those since the one evaluated before.

    That of the second evaluated epoch stands for the first too, in which a process may compile.
    """
    speeds: list[Any] = [row.get("images_per_second") for row in rows]
    if not all(speeds):
        return None
    speeds[:1] = speeds[1:2] or speeds[:1]
    steps = np.diff([row["step"] for row in rows], prepend=0)
    return sum(batch_size * n / speed for n, speed in zip(steps, speeds, strict=True))


def _placed(runs: Frame, searches: Sequence[Path]) -> Frame:
    """Where each finished run is shown and under which name: `PLACE`."""
    is_trial = np.array([any(folder in path.parents for folder in searches) for path in runs["path"]])
    runs = runs[(runs["status"] == "done") & ~is_trial].reset_index(names="run")
    main, ablations, cost = (
        runs[runs["section"] == name].sort_values("task", kind="stable") for name in ("main", "ablations", "cost")
    )
    placed = [_named(group) for _, group in main.groupby(["clean", "split"], sort=False)]
    for (title, split, method), group in ablations.groupby(["title", "split", "method"], sort=False):
        beside = main[(main["title"] == title) & (main["split"] == split) & (main["method"] == method)]
        group = pd.concat([group, beside[~beside["key"].isin(group["key"])].assign(section="ablations")])
        placed.append(_named(group, f"{LABELS[method]} by setting: "))
    placed += [_named(group) for _, group in cost.groupby(["clean", "split"], sort=False)]
    return pd.concat(placed)[PLACE].infer_objects() if placed else pd.DataFrame(columns=PLACE)


def _named(group: Frame, prefix: str = "") -> Frame:
    """What is shown together: by task, in it by network; raises ValueError where `read` says so of a network."""
    networks.refuse_twice(zip(group["path"], zip(group["key"], group["seed"], strict=True), strict=True))
    names, keys = networks.names(group["plain"]), group["plain"].map(networks.key)
    group = group.assign(network=keys.map(names.get), rank=keys.map(list(names).index))
    group = group.assign(title=prefix + group["title"], clean=prefix + group["clean"])
    seen: dict[Any, tuple[Any, Path]] = {}
    for run in group.itertuples():
        for what, found in run.alike.items():
            first, path = seen.setdefault((run.network, run.task, what), (found, run.path))
            if found != first:
                raise ValueError(
                    f"`folders` must have the runs of {run.network} measured alike; {what}: {first} in {path},"
                    f" {found} in {run.path}."
                )
    return group.sort_values("rank", kind="stable").sort_values("task", kind="stable")


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
    return ", ".join(filter(None, [*parts, _altered(settings, "label noise")]))


def _altered(settings: Mapping[str, Any], what: str) -> str:
    """The label noise of a task in words; nothing on clean labels."""
    rate = settings["label_noise"]
    return f"{100 * rate:g} % {settings['label_noise_kind']} {what}" if rate else ""

"""Searches of settings: what is tried, and how it is judged, which is by accuracy on images held out of train.

A grid is every combination of the values given. Trials are points of a scrambled Sobol sequence with a fixed seed,
between the least and the greatest value of each setting on a logarithmic scale: what is tried does not depend on what
was found, so that methods with as many trials are searched alike. OUT/optuna.journal has the trials from the start, and
the accuracy of each, over the seeds that it had then, once all have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import journal
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import TypedDict

from experiments import data
from experiments.config import Budget, Grouped, Labels, Task, TrainConfig, resolve
from experiments.config.fields import Count, NonNegative, check_once, number
from experiments.config.methods import Name, Penalty, refuse_others
from experiments.measure import sweep
from experiments.measure.workers import Engine
from experiments.storage import claims, environment, files, records
from hero_jax.evaluate import Spread

# Those that every method has come last: a combination is named after the others, and after these where they are tried.
SEARCHED = ("rho", "gamma", "sigma", "suppress", "learning_rate", "weight_decay")
Values = tuple[NonNegative, ...]


class Setting(TypedDict, total=False):
    """The settings of a combination or trial; null is one that its method has not."""

    rho: float | None
    gamma: float | None
    sigma: float | None
    suppress: float | None
    learning_rate: float | None
    weight_decay: float | None


class Tried(Setting):
    """A combination or trial, and its validation accuracy (a fraction): mean and deviation over n seeds."""

    method: Name
    n: int
    validation_accuracy: float | None
    std: float | None


class Best(Setting):
    """That of them which was chosen."""

    method: NotRequired[Name]
    n: NotRequired[int]
    validation_accuracy: NotRequired[float | None]
    std: NotRequired[float | None]


@records.schema
class SearchRecord(TypedDict, total=False):
    """search.json: what was tried, and the best of it, None where all diverged."""

    config: dict[str, Any]
    grid: list[Tried]
    best: Best | None
    environment: environment.Part


class AllDiverged(files.Failed):
    """There is nothing to choose among."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(Grouped):
    """What to search. Everything else of a run is the preset of its data set, model and method."""

    method: Name = "hero"
    """A method of experiments.train."""
    task: Task
    budget: Budget
    labels: Labels
    rho: Values = ()
    """Radii to try (msam, sam, asam, hero); the preset where none is given."""
    gamma: Values = ()
    """Strengths to try (grad_l1, hero), likewise."""
    sigma: Values = ()
    """Standard deviations to try (nso), likewise."""
    suppress: Values = ()
    """Shares to try (sam, asam, hero), likewise."""
    learning_rate: Values = ()
    """Learning rates to try (all), likewise."""
    weight_decay: Values = ()
    """Weight decays to try (all), likewise."""
    trials: Count | Literal["grid"] = "grid"
    """Try this many settings between the two values given of each; grid: every combination of all values."""
    penalty: Penalty | Literal["preset"] = "preset"
    """Penalty of hero."""
    seeds: Count = 3
    """Runs of each combination or trial, with seeds 0, 1, ..."""
    validation_size: Count = 360
    """Training images held out, on which all is judged; their labels stay true."""
    eval_every: Count = 1
    """Epochs between evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tried = {name: getattr(self, name) for name in SEARCHED if getattr(self, name)}
        refuse_others(self.method, tried)
        for name, values in tried.items():
            check_once(name, values)
        varied = {name: values for name, values in tried.items() if len(values) > 1}
        if self.trials != "grid":
            if not varied:
                raise ValueError(f"`trials` must have two values of a setting to draw between; got {self.trials}.")
            for name, values in varied.items():
                if not (len(values) == 2 and 0 < values[0] < values[1]):
                    raise ValueError(f"`{name}` must be two rising values above 0 with trials; got {values!r}.")
        if len(self.runs()) < (number(self.trials) or 1):
            raise ValueError(f"`trials` must be fewer in ranges as narrow as these; got {self.trials}.")

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """What trials are drawn from; a setting with one value has that."""
        names = [name for name in SEARCHED if self.trials != "grid" and len(getattr(self, name)) > 1]
        return {name: FloatDistribution(*getattr(self, name), log=True) for name in names}

    def may_differ(self, there: Mapping[str, Any]) -> tuple[str, ...]:
        """What the search that a folder holds may have less of."""
        if (there.get("trials", "grid") in ("grid", None)) != (self.trials == "grid"):
            return ("seeds",)
        return ("seeds", *(SEARCHED if self.trials == "grid" else ["trials"]))

    def runs(self, trials: Sequence[Mapping[str, Any]] = ()) -> dict[str, TrainConfig]:
        """The resolved configuration of each combination or trial, by name; `trials` where they are drawn already.

        Named after the method, its rho and gamma, and the other settings that are tried.
        """
        fixed = {name: x for name, x in self.flat().items() if name not in (*SEARCHED, "seeds", "trials")}
        fixed |= {"penalty": None} if self.penalty == "preset" else {}
        space = self.space
        grids = [[(k, value) for value in getattr(self, k)] or [(k, None)] for k in SEARCHED if k not in space]
        drawn = trials or ([{}] if self.trials == "grid" else draw(space, self.trials))
        named = [name for name in SEARCHED if name in ("rho", "gamma") or getattr(self, name)]
        made = {}
        for trial, chosen in itertools.product(drawn, itertools.product(*grids)):
            run = resolve(**fixed | dict(trial) | dict(chosen))
            settings = run.flat()
            values = (f"{name}{settings[name]!r}" for name in named if settings.get(name) is not None)
            made["-".join([self.method, *values])] = run
        return made


def draw(space: Mapping[str, FloatDistribution], trials: int) -> list[dict[str, float]]:
    """The first points of a scrambled Sobol sequence in a space, to four digits."""
    from scipy.stats import qmc  # it takes a second

    def rounded(value: float, each: FloatDistribution) -> float:
        return min(max(float(f"{value:.4g}"), each.low), each.high)

    low, high = np.log([(each.low, each.high) for each in space.values()]).T
    # By `rng=0` it would be another sequence than that of the searches so far.
    sobol = qmc.Sobol(len(space), scramble=True, seed=0)  # pyright: ignore[reportCallIssue]
    points = np.exp(low + sobol.random_base2((trials - 1).bit_length())[:trials] * (high - low))
    return [dict(zip(space, map(rounded, point, space.values()), strict=True)) for point in points]


def run(
    config: SearchConfig, dataset: data.Dataset, out: Path, begin: sweep.Begin, engine: Engine = Engine()
) -> list[dict[str, Any]]:
    """Trains what is left of a search in its folder, which is there; returns what each combination or trial gave."""
    trials: list[FrozenTrial] = []
    if config.trials != "grid":
        with _study_in(out) as study:
            for settings in draw(config.space, config.trials)[len(study.trials) :]:
                trial = optuna.create_trial(state=TrialState.RUNNING, params=settings, distributions={**config.space})
                study.add_trial(trial)
            trials = study.trials[: config.trials]
    configs = config.runs([trial.params for trial in trials])
    grid = summarize(configs, sweep.run_all(configs, range(config.seeds), dataset, out, begin, engine=engine))
    if trials:
        with _study_in(out) as study:
            for trial, row in zip(trials, grid, strict=True):
                told = (row["validation_accuracy"], TrialState.COMPLETE) if row["n"] else (None, TrialState.FAIL)
                study.tell(trial.number, *told, skip_if_finished=True)
    return grid


class _Journal(journal.BaseJournalBackend):
    """A journal of Optuna as a file of lines; who uses it holds the lock of the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from records.read_lines(self.path)[log_number_from:] if self.path.exists() else ()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        records.append(self.path, *logs)


@contextlib.contextmanager
def _study_in(out: Path) -> Iterator[optuna.Study]:
    """The study of a folder, for one process at a time; raises Damaged where its journal is none of a search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = out / "optuna.journal"
    with claims.locked(out, wait=True):
        try:
            storage = journal.JournalStorage(_Journal(path))
            study = optuna.create_study(study_name="search", storage=storage, direction="maximize", load_if_exists=True)
        except files.Failed:
            raise
        except Exception as error:  # whatever Optuna makes of lines that are not its own
            raise records.Damaged(path, f"{type(error).__name__}: {error}") from None
        yield study


def summarize(configs: dict[str, TrainConfig], found: Sequence[sweep.Run]) -> list[dict[str, Any]]:
    """The validation accuracy of each combination (fraction, mean and deviation over n seeds; n = 0: all diverged)."""
    grid = []
    for name, run in configs.items():
        accuracies = [each.history[-1]["validation_accuracy"] for each in found if each.name == name]
        spread = Spread.of(accuracies) if accuracies else Spread(math.nan, math.nan, 0)
        settings = run.flat()
        row = {setting: settings.get(setting) for setting in ("method", *SEARCHED)}
        grid.append(row | {"n": spread.n, "validation_accuracy": spread.mean, "std": spread.std})
    return grid


def best_of(grid: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of highest mean accuracy, of equal ones that of the smallest settings; None where all diverged.

    Of those of which the most seeds ended well: the mean of others is that of their survivors.
    """
    most = max(row["n"] for row in grid)
    if most == 0:
        return None
    rows = [row for row in grid if row["n"] == most]
    by_size = ("gamma", "rho", *(name for name in SEARCHED if name not in ("gamma", "rho")))
    return min(rows, key=lambda row: (-round(row["validation_accuracy"], 6), *(row.get(name) or 0 for name in by_size)))

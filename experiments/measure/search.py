"""Searches of settings: what is tried, and how it is judged, which is by accuracy on images held out of train.

A grid is every combination of the values given. Trials are points of a scrambled Sobol sequence with a fixed seed,
drawn by Optuna between the least and the greatest value of each setting on a logarithmic scale. What is tried does not
depend on what was found, so that methods with as many trials are searched alike, and the same search tries the same
settings on any number of workers; more trials are added to those that are there. OUT/optuna.journal has the trials
from the start, and the accuracy of each, over the seeds that it had then, once all have ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import journal
from optuna.trial import FrozenTrial, TrialState

from experiments import data
from experiments.config import Budget, Grouped, Labels, Task, TrainConfig, resolve
from experiments.config.fields import Count, NonNegative, number
from experiments.config.methods import Name, Penalty, refuse_others
from experiments.measure import sweep
from experiments.measure.engine import Engine
from experiments.storage import files
from hero_jax.evaluate import Spread

# Those that every method has come last: a combination is named after the others, and after these where they are tried.
SEARCHED = ("rho", "gamma", "sigma", "suppress", "learning_rate", "weight_decay")
Values = tuple[NonNegative, ...]


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
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"`{name}` must name each once; got {value!r} twice.")
        if self.trials != "grid":
            if not any(len(getattr(self, name)) > 1 for name in SEARCHED):
                raise ValueError(f"`trials` must have two values of a setting to draw between; got {self.trials}.")
            for name in SEARCHED:
                values = getattr(self, name)
                if len(values) > 1 and not (len(values) == 2 and 0 < values[0] < values[1]):
                    raise ValueError(f"`{name}` must be two rising values above 0 with trials; got {values!r}.")
        if len(self.runs()) < (number(self.trials) or 1):
            raise ValueError(f"`trials` must be fewer in ranges as narrow as these; got {self.trials}.")

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """What trials are drawn from; a setting with one value has that."""
        ranges = {
            name: getattr(self, name) for name in SEARCHED if self.trials != "grid" and len(getattr(self, name)) > 1
        }
        return {name: FloatDistribution(*values, log=True) for name, values in ranges.items()}

    def may_differ(self, there: Mapping[str, Any]) -> tuple[str, ...]:
        """What the search that a folder holds may have less of."""
        if (there.get("trials", "grid") in ("grid", None)) != (self.trials == "grid"):
            return ("seeds",)
        return ("seeds", *(SEARCHED if self.trials == "grid" else ["trials"]))

    def runs(self, trials: Sequence[Mapping[str, Any]] = ()) -> dict[str, TrainConfig]:
        """The resolved configuration of each combination or trial, by name; `trials` where they are drawn already."""
        fixed = {name: x for name, x in self.flat().items() if name not in (*SEARCHED, "seeds", "trials")}
        fixed |= {"penalty": None} if self.penalty == "preset" else {}
        space = self.space
        grids = [[(k, value) for value in getattr(self, k)] or [(k, None)] for k in SEARCHED if k not in space]
        drawn = trials or ([{}] if self.trials == "grid" else draw(space, self.trials))
        pairs = itertools.product(drawn, itertools.product(*grids))
        made = (resolve(**fixed | dict(trial) | dict(chosen)) for trial, chosen in pairs)
        return {self._name(run): run for run in made}

    def _name(self, run: TrainConfig) -> str:
        """The method with its rho and gamma, those it has, and the other settings that are tried."""
        named = [name for name in SEARCHED if name in ("rho", "gamma") or getattr(self, name)]
        settings = ((name, run.flat().get(name)) for name in named)
        return run.method.name + "".join(f"-{name}{value!r}" for name, value in settings if value is not None)


def draw(space: Mapping[str, FloatDistribution], trials: int) -> list[dict[str, float]]:
    """The first points of a scrambled Sobol sequence in a space, to four digits."""
    return [dict(point) for point in _points(tuple(space.items()), trials)]


@functools.lru_cache(maxsize=64)
def _points(space_items: tuple[tuple[str, FloatDistribution], ...], trials: int) -> list[dict[str, float]]:
    """`draw`, once for each space: a study takes a moment, and a search asks several times."""
    space = dict(space_items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=0)
    study = _study(sampler=sampler)
    # The sampler takes its space from a trial that is there.
    least = {name: distribution.low for name, distribution in space.items()}
    study.add_trial(optuna.create_trial(params=least, distributions={**space}, value=0.0))

    def rounded(name: str, value: float) -> float:
        return min(max(float(f"{value:.4g}"), space[name].low), space[name].high)

    points = [study.ask({**space}).params for _ in range(trials)]
    return [{name: rounded(name, value) for name, value in point.items()} for point in points]


def run(
    config: SearchConfig, dataset: data.Dataset, out: Path, begin: sweep.Begin, engine: Engine = Engine()
) -> list[dict[str, Any]]:
    """Trains what is left of a search in its folder, which is there; returns what each combination or trial gave."""
    trials = [] if config.trials == "grid" else stored(config, out, config.trials)
    configs = config.runs([trial.params for trial in trials])
    grid = summarize(configs, sweep.run_all(configs, range(config.seeds), dataset, out, begin, engine=engine))
    if trials:
        with _study_in(out) as study:
            for trial, row in zip(trials, grid, strict=True):
                told = (row["validation_accuracy"], TrialState.COMPLETE) if row["n"] else (None, TrialState.FAIL)
                study.tell(trial.number, *told, skip_if_finished=True)
    return grid


def stored(config: SearchConfig, out: Path, wanted: int) -> list[FrozenTrial]:
    """The first trials in the folder of a search, after those that it lacks were added."""
    with _study_in(out) as study:
        for settings in draw(config.space, wanted)[len(study.trials) :]:
            trial = optuna.create_trial(state=TrialState.RUNNING, params=settings, distributions={**config.space})
            study.add_trial(trial)
        return study.trials[:wanted]


@contextlib.contextmanager
def _study_in(out: Path) -> Iterator[optuna.Study]:
    """The study of a folder, for one process at a time."""
    with files.locked(out, wait=True):
        storage = journal.JournalStorage(journal.JournalFileBackend(str(out / "optuna.journal")))
        yield _study(study_name="search", storage=storage, direction="maximize", load_if_exists=True)


def _study(**options: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(**options)


def summarize(configs: dict[str, TrainConfig], found: Sequence[sweep.Run]) -> list[dict[str, Any]]:
    """The validation accuracy of each combination (fraction, mean and deviation over n seeds; n = 0: all diverged)."""

    def rows() -> Iterator[dict[str, Any]]:
        for label, run in configs.items():
            accuracies = [r.history[-1]["validation_accuracy"] for r in found if r.name == label]
            spread = Spread.of(accuracies) if accuracies else Spread(math.nan, math.nan, 0)
            yield {
                "method": run.method.name,
                **{name: run.flat().get(name) for name in SEARCHED},
                "n": spread.n,
                "validation_accuracy": spread.mean,
                "std": spread.std,
            }

    return list(rows())


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

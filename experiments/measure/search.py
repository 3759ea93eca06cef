"""What a search of settings is, what of it is trained, and how that is judged: by accuracy on held-out images."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.config import METHODS, TAKES, TrainConfig
from experiments.measure import sweep
from experiments.storage import files
from hero_jax import errors
from hero_jax.evaluate import Spread

# Those that every method has come last: a combination is named after the others, and after these where they are tried.
SEARCHED = ("rho", "gamma", "sigma", "suppress", "learning_rate", "weight_decay")
OF_EVERY_METHOD = ("learning_rate", "weight_decay")
# What a search may have more of than the one that its folder holds.
MAY_DIFFER = (*SEARCHED, "seeds")


class AllDiverged(files.Failed):
    """There is nothing to choose among."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What to search. Everything else of a run is the preset of its data set, model and method."""

    method: str = "hero"
    """A method of experiments.train."""
    dataset: str = "digits"
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
    model: str | None = None
    """A name in hero_jax.models; default the preset."""
    rho: tuple[float, ...] = ()
    """Radii to try (msam, sam, asam, hero); default the preset alone."""
    gamma: tuple[float, ...] = ()
    """Strengths to try (grad_l1, hero); default the preset alone."""
    sigma: tuple[float, ...] = ()
    """Standard deviations to try (nso); default the preset alone."""
    suppress: tuple[float, ...] = ()
    """Shares to try (sam, asam, hero); default the preset alone."""
    learning_rate: tuple[float, ...] = ()
    """Learning rates to try (all); default the preset alone."""
    weight_decay: tuple[float, ...] = ()
    """Weight decays to try (all); default the preset alone."""
    penalty: str | None = None
    """Penalty of hero; default the preset."""
    seeds: int = 3
    """Runs of each combination, with seeds 0, 1, ..."""
    epochs: int | None = None
    """Passes over the training images; default the preset."""
    batch_size: int | None = None
    """Images a step; default the preset."""
    train_size: int | None = None
    """Train on this many images; default all that are not held out."""
    validation_size: int = 360
    """Training images held out, on which every combination is judged."""
    test_size: int | None = None
    """Evaluate, beside them, on this many test images, which have no part in the choice; default all."""
    eval_every: int = 1
    """Epochs between evaluations."""
    augment: bool = True
    """Random crops and flips, where the data set is trained with them."""
    label_noise: float = 0.0
    """Share of the training images whose label is altered; those held out keep theirs."""
    label_noise_kind: str = "symmetric"
    """symmetric, uniform or asymmetric: see docs/data.md."""

    def __post_init__(self) -> None:
        errors.one_of("method", self.method, METHODS)
        for name in ("seeds", "validation_size"):
            errors.integer(name, getattr(self, name), low=1)
        for name in SEARCHED:
            values = getattr(self, name)
            if values and name not in (*TAKES[self.method], *OF_EVERY_METHOD):
                raise ValueError(f"`{name}` has no effect on method {self.method!r}; got {values!r}.")
            for value in values:
                errors.non_negative(name, value)
                if values.count(value) > 1:
                    raise ValueError(f"`{name}` must name each once; got {value!r} twice.")
        assert self.runs()

    def runs(self) -> dict[str, TrainConfig]:
        """The resolved configuration of each combination, by name."""
        fixed: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in (*SEARCHED, "seeds")
        }
        grids = [[(name, value) for value in getattr(self, name)] or [(name, None)] for name in SEARCHED]
        made = (TrainConfig(**fixed, **dict(chosen)).resolved() for chosen in itertools.product(*grids))
        return {self._name(run): run for run in made}

    def _name(self, run: TrainConfig) -> str:
        """The method with its rho and gamma, those it has, and the other settings that are tried."""
        named = [name for name in SEARCHED if name in ("rho", "gamma") or getattr(self, name)]
        settings = ((name, getattr(run, name)) for name in named)
        return run.method + "".join(f"-{name}{value!r}" for name, value in settings if value is not None)


def summarize(configs: dict[str, TrainConfig], found: Sequence[sweep.Run]) -> list[dict[str, Any]]:
    """The validation accuracy of each combination (fraction, mean and deviation over n seeds; n = 0: all diverged)."""

    def rows() -> Iterator[dict[str, Any]]:
        for name, run in configs.items():
            accuracies = [r.history[-1]["validation_accuracy"] for r in found if r.name == name]
            spread = Spread.of(accuracies) if accuracies else Spread(math.nan, math.nan, 0)
            yield {
                "method": run.method,
                **{field: getattr(run, field) for field in SEARCHED},
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

"""The experiments on one data set: what is searched, what was found, and what each part then trains."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.config import Budget, Grouped, Task, TrainConfig, resolve
from experiments.config.fields import Count, Fraction
from experiments.config.groups import LabelNoise
from experiments.measure import sweep
from experiments.measure.search import SEARCHED, SearchConfig, SearchRecord
from experiments.storage import records
from experiments.training import methods
from hero_jax import errors

Settings = dict[str, Any]
# What makes a variant of the method that it is named after, where it wants other settings than the method.
OWN: dict[str, Settings] = {"sam-suppress": {"suppress": 0.5}, "hero-eigenvalue": {"penalty": "eigenvalue"}}
# Multiples of the preset that are tried, in every combination: fifteen trials of each. HERO without gamma is ASAM.
_RHO = (0.5, 1.0, 2.0, 2.5, 3.0)
_RATE = (0.5, 1.0, 2.0)
FACTORS: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {"learning_rate": (0.25, 0.5, 1.0, 2.0, 4.0), "weight_decay": (1.0, 4.0, 16.0)},
    "nso": {"sigma": (0.5, 1.0, 2.0, 4.0, 8.0), "learning_rate": _RATE},
    "msam": {"rho": _RHO, "learning_rate": _RATE},
    "sam": {"rho": _RHO, "learning_rate": _RATE},
    "sam-suppress": {"rho": _RHO, "suppress": (0.5, 1.0, 1.8)},
    "asam": {"rho": _RHO, "learning_rate": _RATE},
    "grad_l1": {"gamma": (0.3, 1.0, 3.0, 10.0, 30.0), "learning_rate": _RATE},
    "hero": {"rho": _RHO, "gamma": (0.1, 1.0, 10.0)},
    "hero-eigenvalue": {"rho": _RHO, "gamma": (1.0, 3.0, 10.0)},
}
TUNED = tuple(FACTORS)
# Variants that are trained on altered labels.
ON_NOISY = (
    *("sgd", "noise", "ema", "nso", "msam", "sam", "sam-suppress", "asam", "asam-noise", "grad_l1", "hero"),
    *("hero-noise", "hero-eigenvalue", "hero-suppress", "hero-late", "hero-part"),
)
# Variants that are trained at equal cost.
AT_EQUAL_COST = ("sgd", "msam", "nso", "sam", "sam-suppress", "asam", "grad_l1", "hero", "hero-late", "hero-part")
# SGD for so many times the epochs takes as many gradients as HERO with penalty "detached".
LONGER = 4
# What a command given again may change: it adds runs, and alters none that are there.
MAY_DIFFER = ("seeds", "search_seeds", "variants", "noise_rates", "noise_kinds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig(Grouped):
    """What to reproduce. Everything else is the preset of data set, model and method, or what the search found."""

    task: Task
    budget: Budget
    seeds: Count = 5
    """Runs of each configuration, with seeds 0, 1, ..."""
    search_seeds: Count = 3
    """Runs of each configuration that is searched."""
    search_trials: Count | Literal["grid"] = "grid"
    """Trials of each search, drawn between the least and the greatest value of each setting; grid: its fifteen
    combinations."""
    validation_size: Count | Literal["preset"] = "preset"
    """Training images held out; preset: a tenth of them, of digits, which are few, a quarter."""
    eval_every: Count = 1
    """Epochs between evaluations."""
    variants: tuple[str, ...] = ()
    """Names of the methods and variants to train for accuracy, on noise and at equal cost (of the main ones), see
    docs/experiments.md; default all, on noise the main ones. Search and ablations are as they are without it."""
    noise_rates: tuple[Fraction, ...] = (0.2, 0.4, 0.6, 0.8)
    """Shares of altered labels; the search on noisy labels, where there is none yet, is at the highest."""
    noise_kinds: tuple[LabelNoise, ...] = ("symmetric", "asymmetric")
    """Kinds of altered labels, see docs/data.md; asymmetric ones at rates below a half only."""
    specs: tuple[str, ...] = ("channel-narrow", "channel-stretched")
    """Names of the quantizers: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    curvature_size: Count | Literal["preset"] = "preset"
    """Training images for the Hessian and the landscape; preset: all of digits, 500 of others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in self.noise_rates:
            raise ValueError("`noise_rates` must be above 0: runs on clean labels are those of accuracy; got 0.")
        for name in self.variants:
            errors.one_of("variants", name, variants({}, 1, 1))
        _ = self.measuring

    @property
    def measuring(self) -> sweep.Measuring:
        """What is measured of each run."""
        size = sweep.curvature_size(self.curvature_size, self.task.dataset)
        return sweep.Measuring(self.specs, curvature_size=size)

    @property
    def noise(self) -> list[tuple[str, float]]:
        """Kinds and rates of noise; of asymmetric noise half of a class or more would be the other class."""
        pairs = itertools.product(self.noise_kinds, self.noise_rates)
        return [(kind, rate) for kind, rate in pairs if kind != "asymmetric" or rate < 0.5]

    def run(self, settings: Settings, validation_size: int) -> TrainConfig:
        """The resolved configuration of a run with these settings."""
        return resolve(**self.shared() | {"validation_size": validation_size, **settings})

    def shared(self) -> dict[str, Any]:
        """The fields that all runs share."""
        return {**dataclasses.asdict(self.task), **dataclasses.asdict(self.budget), "eval_every": self.eval_every}


def variants(found: Mapping[str, Settings], epochs: int, batch_size: int) -> dict[str, Settings]:
    """Settings of every method and variant (docs/experiments.md), by name, with those `found` for it or its method."""
    part = _fraction_of(batch_size)
    changed: dict[str, Settings] = {
        "noise": {},
        "ema": {},
        "nso-bits": {"sigma": None, "noise_bits": 3},
        "grad_l1-late": {"gamma_warmup": epochs * 3 // 4},
        "sam-noise": {"noise_bits": 3},
        "asam-noise": {"noise_bits": 3},
        "hero-noise": {"noise_bits": 3},
        "hero-difference": {"penalty": "difference"},
        "hero-hvp": {"penalty": "hvp"},
        "hero-by_difference": {"product": "difference"},
        "hero-suppress": {"suppress": 0.5},
        "hero-momentum": {"ascent_decay": 0.9},
        "sam-late": {"perturb_from": 0.75},
        "hero-late": {"perturb_from": 0.75},
        "sam-part": {"ascent_batch_size": part},
        "hero-part": {"ascent_batch_size": part},
        # The one setting of HERO that was published, and ASAM at the same rho: HERO with gamma 0.
        "asam-published": {"rho": 0.5},
        "hero-published": {"rho": 0.5, "gamma": 5.0},
        "sgd-longer": {"epochs": LONGER * epochs},
    }
    # The gamma of HERO is for a mean square; the rest of what was found for it is for the eigenvalue penalty too.
    of_hero = {name: value for name, value in found.get("hero", {}).items() if name != "gamma"}
    found = {**found, "hero-eigenvalue": of_hero | found.get("hero-eigenvalue", {})}
    made = {name: _own(name) | found.get(name, {}) for name in FACTORS}
    for name, settings in changed.items():
        own = _own(name)
        # Weight noise and EMA are SGD with a setting.
        made[name] = made.get(own["method"], made["sgd"]) | own | settings
    return made


def _own(name: str) -> Settings:
    """The method that a variant is named after, and what makes it a variant."""
    return {"method": name.partition("-")[0], **OWN.get(name, {})}


def ablations(rho: float, gamma: float, batch_size: int, eigenvalue_gamma: float | None) -> dict[str, Settings]:
    """Settings of HERO with one thing changed at a time, by name.

    With the penalty "eigenvalue", of another size, gamma is `eigenvalue_gamma`, or where that is None the preset.
    """
    plain = {"method": "hero", "rho": rho, "gamma": gamma}
    changed: list[Settings] = [
        {},
        {"gamma": 0.0},
        {"gamma": _times(gamma, 0.1)},
        {"gamma": _times(gamma, 10)},
        {"rho": _times(rho, 0.5)},
        {"rho": _times(rho, 2)},
        {"penalty": "difference"},
        {"penalty": "hvp"},
        {"penalty": "eigenvalue", "gamma": eigenvalue_gamma},
        {"scope": "leaf"},
        {"reduction": "sum"},
        {"interval": 4},
        {"penalty_batch_size": _fraction_of(batch_size)},
        {"noise_bits": 3},
    ]
    return {"-".join(["hero", *(f"{k}_{v}" for k, v in c.items() if v is not None)]): {**plain, **c} for c in changed}


def _fraction_of(batch_size: int) -> int:
    """The largest part of a batch, up to a quarter, that divides it; one image at the least."""
    return max(size for size in range(1, max(1, batch_size // 4) + 1) if batch_size % size == 0)


def searches(config: ReproduceConfig, held_out: int) -> dict[str, SearchConfig]:
    """The search of each of `TUNED` by the folder it goes to, all with the same seeds and held-out images.

    On clean labels and, where there are noisy ones, at the highest rate of the first kind.
    """
    labels = {"clean": ("symmetric", 0.0)}
    if config.noise:
        labels["noisy"] = max(pair for pair in config.noise if pair[0] == config.noise[0][0])
    made = {}
    for (label, (kind, rate)), name in itertools.product(labels.items(), TUNED):
        preset = config.run(_own(name), held_out).flat()
        tried: Settings = {k: tuple(_times(preset[k], factor) for factor in x) for k, x in FACTORS[name].items()}
        if config.search_trials != "grid":
            tried = {k: (min(values), max(values)) for k, values in tried.items()}
        made[f"{label}-{name}"] = SearchConfig.resolve(
            **config.shared() | _own(name) | tried,
            trials=config.search_trials,
            seeds=config.search_seeds,
            validation_size=held_out,
            label_noise=rate,
            label_noise_kind=kind,
        )
    return made


def _times(value: float, factor: float) -> float:
    """A multiple of a preset as one would write it: 0.3, not 0.30000000000000004."""
    return float(f"{value * factor:.6g}")


def found_in(config: ReproduceConfig, out: Path) -> dict[str, dict[str, Settings]]:
    """What the searches on "clean" and on "noisy" labels found for each of `TUNED`; empty where there were none.

    Raises ValueError for a search that is not of what its folder is named after, or of another data set or network.
    """
    found: dict[str, dict[str, Settings]] = {"clean": {}, "noisy": {}}
    for file in sorted((out / "search").glob("*/search.json")):
        label, _, name = file.parent.name.partition("-")
        if label not in found or name not in TUNED:
            wanted = f"clean-NAME or noisy-NAME, with NAME one of {', '.join(TUNED)}"
            raise ValueError(f"`out` must have its searches in folders {wanted}; got {file.parent}.")
        record = records.read(file, SearchRecord)
        if best := record.get("best"):
            wanted = _in_words(config.shared() | _own(name) | {"label_noise": label == "noisy"})
            try:
                searched = _in_words(record.get("config", {}))
            except (TypeError, ValueError) as error:
                raise records.Damaged(file, f"`config`: {error}") from None
            if searched != wanted:
                raise ValueError(f"`out` must have a search of {wanted} in {file.parent}; got one of {searched}.")
            found[label][name] = {field: value for field in SEARCHED if (value := best.get(field)) is not None}
    return found


def _in_words(search: Settings) -> str:
    """What a search with these settings, or one that was saved with them, is of."""
    named = ("method", "dataset", "model", "penalty")
    run = resolve(**{name: search[name] for name in named if search.get(name, "preset") != "preset"})
    method = run.method.name
    method += "" if run.method.penalty == "none" else f" with penalty {run.method.penalty}"
    method += " with suppression" if np.any(search.get("suppress", 0)) else ""
    labels = "noisy" if search.get("label_noise") else "clean"
    return f"{method} on {labels} labels of {run.task.dataset} by {run.task.model}"


def plan(config: ReproduceConfig, part: str, held_out: int, out: Path) -> dict[str, TrainConfig]:
    """The resolved configurations of a part that trains, by name; raises ValueError for a search that is misplaced."""
    budget, found = config.budget, found_in(config, out)
    on_labels = (found["clean"], found["clean"] | found["noisy"])
    clean, noisy = (variants(each, budget.epochs, budget.batch_size) for each in on_labels)

    def runs(planned: Mapping[str, Settings], chosen: Sequence[str] = ()) -> dict[str, TrainConfig]:
        """The chosen ones, or all, each under the first name it has: rho may be found to be the published."""
        named = {name: config.run(each, held_out) for name, each in planned.items()}
        first: dict[TrainConfig, str] = {}
        for name, run in named.items():
            first.setdefault(run, name)
        return {first[run]: run for name, run in named.items() if name in (chosen or named)}

    made: dict[str, TrainConfig] = {}
    if part == "accuracy":
        made = runs(clean, config.variants)
    elif part == "ablations":
        hero = config.run(clean["hero"], held_out).method
        of_eigenvalue = found["clean"].get("hero-eigenvalue", {}).get("gamma")
        made = runs(ablations(hero.rho, hero.gamma, budget.batch_size, of_eigenvalue))
    elif part == "noise":
        # Methods one after the other: what is compiled serves all rates.
        chosen = runs(noisy, config.variants or ON_NOISY)
        for (name, run), (kind, rate) in itertools.product(chosen.items(), config.noise):
            made[f"{name}-{kind}_{rate!r}"] = run.replace(label_noise=rate, label_noise_kind=kind)
    elif part == "cost":
        of_first = [(kind, rate) for kind, rate in config.noise if kind == config.noise_kinds[0]]
        for name, (kind, rate) in itertools.product(AT_EQUAL_COST, [("symmetric", 0.0), *of_first]):
            if name in (config.variants or AT_EQUAL_COST):
                run = config.run((noisy if rate else clean)[name], held_out)
                epochs = round(run.budget.epochs * LONGER / methods.gradients(run))
                run = run.replace(label_noise=rate, label_noise_kind=kind, epochs=epochs)
                made[f"{name}-{kind}_{rate!r}" if rate else name] = run
    if part in ("accuracy", "ablations"):
        size = config.measuring.curvature_size
        # Curvature is measured four times along training.
        made = {n: run.replace(every=max(1, run.budget.epochs // 4), curvature_size=size) for n, run in made.items()}
    return made

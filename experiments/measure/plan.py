"""The experiments on one data set: what is searched, what was found, and what each part then trains."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.config import Budget, Grouped, Task, TrainConfig, resolve
from experiments.config.fields import Count, Fraction, number
from experiments.config.groups import LabelNoise
from experiments.measure import sweep
from experiments.measure.search import SEARCHED, SearchConfig
from experiments.storage import files
from experiments.training import methods
from hero_jax import errors

Settings = Mapping[str, Any]
# Methods, and those with a setting that wants others of its own.
SETTINGS: dict[str, Settings] = {
    "sgd": {"method": "sgd"},
    "nso": {"method": "nso"},
    "msam": {"method": "msam"},
    "sam": {"method": "sam"},
    "sam-suppress": {"method": "sam", "suppress": 0.5},
    "asam": {"method": "asam"},
    "grad_l1": {"method": "grad_l1"},
    "hero": {"method": "hero"},
    "hero-eigenvalue": {"method": "hero", "penalty": "eigenvalue"},
}
# What is searched.
TUNED = tuple(SETTINGS)
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
# Of asymmetric noise half of a class or more would be the other class.
MOST_ASYMMETRIC = 0.5
# Variants that are trained on altered labels.
ON_NOISY = (
    *("sgd", "noise", "ema", "nso", "msam", "sam", "sam-suppress", "asam", "asam-noise", "grad_l1", "hero"),
    *("hero-noise", "hero-eigenvalue", "hero-suppress", "hero-late", "hero-part"),
)
# Variants that are trained at equal cost.
AT_EQUAL_COST = ("sgd", "msam", "nso", "sam", "sam-suppress", "asam", "grad_l1", "hero", "hero-late", "hero-part")
# The one setting of HERO that was published, and ASAM at the same rho: HERO with gamma 0.
PUBLISHED = {"rho": 0.5, "gamma": 5.0}
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
        return sweep.Measuring(self.specs, curvature_size=number(self.curvature_size))

    @property
    def curvature_images(self) -> int:
        """Training images for the Hessian and the landscape."""
        return self.measuring.curvature_images(self.task.dataset)

    @property
    def noise(self) -> list[tuple[str, float]]:
        """Kinds and rates of noise, without asymmetric noise of half a class or more."""
        pairs = itertools.product(self.noise_kinds, self.noise_rates)
        return [(kind, rate) for kind, rate in pairs if kind != "asymmetric" or rate < MOST_ASYMMETRIC]

    def run(self, settings: Settings, validation_size: int) -> TrainConfig:
        """The resolved configuration of a run with these settings."""
        return resolve(**self.shared() | {"validation_size": validation_size, **settings})

    def shared(self) -> dict[str, Any]:
        """The fields that all runs share."""
        return {**dataclasses.asdict(self.task), **dataclasses.asdict(self.budget), "eval_every": self.eval_every}


def variants(found: Mapping[str, Settings], epochs: int, batch_size: int) -> dict[str, Settings]:
    """Settings of every method and variant, by name, with those that were `found` for it or its method.

    Those "published" have the published ones. SGD "longer" has the cost of HERO. The penalty of GRAD L1 is on
    throughout, or in the last quarter alone as its authors have it towards the end of training. The perturbation of
    SAM, ASAM and HERO with noise is taken around noisy weights. "Late" is SGD in the first three quarters of training,
    "part" takes perturbation and penalty on a quarter of each batch.
    """
    part = _fraction_of(batch_size)
    changed: dict[str, tuple[str, Settings]] = {
        "noise": ("sgd", {"method": "noise"}),
        "ema": ("sgd", {"method": "ema"}),
        "nso-bits": ("nso", {"sigma": None, "noise_bits": 3}),
        "grad_l1-late": ("grad_l1", {"gamma_warmup": epochs * 3 // 4}),
        "sam-noise": ("sam", {"noise_bits": 3}),
        "asam-noise": ("asam", {"noise_bits": 3}),
        "hero-noise": ("hero", {"noise_bits": 3}),
        **{f"hero-{name}": ("hero", {"penalty": name}) for name in ("difference", "hvp")},
        "hero-by_difference": ("hero", {"product": "difference"}),
        "hero-suppress": ("hero", {"suppress": 0.5}),
        "hero-momentum": ("hero", {"ascent_decay": 0.9}),
        "sam-late": ("sam", {"perturb_from": 0.75}),
        "hero-late": ("hero", {"perturb_from": 0.75}),
        "sam-part": ("sam", {"ascent_batch_size": part}),
        "hero-part": ("hero", {"ascent_batch_size": part}),
        "asam-published": ("asam", {"rho": PUBLISHED["rho"]}),
        "hero-published": ("hero", PUBLISHED),
        "sgd-longer": ("sgd", {"epochs": LONGER * epochs}),
    }
    tuned: dict[str, Settings] = {name: {**settings, **_found(found, name)} for name, settings in SETTINGS.items()}
    return tuned | {name: {**tuned[base], **settings} for name, (base, settings) in changed.items()}


def _found(found: Mapping[str, Settings], name: str) -> Settings:
    """What was found for one of `TUNED`; the eigenvalue penalty has the other settings of HERO where it has none."""
    if name == "hero-eigenvalue":
        # The gamma that was found is for a mean square.
        return {k: v for k, v in found.get("hero", {}).items() if k != "gamma"} | dict(found.get(name, {}))
    return found.get(name, {})


def ablations(rho: float, gamma: float, batch_size: int, eigenvalue_gamma: float | None) -> dict[str, Settings]:
    """Settings of HERO with one thing changed at a time, by name.

    With the penalty "eigenvalue", which is of another size, gamma is `eigenvalue_gamma`, or where that is None the
    preset.
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
        first = config.noise[0][0]
        labels["noisy"] = max((kind, rate) for kind, rate in config.noise if kind == first)
    made = {}
    for (label, (kind, rate)), name in itertools.product(labels.items(), TUNED):
        preset = config.run(SETTINGS[name], held_out).flat()
        tried = {field: tuple(_times(preset[field], f) for f in factors) for field, factors in FACTORS[name].items()}
        if config.search_trials != "grid":
            tried = {field: (min(values), max(values)) for field, values in tried.items()}
        settings: dict[str, Any] = {**SETTINGS[name], **tried}
        made[f"{label}-{name}"] = SearchConfig.resolve(
            **config.shared(),
            **settings,
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


def found_in(config: ReproduceConfig, out: Path, label: str) -> dict[str, Settings]:
    """What the search found for each of `TUNED` on "clean" or "noisy" labels; empty where there was none.

    Raises ValueError for a search that is not of what its folder is named after, or of another data set or network.
    """
    found = {}
    for file in sorted((out / "search").glob("*/search.json")):
        prefix, _, name = file.parent.name.partition("-")
        if prefix not in ("clean", "noisy") or name not in TUNED:
            wanted = f"clean-NAME or noisy-NAME, with NAME one of {', '.join(TUNED)}"
            raise ValueError(f"`out` must have its searches in folders {wanted}; got {file.parent}.")
        record = files.read_json(file)
        if prefix != label or not record.get("best"):
            continue
        wanted, searched = _what_is_searched(config, prefix, name), _what_was_searched(record["config"])
        if searched != wanted:
            raise ValueError(f"`out` must have a search of {wanted} in {file.parent}; got one of {searched}.")
        best = record["best"]
        found[name] = {field: best[field] for field in SEARCHED if best.get(field) is not None}
    return found


def _what_is_searched(config: ReproduceConfig, prefix: str, name: str) -> str:
    """What a search in the folder PREFIX-NAME is of, in words."""
    run = config.run(SETTINGS[name], 0)
    return _task(run, prefix == "noisy", bool(run.method.suppress))


def _what_was_searched(saved: Mapping[str, Any]) -> str:
    """The same of the saved configuration of a search."""
    named = {
        name: saved[name] for name in ("method", "dataset", "model", "penalty") if saved.get(name, "preset") != "preset"
    }
    return _task(resolve(**named), bool(saved.get("label_noise")), any(saved.get("suppress", ())))


def _task(run: TrainConfig, is_noisy: bool, suppresses: bool) -> str:
    method, task = run.method, run.task
    penalty = "" if method.penalty == "none" else f" with penalty {method.penalty}"
    penalty += " with suppression" if suppresses else ""
    return f"{method.name}{penalty} on {'noisy' if is_noisy else 'clean'} labels of {task.dataset} by {task.model}"


def plan(config: ReproduceConfig, part: str, held_out: int, out: Path) -> dict[str, TrainConfig]:
    """The resolved configurations of a part that trains, by name; raises ValueError for a search that is misplaced."""
    budget = config.budget
    on_clean, on_noisy = (found_in(config, out, label) for label in ("clean", "noisy"))
    clean, noisy = (variants(found, budget.epochs, budget.batch_size) for found in (on_clean, on_clean | on_noisy))
    made: dict[str, TrainConfig] = {}
    if part == "accuracy":
        named = {name: _along(config, config.run(each, held_out)) for name, each in clean.items()}
        made = _each_once(named, config.variants or tuple(named))
    elif part == "noise":
        named = {name: config.run(each, held_out) for name, each in noisy.items()}
        # Methods one after the other: what is compiled serves all rates.
        chosen = _each_once(named, config.variants or ON_NOISY)
        for (name, run), (kind, rate) in itertools.product(chosen.items(), config.noise):
            made[f"{name}-{kind}_{rate!r}"] = run.replace(label_noise=rate, label_noise_kind=kind)
    elif part == "cost":
        chosen = [name for name in AT_EQUAL_COST if not config.variants or name in config.variants]
        on_altered = [(kind, rate) for kind, rate in config.noise if kind == config.noise_kinds[0]]
        for name, (kind, rate) in itertools.product(chosen, [("symmetric", 0.0), *on_altered]):
            run = config.run((noisy if rate else clean)[name], held_out)
            run = run.replace(label_noise=rate, label_noise_kind=kind, epochs=_for_cost_of_hero(run))
            made[f"{name}-{kind}_{rate!r}" if rate else name] = run
    elif part == "ablations":
        hero = config.run(clean["hero"], held_out).flat()
        found = on_clean.get("hero-eigenvalue", {}).get("gamma")
        changed = ablations(hero["rho"], hero["gamma"], budget.batch_size, found)
        named = {name: _along(config, config.run(each, held_out)) for name, each in changed.items()}
        made = _each_once(named, tuple(named))
    return made


def _for_cost_of_hero(run: TrainConfig) -> int:
    """The epochs of a run that take the gradients of HERO with the released penalty for those that it has."""
    return round(run.budget.epochs * LONGER / methods.gradients(run))


def _along(config: ReproduceConfig, run: TrainConfig) -> TrainConfig:
    """A run whose curvature is measured four times along training."""
    return run.replace(every=max(1, run.budget.epochs // 4), curvature_size=config.curvature_images)


def _each_once(named: Mapping[str, TrainConfig], chosen: Sequence[str]) -> dict[str, TrainConfig]:
    """The chosen configurations, each under the first name it has among all: rho may be found to be the published."""
    first: dict[TrainConfig, str] = {}
    for name, run in named.items():
        first.setdefault(run, name)
    return {first[named[name]]: named[name] for name in named if name in chosen}

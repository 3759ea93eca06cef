"""The whole set of experiments by one command: `python -m experiments.reproduce --dataset digits`.

    search       rho and gamma of each method on held-out images, on clean and on noisy labels (`experiments.search`);
                 what it finds is what the other parts take in place of the presets
    accuracy     every method and variant: accuracy last and best on validation, over bits, Hessian along and at the end
    noise        the methods after training on altered labels, by kind and rate, with what was memorized
    ablations    HERO with one setting changed at a time
    landscape    the loss around runs of SGD, ASAM and HERO, and between them (`experiments.landscape`)

and after them the report (`experiments.report`). Each part can be run alone (`python -m experiments.reproduce
accuracy`), and a command that was ended is given again: what is finished is not made again.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli, data, label_noise, landscape, progress, report, runs, search, sweep
from experiments.config import TrainConfig
from hero_jax import _check

PARTS = ("search", "accuracy", "noise", "ablations", "landscape")
# Multiples of the preset that are tried: the same for all rho, and for the gamma of each method. HERO without gamma is
# ASAM, which is searched too.
RHO_FACTORS = (0.5, 1.0, 2.0, 3.0)
GAMMA_FACTORS = {"grad_l1": (0.3, 1.0, 3.0, 10.0), "hero": (0.1, 1.0, 10.0)}
# Of asymmetric noise half of a class or more would be the other class.
MOST_ASYMMETRIC = 0.5
# Variants that are trained on altered labels.
ON_NOISY = ("sgd", "noise", "ema", "sam", "asam", "asam-noise", "grad_l1", "hero", "hero-noise", "hero-eigenvalue")
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """What to reproduce. Everything else is the preset of data set, model and method, or what the search found."""

    dataset: str = "digits"
    """digits (embedded), or one prepared for tensorflow-datasets: see docs/data.md."""
    model: str | None = None
    """A name in hero_jax.models; default the preset."""
    seeds: int = 5
    """Runs of each configuration, with seeds 0, 1, ..."""
    search_seeds: int = 3
    """Runs of each configuration that is searched."""
    epochs: int | None = None
    """Passes over the training images; default the preset."""
    train_size: int | None = None
    """Train on this many images; default all that are not held out."""
    validation_size: int | None = None
    """Training images held out; default a tenth of them, of digits, which are few, a quarter."""
    test_size: int | None = None
    """Evaluate on this many test images; default all."""
    noise_rates: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Shares of altered labels; the search on noisy labels is at the highest."""
    noise_kinds: tuple[str, ...] = ("symmetric", "asymmetric")
    """Kinds of altered labels, see docs/data.md; asymmetric ones at rates below a half only."""
    specs: tuple[str, ...] = ("channel-narrow", "channel-stretched")
    """Names of the quantizers: GRANULARITY-GRID[-RANGE], see hero_jax.quantize.named."""
    curvature_size: int | None = None
    """Training images for the Hessian and the landscape; default all of digits, 500 of others."""

    def __post_init__(self) -> None:
        for name in ("seeds", "search_seeds", "validation_size"):
            if getattr(self, name) is not None:
                _check.integer(name, getattr(self, name), low=1)
        for rate in self.noise_rates:
            _check.fraction("noise_rates", rate)
            if rate == 0:
                raise ValueError("`noise_rates` must be above 0: runs on clean labels are those of accuracy; got 0.")
        for kind in self.noise_kinds:
            _check.one_of("noise_kinds", kind, label_noise.KINDS)
        self.run({}, 0)
        _ = self.measuring

    @property
    def measuring(self) -> sweep.Measuring:
        """What is measured of each run."""
        return sweep.Measuring(self.specs, curvature_size=self.curvature_size)

    @property
    def noise(self) -> list[tuple[str, float]]:
        """Kinds and rates of noise, without asymmetric noise of half a class or more."""
        pairs = itertools.product(self.noise_kinds, self.noise_rates)
        return [(kind, rate) for kind, rate in pairs if kind != "asymmetric" or rate < MOST_ASYMMETRIC]

    def run(self, settings: Settings, validation_size: int) -> TrainConfig:
        """The resolved configuration of a run with these settings."""
        named = {name: getattr(self, name) for name in ("dataset", "model", "epochs", "train_size", "test_size")}
        return TrainConfig(**named, validation_size=validation_size, **settings).resolved()


def variants(found: Mapping[str, Settings], epochs: int) -> dict[str, Settings]:
    """Settings of every method and variant, by name, with the rho and gamma that were `found` for its method.

    The penalty of GRAD L1 is on throughout, or in the last quarter alone as its authors have it towards the end of
    training. The perturbation of SAM, ASAM and HERO with noise is taken around noisy weights.
    """
    made: dict[str, Settings] = {
        name: {"method": name} for name in ("sgd", "noise", "ema", "sam", "asam", "grad_l1", "hero")
    }
    made |= {
        "grad_l1-late": {"method": "grad_l1", "gamma_warmup": epochs * 3 // 4},
        "sam-noise": {"method": "sam", "noise_bits": 3},
        "asam-noise": {"method": "asam", "noise_bits": 3},
        "hero-noise": {"method": "hero", "noise_bits": 3},
        **{f"hero-{name}": {"method": "hero", "penalty": name} for name in ("difference", "hvp", "eigenvalue")},
    }
    return {name: _with_found(found, settings) for name, settings in made.items()}


def _with_found(found: Mapping[str, Settings], settings: Settings) -> Settings:
    """`settings` over those found for their method."""
    taken = dict(found.get(settings["method"], {}))
    if settings.get("penalty") == "eigenvalue":
        # The gamma that was found is for a mean square.
        taken.pop("gamma", None)
    return taken | dict(settings)


def ablations(base: TrainConfig) -> dict[str, Settings]:
    """Settings of HERO with one thing changed at a time, by name; `base` is HERO as it is."""
    assert base.rho is not None
    assert base.gamma is not None
    assert base.batch_size is not None
    plain = {"method": "hero", "rho": base.rho, "gamma": base.gamma}
    changed: list[Settings] = [
        {},
        {"gamma": 0.0},
        {"gamma": _times(base.gamma, 0.1)},
        {"gamma": _times(base.gamma, 10)},
        {"rho": _times(base.rho, 0.5)},
        {"rho": _times(base.rho, 2)},
        {"penalty": "difference"},
        {"penalty": "hvp"},
        {"penalty": "eigenvalue", "gamma": None},
        {"scope": "leaf"},
        {"reduction": "sum"},
        {"interval": 4},
        {"penalty_batch_size": base.batch_size // 4},
        {"noise_bits": 3},
    ]
    return {"-".join(["hero", *(f"{k}_{v}" for k, v in c.items() if v is not None)]): {**plain, **c} for c in changed}


def run_search(config: ReproduceConfig, held_out: int, out: Path, data_dir: Path | None) -> None:
    """Searches each method that has rho or gamma, with the same seeds and held-out images, clean and noisy.

    Noisy: the highest rate of the first kind. A method of which every run diverges is left to its preset.
    """
    labels = {"clean": ("symmetric", 0.0)}
    if config.noise:
        first = config.noise[0][0]
        labels["noisy"] = max((kind, rate) for kind, rate in config.noise if kind == first)
    for (label, (kind, rate)), method in itertools.product(labels.items(), ("sam", "asam", "grad_l1", "hero")):
        preset = config.run({"method": method}, held_out)
        rho = () if preset.rho is None else tuple(_times(preset.rho, f) for f in RHO_FACTORS)
        gamma = () if preset.gamma is None else tuple(_times(preset.gamma, f) for f in GAMMA_FACTORS[method])
        searched = search.SearchConfig(
            method=method,
            dataset=config.dataset,
            model=config.model,
            rho=rho,
            gamma=gamma,
            seeds=config.search_seeds,
            epochs=config.epochs,
            train_size=config.train_size,
            validation_size=held_out,
            test_size=config.test_size,
            label_noise=rate,
            label_noise_kind=kind,
        )
        try:
            search.main(searched, out / "search" / f"{label}-{method}", data_dir)
        except cli.Failed as error:
            cli.console.print(str(error))


def _times(value: float, factor: float) -> float:
    """A multiple of a preset as one would write it: 0.3, not 0.30000000000000004."""
    return float(f"{value * factor:.6g}")


def found_in(out: Path, label: str) -> dict[str, Settings]:
    """What the search found for each method on "clean" or "noisy" labels; empty where there was none."""
    found = {}
    for file in sorted((out / "search").glob(f"{label}-*/search.json")):
        best = runs.read_json(file).get("best")
        if best is not None:
            found[best["method"]] = {name: best[name] for name in search.SEARCHED if best[name] is not None}
    return found


def plan(config: ReproduceConfig, part: str, held_out: int, out: Path) -> dict[str, TrainConfig]:
    """The resolved configurations of a part that trains, by name."""
    epochs = config.run({}, held_out).epochs
    assert epochs is not None
    clean, noisy = (variants(found_in(out, label), epochs) for label in ("clean", "noisy"))
    measured = {"every": max(1, epochs // 4), "curvature_size": _curvature_size(config)}
    settings: dict[str, Settings] = {}
    if part == "accuracy":
        settings = {name: {**each, **measured} for name, each in clean.items()}
    elif part == "noise":
        # Methods one after the other: what is compiled serves all rates.
        for name, (kind, rate) in itertools.product(ON_NOISY, config.noise):
            altered = {"label_noise": rate, "label_noise_kind": kind}
            settings[f"{name}-{kind}_{rate!r}"] = {**noisy[name], **altered}
    elif part == "ablations":
        changed = ablations(config.run(clean["hero"], held_out))
        settings = {name: {**each, **measured} for name, each in changed.items()}
    made: dict[str, TrainConfig] = {}
    for name, each in settings.items():
        run = config.run(each, held_out)
        # Where an epoch is all there is, late is early.
        if run not in made.values():
            made[name] = run
    return made


def _curvature_size(config: ReproduceConfig) -> int:
    return config.measuring.curvature_images(config.dataset)


def main(
    config: Annotated[ReproduceConfig, tyro.conf.arg(name="")],
    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = PARTS,
    out: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Runs every experiment on one data set and writes the report; given again, continues.

    Args:
        config: What to reproduce.
        parts: search, accuracy, noise, ablations, landscape; in this order.
        out: Folder for everything: new, empty, or that of the same experiments; default runs/reproduce-DATASET.
        data_dir: Folder of the prepared tensorflow-datasets; default TFDS_DATA_DIR.
    """
    for part in parts:
        _check.one_of("parts", part, PARTS)
    out = out or Path("runs") / f"reproduce-{config.dataset}"
    started = time.monotonic()
    with progress.bar() as display:
        dataset = data.load(config.dataset, data_dir, progress.task(display, f"decoding {config.dataset}"))
    share = 4 if config.dataset == "digits" else 10
    held_out = dataset.train.size // share if config.validation_size is None else config.validation_size
    sweep.check({"hero": config.run({}, held_out)}, dataset)
    runs.claim_same(out, runs.to_json(config), may_differ=("seeds", "search_seeds"))
    for part in (part for part in PARTS if part in parts):
        cli.console.rule(f"{part}, {time.monotonic() - started:.0f} s")
        if part == "search":
            run_search(config, held_out, out, data_dir)
        elif part == "landscape":
            draw_landscape(config, out, data_dir)
        else:
            with progress.bar() as display:
                configs = plan(config, part, held_out, out)
                sweep.run_all(configs, range(config.seeds), dataset, out / part, display, config.measuring)
    report.main((out,))
    cli.console.print(f"{time.monotonic() - started:.0f} s")


def draw_landscape(config: ReproduceConfig, out: Path, data_dir: Path | None) -> None:
    """The landscape of the first runs of SGD, ASAM and HERO, those that ended well, unless it is there."""
    folders = [out / "accuracy" / "runs" / f"{name}-s0" for name in ("sgd", "asam", "hero")]
    if runs.status(folders[0]) is None:
        raise ValueError(f"`parts` must have accuracy before landscape; {folders[0]} is not there.")
    done = tuple(folder for folder in folders if runs.status(folder) == "done")
    if done and not (out / "landscape" / "landscape.json").exists():
        chosen = landscape.LandscapeConfig(images=_curvature_size(config))
        landscape.main(done, chosen, out / "landscape", data_dir)


if __name__ == "__main__":
    cli.run(main)

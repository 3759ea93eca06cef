"""Prints the command of every run of the protocol, in its order: `python results/cifar10-protocol2/commands.py RUNS`.

RUNS is the folder with the searches, runs/cifar10-protocol2: what they found is filled in. Each command continues or
skips what is there, so that the lines can be given to any number of workers:

    python results/cifar10-protocol2/commands.py runs/cifar10-protocol2 | xargs -P 2 -I{} sh -c "{}"
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

COMMON = (
    "python -m experiments.train --dataset cifar10 --model resnet8 --batch-size 64 --no-augment --train-size 5000"
    " --validation-size 2000 --test-size 3000 --eval-every 5"
)
FLOOR, AVERAGE, NOISE = "--learning-rate-floor 0.1", "--ema-decay 0.995", "--noise-bits 3"
# Of each row the method, the search whose settings it takes, and what is its own.
ROWS = {
    "sgd": ("sgd", "sgd", ""),
    "ema": ("ema", "sgd", AVERAGE),
    "sgd-floor": ("sgd", "sgd", FLOOR),
    "msam": ("msam", "msam", ""),
    "sam": ("sam", "sam", ""),
    "sam-suppress": ("sam", "sam-suppress", ""),
    "asam": ("asam", "asam", ""),
    "grad_l1": ("grad_l1", "grad_l1", ""),
    "hero": ("hero", "hero", ""),
    "hero-published": ("hero", None, "--rho 0.5 --gamma 5 --learning-rate 0.1 --weight-decay 5e-4"),
    "hero-late": ("hero", "hero", "--perturb-from 0.75"),
    "hero-part": ("hero", "hero", "--ascent-batch-size 16"),
    "hero-part-suppress": ("hero", "hero", "--ascent-batch-size 16 --suppress 0.5"),
}
FIVE_SEEDS = ("sgd", "sam", "hero", "hero-part")
RATES = (0.0, 0.4, 0.8)
# Epochs with which a row takes as many gradients as one of two a step does in 30.
AT_EQUAL_COST = {"sgd": 60, "ema": 60, "msam": 60, "grad_l1": 20, "hero": 15}
SETTINGS = ("rho", "gamma", "suppress", "learning_rate", "weight_decay")


def found(runs: Path, search: str | None, rate: float) -> str:
    """The flags of what a search found, that on clean labels or that at 80 %."""
    if search is None:
        return ""
    folder = runs / "search" / f"{'noisy' if rate else 'clean'}-{search}"
    best = json.loads((folder / "search.json").read_text())["best"]
    # SGD has no suppression, and of the others a search without it has 0.
    named = {name: best[name] for name in SETTINGS if best.get(name)}
    return " ".join(f"--{name.replace('_', '-')} {value!r}" for name, value in named.items())


def command(runs: Path, row: tuple[str, str | None, str], rate: float, seed: int, epochs: int, out: str) -> str:
    """One run of a row, or of what is written as one."""
    method, search, own = row
    noise = f"--label-noise {rate}" if rate else ""
    flags = [f"--method {method}", f"--epochs {epochs}", found(runs, search, rate), own, noise, f"--seed {seed}"]
    return " ".join([COMMON, *filter(None, flags), f"--out {runs / out}-s{seed}"])


def protocol(runs: Path) -> Iterator[str]:
    """Seed after seed the rows, then those at equal cost and the factors of low bits."""
    for seed, rate, row in itertools.product(range(5), RATES, ROWS):
        if seed < 3 or (row in FIVE_SEEDS and rate < 0.8):
            yield command(runs, ROWS[row], rate, seed, 30, f"rows/{row}-{100 * rate:.0f}")
    for seed, rate, (row, epochs) in itertools.product(range(3), (0.0, 0.8), AT_EQUAL_COST.items()):
        yield command(runs, ROWS[row], rate, seed, epochs, f"cost/{row}-{100 * rate:.0f}")
    for seed, *chosen in itertools.product(range(3), ("sgd", "sam"), ("", NOISE), ("", AVERAGE), ("", FLOOR)):
        base, noise, average, floor = chosen
        # SGD is another method with noise, and with the average alone.
        method = base if base == "sam" else "noise" if noise else "ema" if average else "sgd"
        words = [word for word, on in (("noise", noise), ("average", average), ("floor", floor)) if on]
        if not words or (base == "sgd" and words in (["average"], ["floor"])):
            continue  # a row above
        own = " ".join(filter(None, (noise, average, floor)))
        yield command(runs, (method, base, own), 0.0, seed, 30, f"factors/{'-'.join([base, *words])}")


if __name__ == "__main__":
    print("\n".join(protocol(Path(sys.argv[1]))))

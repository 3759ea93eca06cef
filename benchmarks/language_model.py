"""A small transformer at low bits: `python -m benchmarks.language_model`.

A decoder-only transformer (that of docs/language-model.md) learns to predict the next character of the source of
Python's standard library, by each of

    adamw    AdamW
    msam     momentum-SAM around AdamW
    sam      SAM before AdamW
    hero     HERO before AdamW

Settings are searched per method, as many trials each, by the loss on modules that are held out, in full precision; the
weight decay that AdamW takes is that of the others too. The best are trained with several seeds. Their loss on other
modules is measured in full precision and with the kernels at few bits, rounded to nearest and so that the outputs of
each layer change least.

Every run is in the record as soon as it ends, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from flax import linen as nn

import hero_jax
from experiments import cli, progress
from experiments.analysis import tables, verdict
from experiments.storage import claims, environment, records
from hero_jax import errors, quantize
from hero_jax.quantize import linen, rounding

PyTree = Any
Settings = dict[str, float]
GRIDS = ("channel-narrow", "channel-stretched")
ROUNDINGS = ("nearest", "optimised")
# Six trials of each method.
_RATES = (4e-3, 8e-3)
TRIED: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw": {"learning_rate": (2e-3, 4e-3, 8e-3), "weight_decay": (1e-3, 1e-1)},
    "msam": {"rho": (0.01, 0.03, 0.1), "learning_rate": _RATES},
    "sam": {"rho": (0.01, 0.03, 0.1), "learning_rate": _RATES},
    "hero": {"rho": (0.01, 0.03), "gamma": (1.0, 10.0, 100.0)},
}
# What is not tried. The perturbation of HERO is SAM's here, so that the two differ by the penalty alone.
FIXED: Settings = {"learning_rate": 4e-3}
SEARCH_SEED = 100
LABELS = {"adamw": "AdamW", "msam": "MSAM of AdamW", "sam": "SAM, AdamW", "hero": "HERO, AdamW"}
FULL = "full"
FORMAT = (".3f", ".3f")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train."""

    methods: tuple[str, ...] = tuple(TRIED)
    """Of msam, sam and hero, after adamw, whose weight decay they take."""
    seeds: int = 5
    """Runs of each method with the best of its settings."""
    steps: int = 2000
    """Steps of a run; the learning rate falls to 0 by a cosine."""
    batch_size: int = 16
    """Windows of a step."""
    context: int = 64
    """Characters of a window."""
    bits: tuple[int, ...] = (4, 3, 2)
    """Widths of the kernels."""
    out: Path | None = None
    """JSON file for the record."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "context"):
            errors.integer(name, getattr(self, name), low=1)
        for method in self.methods:
            errors.one_of("methods", method, TRIED)
        if self.methods[:1] != ("adamw",):
            raise ValueError(f"`methods` must begin with adamw, whose weight decay is taken; got {self.methods}.")


class Text(NamedTuple):
    """Tokens of the three parts, and what they were made of."""

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    num_characters: int
    sha256: str


def read_text() -> Text:
    """ASCII characters of the modules at the top of the standard library; of ten one is held out, one tested."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes().decode("ascii", errors="ignore") for file in files]
    characters, tokens = np.unique(list("".join(texts)), return_inverse=True)
    parts = np.split(tokens.astype(np.int32), np.cumsum([len(text) for text in texts])[:-1])
    train = [part for i, part in enumerate(parts) if i % 10 not in (4, 9)]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    held_out, test = (np.concatenate(parts[i::10]) for i in (4, 9))
    return Text(np.concatenate(train), held_out, test, len(characters), digest)


class Layer(nn.Module):
    """Attention to what came before, and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x += nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)(nn.RMSNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width, use_bias=False)(nn.RMSNorm()(x)))
        return x + nn.Dense(width, use_bias=False)(hidden)


class LanguageModel(nn.Module):
    """Logits of the next character, at each of (batch, length) tokens."""

    num_characters: int
    context: int
    width: int = 64
    num_layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(self.num_characters, self.width)(tokens) + nn.Embed(self.context, self.width)(positions)
        for _ in range(self.num_layers):
            x = Layer()(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.num_characters, use_bias=False)(nn.RMSNorm()(x))


class Problem:
    """A network, what it learns, and how it is measured."""

    def __init__(self, arguments: Arguments, text: Text) -> None:
        self.arguments, self.text = arguments, text
        self.model = LanguageModel(text.num_characters, arguments.context)
        self.init, self.loss = jax.jit(self.model.init), jax.jit(self._loss)
        # One program a method, whatever its settings.
        self.step = jax.jit(self._step, static_argnums=0)

    def _loss(self, params: PyTree, windows: jax.Array) -> jax.Array:
        """Mean over the characters of the windows, in nats."""
        logits = self.model.apply({"params": params}, windows[:, :-1])
        assert isinstance(logits, jax.Array)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def train(self, method: str, settings: Settings, seed: int) -> PyTree:
        """The weights to evaluate after the last step. The seed is of the initial weights and of the windows."""
        arguments, context = self.arguments, self.arguments.context
        params = self.init(jax.random.key(seed), jnp.zeros((1, context), jnp.int32))["params"]
        opt_state, rng = optimizer(method, settings, arguments.steps).init(params), np.random.default_rng(seed)
        for _ in range(arguments.steps):
            first = rng.integers(len(self.text.train) - context, size=(arguments.batch_size, 1))
            windows = self.text.train[first + np.arange(context + 1)]
            params, opt_state = self.step(method, settings, params, opt_state, windows)
        return hero_jax.msam_eval_params(opt_state, params) if method == "msam" else params

    def _step(
        self, method: str, settings: Settings, params: PyTree, opt_state: Any, windows: np.ndarray
    ) -> tuple[PyTree, Any]:
        def grad_fn(params: PyTree) -> PyTree:
            return jax.grad(self._loss)(params, windows)

        tx = optimizer(method, settings, self.arguments.steps)
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    def score(self, params: PyTree, tokens: np.ndarray) -> float:
        """The loss on 2,048 windows of a text."""
        return statistics.fmean(float(self.loss(params, windows)) for windows in self.windows(tokens, 32))

    def windows(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """So many batches of 64 windows, evenly spread over a text: (count, 64, context + 1)."""
        length = self.arguments.context + 1
        first = np.linspace(0, len(tokens) - length, count * 64).astype(int)
        return tokens[first[:, None] + np.arange(length)].reshape(count, 64, length)

    def at_low_bits(self, params: PyTree) -> list[dict[str, Any]]:
        """The loss on the test text for each grid, rounding and width, kernels alone rounded."""
        grams = linen.input_grams(
            lambda variables, tokens: self.model.apply(variables, tokens),
            {"params": params},
            [windows[:, :-1] for windows in self.windows(self.text.train, 4)],
        )
        rows = []
        for grid, bits in itertools.product(GRIDS, self.arguments.bits):
            spec = dataclasses.replace(quantize.named(grid), leaves=("*/kernel",))
            rounded = {
                "nearest": quantize.fake_quantize(params, bits, spec),
                "optimised": rounding.optimized(params, bits, grams, spec),
            }
            for name, weights in rounded.items():
                row = {"grid": grid, "rounding": name, "bits": bits}
                rows.append(row | {"loss": self.score(weights, self.text.test)})
        return rows


def optimizer(method: str, settings: Settings, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW with a cosine, and what is before or around it."""
    adamw = optax.adamw(
        optax.cosine_decay_schedule(settings["learning_rate"], steps), weight_decay=settings["weight_decay"]
    )
    if method == "msam":
        return hero_jax.msam(adamw, settings["rho"])
    before = {
        "adamw": optax.identity,
        "sam": lambda: hero_jax.sam(settings["rho"]),
        "hero": lambda: hero_jax.hero(settings["rho"], settings["gamma"], adaptive=False),
    }
    return optax.chain(before[method](), adamw)


def trials(method: str, found: Settings) -> list[Settings]:
    """What is tried of a method, every combination; `found` for AdamW says the weight decay of the others."""
    tried, fixed = TRIED[method], FIXED | {"weight_decay": found.get("weight_decay", 0.0)}
    return [fixed | dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


def rows(record: dict[str, Any]) -> tables.Frame:
    """A row for each run, grid, rounding and width: network, label of the column, seed and loss on the test text."""
    made = []
    for run in (run for run in record["runs"] if "test" in run):
        shared = {"network": LABELS[run["method"]], "seed": run["seed"]}
        for grid, how in itertools.product(GRIDS, ROUNDINGS):
            made.append(shared | {"grid": grid, "rounding": how, "label": FULL, "value": run["test"]})
        for row in run["low_bits"]:
            where = {"grid": row["grid"], "rounding": row["rounding"], "label": f"{row['bits']} bit"}
            made.append(shared | where | {"value": row["loss"]})
    return pd.DataFrame(made)


def table(record: dict[str, Any], base: str | None = None) -> list[str]:
    """Loss by grid, rounding and method, mean ± standard deviation over seeds, in Markdown.

    With `base`, a label, how much more it is than that of this method: paired differences ± standard error.
    """
    found = rows(record)
    labels, lines = list(found["label"].unique()), []
    for (grid, how), part in found.groupby(["grid", "rounding"], sort=False):
        made = tables.spreads(part) if base is None else tables.differences(part, base)
        counts = made["n"].groupby("network", sort=False).max().to_dict()
        texts = tables.texts(made, counts, dict.fromkeys(labels, FORMAT), sign="+" * (base is not None))
        lines += [[grid, how, *line] for line in tables.lines(texts, counts, ["n", *labels])]
    header = ["grid", "rounding", "method" if base is None else f"minus {base}", "n", *labels]
    return tables.markdown(header, lines, left=3).splitlines()


def verdicts(record: dict[str, Any]) -> list[str]:
    """Which method has the lowest loss, and whether that is more than chance: in full precision, and at each width."""
    found = rows(record)
    whole = found[(found["label"] == FULL) & (found["grid"] == GRIDS[0]) & (found["rounding"] == ROUNDINGS[0])]
    ends = {"Full precision": whole}
    rounded = found[found["label"] != FULL].groupby(["grid", "rounding", "label"], sort=False)
    ends |= {f"{label}, {grid}, {how}": part for (grid, how, label), part in rounded}
    return verdict.verdicts(ends, list(found["network"].unique()), ends, dict.fromkeys(ends, FORMAT))


def main(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Prints the loss of each method and width; with `--out`, writes every run as it ends, and goes on from there."""
    text = read_text()
    made: dict[str, Any] = {"arguments": claims.to_json(arguments), "environment": environment.current()}
    made |= {"text": {"sha256": text.sha256, "characters": sum(map(len, text[:3]))}, "runs": []}
    there = records.read(arguments.out) if arguments.out and arguments.out.exists() else {}
    if there and there["text"] != made["text"]:
        raise ValueError(f"`out` must be of the same text; {arguments.out} is of another.")
    made["runs"] = there.get("runs", [])
    problem = Problem(arguments, text)

    def run(method: str, settings: Settings, seed: int, measure: Callable[[PyTree], dict[str, Any]]) -> dict[str, Any]:
        key = {"method": method, "settings": settings, "seed": seed}
        found = next((each for each in made["runs"] if key.items() <= each.items()), None)
        if found is None:
            started = time.monotonic()
            params = jax.block_until_ready(problem.train(method, settings, seed))
            found = key | {"seconds": time.monotonic() - started} | measure(params)
            made["runs"].append(found)
            records.write_record(arguments.out, made)
        return found

    def searched(params: PyTree) -> dict[str, Any]:
        return {"held_out": problem.score(params, text.held_out)}

    def tested(params: PyTree) -> dict[str, Any]:
        return searched(params) | {
            "test": problem.score(params, text.test),
            "low_bits": problem.at_low_bits(params),
        }

    with progress.bar() as display:
        report, of_adamw = progress.steps(display), {}
        for method in arguments.methods:
            tried: list[dict[str, Any]] = []
            planned = trials(method, of_adamw)
            for settings in planned:
                report(f"search of {method}", len(tried), len(planned))
                tried.append(run(method, settings, SEARCH_SEED, searched))
            report(f"search of {method}", len(tried), len(tried))
            best = min(tried, key=lambda each: each["held_out"])["settings"]
            of_adamw = of_adamw or best
            for seed in range(arguments.seeds):
                report(method, seed, arguments.seeds)
                run(method, best, seed, tested)
            report(method, arguments.seeds, arguments.seeds)
    for line in [*table(made), *verdicts(made)]:
        cli.console.print(line, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, keep_compiled=False)

"""The main job end to end at a small size, its arithmetic, and the command lines as a user types them."""

import functools
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from scipy import stats

from experiments import cli, compare, reproduce
from experiments.analysis import tables, tidy, verdict
from experiments.compare import CompareConfig
from experiments.measure import sweep
from experiments.training import loop

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of two methods with two seeds: its folder."""
    out = tmp_path_factory.mktemp("compare") / "out"
    config = CompareConfig.resolve(
        methods=("sgd", "hero"), seeds=2, epochs=3, train_size=256, bits=(8, 2), curvature_size=100
    )
    compare.main(config, out)
    return out


def test_leaves_a_table_plots_results_and_runs(finished):
    record = json.loads((finished / "results.json").read_text())
    assert len(record["results"]) == 4
    for result in record["results"]:
        assert set(result["accuracy"]) == {"full", "8", "2"}
        assert result["eigenvalue_converged"] == (result["eigenvalue_residual"] <= 1e-3)
    assert record["environment"]["commit"]
    for method in ("sgd", "hero"):
        for seed in (0, 1):
            assert (finished / "runs" / f"{method}-s{seed}" / "metrics.jsonl").exists()
    for name in ("bits.png", "eigenvalues.png", "training.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


def ends(values):
    """A frame of the values of each network, one of each seed."""
    cells = [(name, seed, value) for name, of in values.items() for seed, value in enumerate(of)]
    return pandas.DataFrame(cells, columns=["network", "seed", "value"])


def test_verdict_is_that_of_a_paired_t_test_for_all_pairs():
    rng = np.random.default_rng(0)
    base, spread = rng.normal(size=(2, 8))
    spread -= spread.mean()
    seen = []
    # In standard errors. By itself the second would be significant, and of three pairs it is not.
    for gain in (1.5, 2.7, 4):
        values = {"A": base, "B": base + spread + gain * stats.sem(spread), "C": base - 3}
        told, _ = verdict.verdicts({"full, points": ends(values)}, list(values))
        mean, p = np.mean(values["B"] - base), stats.ttest_rel(values["B"], base).pvalue
        sem = stats.sem(values["B"] - base)
        kind = "significant" if 3 * p < 0.05 else "not significant"
        assert told == f"full, points: B has the highest mean, {mean:.2f} \u00b1 {sem:.2f} above A ({kind})."
        seen.append((p < 0.05, kind))
    assert seen == [(False, "not significant"), (True, "not significant"), (True, "significant")]


def test_verdict_names_the_next_best_and_the_lowest():
    values = {"A": [3.0, 3.1, 3.2], "B": [1.0, 1.2, 1.1], "C": [1.1, 1.2, 1.3]}
    told = verdict.verdicts({"top eigenvalue": ends(values)}, list(values), ["top eigenvalue"])
    assert told == [
        "top eigenvalue: B has the lowest mean, 2 \u00b1 0.058 below A (significant) and 0.1 \u00b1 0.058 below C (not"
        " significant).",
        "Significant: paired t tests at 5 % for each line, corrected for all 3 pairs of methods.",
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"A": [1.0], "B": [2.0]}, "1.00 above A (one seed, not tested)"),
        ({"A": [97.8, 98.08], "B": [98.08, 98.36]}, "0.28 \u00b1 0.00 above A (the same in every seed, not tested)"),
        ({"A": [1.0, 2.0], "B": [1.0, 2.0]}, "0.00 \u00b1 0.00 from B (the same in every seed, not tested)"),
    ],
)
def test_verdict_of_few_runs(values, told):
    assert verdict.verdicts({"x": ends(values)}, list(values))[0].partition(" mean, ")[2] == f"{told}."


def test_verdict_is_over_the_seeds_that_both_have():
    rows = ends({"A": [1.0, 2.0, 3.0], "B": [9.0, 2.5, 2.9]})
    (told, _) = verdict.verdicts({"x": rows[(rows["network"] == "A") | (rows["seed"] > 0)]}, ["A", "B"])
    assert told == "x: B has the highest mean, 0.20 \u00b1 0.30 above A (not significant)."
    apart = rows[(rows["network"] == "A") == (rows["seed"] == 0)]
    assert verdict.verdicts({"x": apart}, ["A", "B"])[0].endswith("not to be compared with A (no common seed).")


def test_no_verdict_without_a_rival():
    assert verdict.verdicts({"x": ends({"A": [1.0, 2.0]})}, ["A"]) == []
    assert verdict.verdicts({"x": ends({"A": [1.0], "B": [math.nan]})}, ["A", "B"]) == []


def test_table_shows_the_mean_and_deviation_of_the_results(finished):
    record = json.loads((finished / "results.json").read_text())
    table = (finished / "table.md").read_text()
    for method, label in (("sgd", "SGD"), ("hero", "HERO")):
        values = [r["accuracy"]["2"] for r in record["results"] if r["method"] == method]
        line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
        assert f"{np.mean(values):.2f} \u00b1 {np.std(values, ddof=1):.2f}" in line
    assert "364 test images" in table
    assert "channel-narrow" in table
    assert "\n2 bit, points: " in table
    assert table.endswith("\nSignificant: paired t tests at 5 % for each line.\n")


def test_full_precision_row_is_the_accuracy_of_the_run(finished):
    record = json.loads((finished / "results.json").read_text())
    for result in record["results"]:
        lines = (finished / "runs" / f"{result['method']}-s{result['seed']}" / "metrics.jsonl").read_text().splitlines()
        assert math.isclose(result["accuracy"]["full"], 100 * json.loads(lines[-1])["accuracy"])


def test_folder_of_something_else_is_never_overwritten(finished):
    with pytest.raises(FileExistsError, match=r"`out` must be a new or empty folder, .* has train_size 256, not 'all'"):
        compare.main(CompareConfig.resolve(), finished)
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder; "):
        compare.main(CompareConfig.resolve(), finished / "runs")


def shown(*runs, method="sgd", bits=(2,)):
    """The table of runs of one method, each (accuracy by width, eigenvalue, whether it converged)."""
    config = CompareConfig.resolve(methods=(method,), bits=bits)
    found = []
    for seed, (accuracy, eigenvalue, converged) in enumerate(runs):
        curvature = {"eigenvalue": eigenvalue, "eigenvalue_converged": converged}
        measured = {"quantized": {config.spec: accuracy}, "curvature": curvature}
        row = {"epoch": 1, "accuracy": 0.9, "step": 5}
        found.append(sweep.Run(method, config.run(method, seed), [row], measured))
    return compare.shown(tidy.of_sweep(found), config)


def test_summary_marks_a_method_with_a_run_that_did_not_converge():
    results = ({"full": 90.0, "2": 50.0}, 3.0, True), ({"full": 92.0, "2": 58.0}, 5.0, False)
    header, ((*line, eigenvalue),) = shown(*results)
    assert dict(zip(header, line, strict=False)) == {
        "method": "SGD",
        "n": "2",
        "full": f"91.00 \u00b1 {2**0.5:.2f}",
        "2 bit": f"54.00 \u00b1 {4 * 2**0.5:.2f}",
    }
    assert eigenvalue == "4 \u00b1 1.4*"
    assert tables.markdown(*shown(*results[:1])) == (
        "| method | n | full | 2 bit | top eig. |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| SGD | 1 | 90.00 | 50.00 | 3 |\n"
    )


def test_table_fits_a_terminal_of_eighty_columns():
    bits = (8, 6, 5, 4, 3, 2)
    accuracies = [dict.fromkeys(("full", *map(str, bits)), 100.0 + shift) for shift in (-10.0, 0.0, 10.0)]
    eigenvalues = (0.111156, 0.123456, 0.135756)
    runs = [(accuracy, eigenvalue, False) for accuracy, eigenvalue in zip(accuracies, eigenvalues, strict=True)]
    output = io.StringIO()
    cli.Console(width=80, file=output).print(tables.terminal(*shown(*runs, method="grad_l1", bits=bits)))
    text = output.getvalue()
    assert "\u2026" not in text
    assert "GRAD L1" in text
    assert "100.00" in text
    assert "\u00b110.00" in text
    assert "\u00b10.012*" in text


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"methods": ("sgd", "adam")}, ValueError, r"`methods` must be one of .*; got 'adam'"),
        ({"methods": ()}, ValueError, "`methods` must name at least one method"),
        ({"seeds": 0}, ValueError, "`seeds` must be an integer >= 1; got 0"),
        ({"bits": (8, 1)}, ValueError, "`bits` must be an integer in 2..16; got 1"),
        ({"spec": "channel-wide"}, ValueError, "`spec` must be one of"),
        ({"dataset": "mnist"}, ValueError, "`dataset` must be one of"),
    ],
)
def test_bad_comparisons(options, kind, message):
    with pytest.raises(kind, match=message):
        CompareConfig.resolve(**options)


class TestCommandLine:
    def run(self, *arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
        )

    def test_train(self, tmp_path, called):
        arguments = ("experiments.train", "--method", "sgd", "--epochs", "2", "--train-size", "128")
        done = self.run(*arguments, "--out", str(tmp_path / "run"))
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout
        again = called(*arguments, "--out", str(tmp_path / "run"))
        assert again.returncode == 0
        assert "done already" in again.stdout
        assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
        other = called(*arguments, "--seed", "1", "--out", str(tmp_path / "run"))
        assert other.returncode == 2
        message = r"error: `out` must be a new or empty folder, or that of the same run; .* has seed 0, not 1\. .*\n"
        assert re.fullmatch(message, other.stderr)

    def test_what_is_compiled_is_kept(self, tmp_path):
        arguments = ("experiments.train", "--method", "sgd", "--epochs", "1", "--train-size", "64")
        variables = os.environ | {"HERO_JAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        del variables["JAX_COMPILATION_CACHE_DIR"]
        done = self.run(*arguments, "--out", str(tmp_path / "run"), env=variables)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.glob("compiled-*/jit_step*"))
        elsewhere = variables | {
            "HERO_JAX_CACHE": str(tmp_path / "b"),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c"),
        }
        done = self.run(*arguments, "--out", str(tmp_path / "other"), env=elsewhere)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.glob("c/jit_step*"))
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--method heroo", "error: `method` must be one of .* Did you mean 'hero'"),
            ("--dataset cifar10 --data-dir /nonexistent", "error: `data_dir` must hold cifar10 prepared"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, tmp_path, called):
        done = called("experiments.train", *shlex.split(arguments), "--out", str(tmp_path / "run"))
        assert done.returncode == 2
        assert re.match(message, done.stderr)
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("--augment accuracy", (True, 5, ("accuracy",))),
            ("accuracy noise --no-augment --seeds=2", (False, 2, ("accuracy", "noise"))),
            ("--noise-rates 0.4 0.8 --seeds 3", (True, 3, reproduce.PARTS)),
        ],
    )
    def test_flags_and_what_has_none(self, arguments, expected):
        @functools.wraps(reproduce.main)
        def record(config, parts=reproduce.PARTS, **_):
            parsed.append((config.task.augment, config.seeds, parts))

        parsed = []
        cli.call(record, shlex.split(arguments))
        assert parsed == [expected]

    def test_failed_run_exits_with_one(self, monkeypatch, capsys):
        def main():
            raise loop.Diverged("The loss stopped.")

        monkeypatch.setattr(sys, "argv", ["train"])
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        assert stopped.value.code == 1
        assert capsys.readouterr().err == "stopped: The loss stopped.\n"

    def test_fault_of_the_program_keeps_its_traceback(self, monkeypatch):
        def main():
            raise ValueError("not about an argument")

        monkeypatch.setattr(sys, "argv", ["train"])
        with pytest.raises(ValueError, match="not about an argument"):
            cli.run(main)

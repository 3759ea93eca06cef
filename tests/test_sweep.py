"""Many runs: what is there is not made again, what is missing is; the search; the whole set, planned and run small."""

import functools
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from experiments import compare, data, progress, reproduce, search
from experiments.config import METHODS, presets, resolve
from experiments.measure import plan, sweep
from experiments.measure.search import SearchConfig, best_of
from experiments.storage import claims, files, records, runs
from experiments.training import compiled, loop, methods
from tests import problems

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 1, "batch_size": 64, "train_size": 128}
MEASURING = sweep.Measuring(("channel-narrow", "channel-stretched"), (8, 2), 50, 60)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def run_all(configs, seeds, dataset, out, measuring=MEASURING):
    with progress.bar() as display:
        return sweep.run_all(configs, seeds, dataset, out, progress.lines(display), measuring)


@pytest.fixture(scope="module")
def swept(digits, tmp_path_factory):
    """Two methods with two seeds: (folder, configurations, what was found)."""
    out = tmp_path_factory.mktemp("sweep")
    configs = {name: resolve(method=name, **SMALL) for name in ("sgd", "asam")}
    return out, configs, run_all(configs, range(2), digits, out)


def written(out):
    """When each file of each run was written."""
    files = (file for file in (out / "runs").rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files}


class TestSweep:
    def test_finds_every_run_in_its_folder(self, swept):
        out, configs, found = swept
        assert [(run.name, run.config.seed) for run in found] == [("sgd", 0), ("sgd", 1), ("asam", 0), ("asam", 1)]
        for run in found:
            folder = out / "runs" / f"{run.name}-s{run.config.seed}"
            assert runs.status(folder) == "done"
            assert run.history == runs.read_metrics(folder)
            assert run.config == json_config(folder)
            assert run.config.replace(seed=0) == configs[run.name]

    def test_measures_what_the_saved_weights_give(self, swept, digits):
        out, _, found = swept
        run = found[3]
        images = data.subset(digits, 128, 0)
        trainer = compiled.build(run.config, images)
        variables = runs.load_variables(out / "runs" / "asam-s1")
        again = sweep.measure(MEASURING, trainer, jax.tree.map(jnp.asarray, variables), images)
        assert {name: run.measured[name] for name in again} == again
        assert set(again["quantized"]) == {"channel-narrow", "channel-stretched"}
        assert again["quantized"]["channel-narrow"]["2"] != again["quantized"]["channel-stretched"]["2"]
        assert np.isclose(again["quantized"]["channel-narrow"]["full"], 100 * run.history[-1]["accuracy"])
        assert again["curvature"]["images"] == 50
        assert again["images"] == 364

    def test_what_is_there_is_not_made_again(self, swept, digits):
        out, configs, found = swept
        before = written(out)
        assert run_all(configs, range(2), digits, out) == found
        assert written(out) == before

    def test_other_measurements_are_made_and_the_training_is_not(self, swept, digits):
        out, configs, _ = swept
        before = written(out)
        wider = sweep.Measuring(bits=(4,), curvature_size=50, curvature_products=60)
        found = run_all({"sgd": configs["sgd"]}, range(1), digits, out, wider)
        assert set(found[0].measured["quantized"]["channel-narrow"]) == {"full", "4"}
        after = written(out)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"runs/sgd-s0/measured.json"}
        run_all({"sgd": configs["sgd"]}, range(1), digits, out)

    @pytest.mark.parametrize(("was", "again"), [(1433, False), (None, False), (500, True)])
    def test_images_for_the_hessian_that_were_left_to_the_data_set(self, swept, digits, was, again):
        """Older folders have null for 1,433 of digits."""
        out, configs, _ = swept
        file = out / "runs" / "sgd-s0" / "measured.json"
        before = file.read_text()
        measuring = sweep.Measuring(bits=(4,), curvature_size=1433, curvature_products=1)
        config = claims.to_json(measuring) | {"curvature_size": was}
        records.write(file, json.loads(before) | {"config": config})
        found = run_all({"sgd": configs["sgd"]}, range(1), digits, out, measuring)
        assert (set(found[0].measured["quantized"]) == {"channel-narrow"}) == again
        file.write_text(before)

    def test_a_run_of_another_process_is_left_to_it(self, swept, digits, tmp_path, monkeypatch, caplog):
        """One run is being made by another process, which ends without having made it: the next time it is made."""
        caplog.set_level("INFO")
        _, configs, found = swept
        path = tmp_path / "runs" / "sgd-s0"
        path.mkdir(parents=True)
        made = []

        def train(run, *rest, **options):
            made.append((run.method.name, run.seed))
            return original(run, *rest, **options)

        original = loop.train
        monkeypatch.setattr(sweep.loop, "train", train)
        with claims.locked(path), pytest.raises(files.Failed, match="1 of 4 runs are left, such as sgd-s0: another"):
            run_all(configs, range(2), digits, tmp_path)
        assert made == [("sgd", 1), ("asam", 0), ("asam", 1)]
        assert "sgd-s0 is left to the process that is writing it" in caplog.text
        again = run_all(configs, range(2), digits, tmp_path)
        assert made[3:] == [("sgd", 0)]
        assert [(run.name, run.config, run.measured) for run in again] == [
            (run.name, run.config, run.measured) for run in found
        ]

    def test_two_processes_make_each_run_once(self, tmp_path):
        command = "-m experiments.search --method asam --rho 0.5 1 2 --seeds 2 --epochs 1 --train-size 128"
        command += f" --validation-size 100 --out {tmp_path / 'out'}"
        started = [
            subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        # The one that ends last finds all of them made.
        codes = [process.returncode for process in started]
        assert 0 in codes
        for code, error in zip(codes, errors, strict=True):
            assert code == 0 or (code == 1 and re.fullmatch(r"stopped: \d of 6 runs are left, .*\n", error))
        assert len(json.loads((tmp_path / "out" / "search.json").read_text())["grid"]) == 3
        folders = list((tmp_path / "out" / "runs").iterdir())
        assert len(folders) == 6
        for folder in folders:
            assert runs.status(folder) == "done"
            assert "continued" not in records.read(folder / "environment.json")
        assert not list((tmp_path / "out").rglob("*.tmp"))

    def test_one_that_diverges_does_not_end_the_others(self, digits, tmp_path, monkeypatch, caplog):
        caplog.set_level("INFO")

        def train(run, *rest, **options):
            return failing(run, *rest, **options) if run.seed == 0 else original(run, *rest, **options)

        def failing(run, images, folder, report, trainer):
            def step(state, *rest, **options):
                state, loss = trainer.step(state, *rest, **options)
                return state, loss * jnp.nan

            return original(run, images, folder, report, trainer._replace(step=step))

        original = loop.train
        monkeypatch.setattr(sweep.loop, "train", train)
        configs = {"sgd": resolve(method="sgd", **SMALL)}
        found = run_all(configs, range(2), digits, tmp_path)
        assert [run.config.seed for run in found] == [1]
        assert "sgd-s0 diverged" in caplog.text
        before = written(tmp_path)
        run_all(configs, range(2), digits, tmp_path)
        assert written(tmp_path) == before

    def test_a_run_of_another_configuration_is_not_taken(self, swept, digits):
        out, configs, _ = swept
        other = configs["sgd"].replace(learning_rate=0.3)
        with pytest.raises(FileExistsError, match=r"sgd-s0 has learning_rate 0\.1, not 0\.3"):
            run_all({"sgd": other}, range(1), digits, out)

    def test_numbers_that_are_not_finite_come_back(self, swept, digits):
        out, configs, found = swept
        file = out / "runs" / "asam-s0" / "measured.json"
        record = json.loads(file.read_text())
        text = file.read_text()
        records.write(file, record | {"curvature": record["curvature"] | {"eigenvalue": float("inf")}})
        again = run_all({"asam": configs["asam"]}, range(1), digits, out)
        assert np.isnan(again[0].measured["curvature"]["eigenvalue"])
        file.write_text(text)
        assert run_all({"asam": configs["asam"]}, range(1), digits, out) == [found[2]]

    def test_labels_are_altered_by_the_seed_of_each_run(self, digits, tmp_path):
        config = resolve(method="sgd", label_noise=0.6, **SMALL)
        found = run_all({"sgd": config}, range(2), digits, tmp_path)
        for run in found:
            assert {"memorized", "recovered"} <= set(run.history[-1])
        alone = loop.train(found[1].config, data.subset(digits, 128, 0))
        assert alone.metrics["recovered"] == found[1].history[-1]["recovered"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": (1,)}, "`bits` must be an integer in 2..16; got 1"),
            ({"specs": ("channel-wide",)}, "must be one of"),
            ({"bits": ()}, "`bits` must name at least one; got none"),
            ({"specs": ()}, "`specs` must name at least one; got none"),
            ({"curvature_size": 0}, "`curvature_size` must be an integer >= 1; got 0"),
            ({"curvature_products": 0}, "`curvature_products` must be an integer >= 1; got 0"),
        ],
    )
    def test_bad_measurements(self, options, message):
        with pytest.raises(ValueError, match=message):
            sweep.Measuring(**options)


def journal_of(out):
    """The trials that a search has stored."""
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "optuna.journal")))


def json_config(folder):
    return resolve(**json.loads((folder / "config.json").read_text()))


def test_a_comparison_takes_more_seeds_and_goes_on_after_a_kill(tmp_path, called):
    arguments = shlex.split("--methods sgd hero --epochs 2 --train-size 128 --bits 8 2 --curvature-size 50")
    command = ["experiments.compare", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", *command, "--seeds", "1"], cwd=ROOT, stdout=subprocess.DEVNULL)
    first = tmp_path / "out" / "runs" / "sgd-s0"
    for _ in range(2000):
        if runs.status(first) == "done":
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    ended = (first / "metrics.jsonl").stat().st_mtime_ns
    done = called(*command, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in record["results"]] == [("sgd", 0), ("sgd", 1), ("hero", 0), ("hero", 1)]
    assert (first / "metrics.jsonl").stat().st_mtime_ns == ended
    table = (tmp_path / "out" / "table.md").read_text()
    again = called(*command, "--seeds", "2")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("experiments.compare --train-size 5000", "error: `train_size` \\+ `validation_size` must be at most 1433"),
        ("experiments.search --validation-size 1400 --method sam", "error: `batch_size` must be at most the 33"),
        ("experiments.reproduce accuracy --test-size 500", "error: `test_size` must be at most 364"),
        ("experiments.train --batch-size 5000", "error: `batch_size` must be at most the 1433 training images"),
    ],
)
def test_what_the_data_do_not_allow_leaves_no_folder(command, message, tmp_path, called):
    done = called(*shlex.split(command), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert re.match(message, done.stderr)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_comparison_passes_the_label_noise_on():
    config = compare.CompareConfig.resolve(label_noise=0.4, label_noise_kind="asymmetric")
    labels = config.run("hero", 0).labels
    assert (labels.label_noise, labels.label_noise_kind) == (0.4, "asymmetric")


class TestSearch:
    def test_judges_by_held_out_images(self, tmp_path, capsys):
        config = SearchConfig.resolve(
            method="asam", rho=(0.5, 2.0), seeds=2, epochs=2, train_size=128, validation_size=100, label_noise=0.4
        )
        search.main(config, tmp_path / "out")
        record = json.loads((tmp_path / "out" / "search.json").read_text())
        assert [row["rho"] for row in record["grid"]] == [0.5, 2.0]
        for row in record["grid"]:
            paths = [tmp_path / "out" / "runs" / f"asam-rho{row['rho']}-s{seed}" for seed in range(2)]
            accuracies = [runs.read_metrics(path)[-1]["validation_accuracy"] for path in paths]
            np.testing.assert_allclose(row["validation_accuracy"], np.mean(accuracies))
            np.testing.assert_allclose(row["std"], np.std(accuracies, ddof=1))
            assert json_config(paths[0]).labels.label_noise == 0.4
        assert record["best"] == best_of(record["grid"])
        assert "held out" in capsys.readouterr().out
        # More values are added to what is there.
        search.main(config.replace(**{"rho": (0.5, 1.0, 2.0)}), tmp_path / "out")
        assert len(json.loads((tmp_path / "out" / "search.json").read_text())["grid"]) == 3

    def test_best_is_the_highest_mean_then_the_weakest(self):
        def row(rho, gamma, accuracy, n=2):
            return {"rho": rho, "gamma": gamma, "validation_accuracy": accuracy, "n": n}

        assert best_of([row(1, 2, 0.5), row(2, 3, 0.7), row(1, 3, 0.7)]) == row(1, 3, 0.7)
        assert best_of([row(1, 3, 0.7), row(2, 2, 0.7)]) == row(2, 2, 0.7)
        assert best_of([row(1, 3, float("nan"), 0), row(2, 2, 0.1)]) == row(2, 2, 0.1)
        # One of which a seed diverged is no candidate.
        assert best_of([row(1, 3, 0.9, 1), row(2, 2, 0.1)]) == row(2, 2, 0.1)
        assert best_of([row(1, 3, float("nan"), 0)]) is None

    def test_trials_fill_the_space(self):
        """On a logarithmic scale: of four one in each quarter of every setting, of sixteen one in each sixteenth."""
        space = {"gamma": (1.0, 1e4), "learning_rate": (0.01, 1.0)}
        made = list(SearchConfig.resolve(method="hero", rho=(0.5,), **space, trials=16).runs().values())
        assert {run.method.rho for run in made} == {0.5}
        for count in (4, 16):
            for name, (least, greatest) in space.items():
                values = np.array([run.flat()[name] for run in made[:count]])
                parts = np.log(values / least) / np.log(greatest / least) * count
                assert sorted(parts.astype(int)) == list(range(count))
        # More are added to those that are there; methods with the same settings try the same.
        assert list(SearchConfig.resolve(method="hero", rho=(0.5,), **space, trials=4).runs().values()) == made[:4]
        others = SearchConfig.resolve(method="grad_l1", **space, trials=16).runs().values()
        assert [(run.method.gamma, run.optimizer.learning_rate) for run in others] == [
            (run.method.gamma, run.optimizer.learning_rate) for run in made
        ]

    def test_trials_are_counted_and_added_to(self, tmp_path, monkeypatch):
        config = SearchConfig.resolve(
            method="asam", rho=(0.5, 2.0), trials=2, seeds=2, epochs=1, train_size=128, validation_size=100
        )
        out = tmp_path / "out"
        search.main(config, out)
        first = json.loads((out / "search.json").read_text())["grid"]
        before = written(out)
        # What is in the folder is what is tried, whatever would be drawn now.
        monkeypatch.setattr("experiments.measure.search.draw", lambda *_: [{"rho": rho} for rho in (0.8, 0.9, 1.0)])
        search.main(config.replace(trials=3), out)
        grid = json.loads((out / "search.json").read_text())["grid"]
        assert grid[:2] == first
        assert grid[2]["rho"] == 1.0
        assert {**written(out), **before} == written(out)
        trials = optuna.load_study(study_name="search", storage=journal_of(out)).trials
        assert [trial.params["rho"] for trial in trials] == [row["rho"] for row in grid]
        assert [trial.value for trial in trials] == [row["validation_accuracy"] for row in grid]
        with pytest.raises(FileExistsError, match=r"has rho \[0\.5, 2\.0\], not \[0\.5, 3\.0\]"):
            search.main(config.replace(rho=(0.5, 3.0)), out)
        plain = tmp_path / "grid"
        search.main(config.replace(trials="grid"), plain)
        with pytest.raises(FileExistsError, match="has trials 'grid', not 3"):
            search.main(config.replace(trials=3), plain)
        with pytest.raises(FileExistsError, match="has trials 3, not 'grid'"):
            search.main(config.replace(trials="grid"), out)

    def test_killed_at_any_moment(self, tmp_path, called):
        """kill -9 at random moments: what comes out is what an undisturbed search gives, in as many trials."""
        arguments = "--method hero --rho 0.5 2 --gamma 1 100 --trials 3 --seeds 2 --epochs 4 --train-size 128"
        command = ["experiments.search", *arguments.split(), "--validation-size", "100", "--out"]
        random = np.random.default_rng()
        out, moments = tmp_path / "killed", []
        for _ in range(4):
            started = [sys.executable, "-m", *command, str(out)]
            process = subprocess.Popen(started, cwd=ROOT, stdout=subprocess.DEVNULL)
            begun = len(written(out)) if out.exists() else 0
            while process.poll() is None and (not out.exists() or len(written(out)) == begun):
                time.sleep(0.01)
            moments.append(random.uniform(0, 2))
            time.sleep(moments[-1])
            process.kill()
            process.wait()
        for path in (out, tmp_path / "whole"):
            done = called(*command, path)
            assert done.returncode == 0, (done.stderr, moments)
        records = [json.loads((path / "search.json").read_text()) for path in (out, tmp_path / "whole")]
        assert records[0]["grid"] == records[1]["grid"], moments
        assert records[0]["best"] == records[1]["best"]
        assert len(list((out / "runs").iterdir())) == 6
        for path in (out, tmp_path / "whole"):
            trials = optuna.load_study(study_name="search", storage=journal_of(path)).trials
            assert [trial.value for trial in trials] == [row["validation_accuracy"] for row in records[1]["grid"]]

    def test_every_pair_once(self):
        made = SearchConfig.resolve(method="hero", rho=(1.0, 2.0), gamma=(0.0, 3.0, 5.0)).runs()
        assert len(made) == 6
        assert {(run.method.rho, run.method.gamma) for run in made.values()} == {
            (r, g) for r in (1, 2) for g in (0, 3, 5)
        }
        (preset,) = SearchConfig.resolve(method="sam").runs().values()
        assert preset == resolve(method="sam", validation_size=360)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "adam"}, "`method` must be one of 'sgd', .*, 'sam', 'asam', 'grad_l1', 'hero'; got 'adam'"),
            ({"method": "sgd", "rho": (0.1,)}, r"`rho` has no effect on method 'sgd'; got \(0.1,\)"),
            ({"method": "sam", "gamma": (1.0,)}, r"`gamma` has no effect on method 'sam'; got \(1.0,\)"),
            ({"rho": (1.0, 1.0)}, "`rho` must name each once; got 1.0 twice"),
            ({"rho": (-1.0,)}, "`rho` must be non-negative and finite; got -1.0"),
            ({"validation_size": 0}, "`validation_size` must be an integer >= 1; got 0"),
            ({"rho": (1.0, 2.0), "trials": 0}, "`trials` must be an integer >= 1; got 0"),
            ({"rho": (1.0,), "trials": 3}, "`trials` must have two values of a setting to draw between; got 3"),
            (
                {"rho": (2.0, 1.0), "trials": 3},
                r"`rho` must be two rising values above 0 with trials; got \(2.0,",
            ),
            ({"gamma": (0.0, 1.0), "trials": 3}, r"`gamma` must be two rising values above 0 with trials; got \(0.0"),
            ({"rho": (1.0, 2.0, 3.0), "trials": 3}, "`rho` must be two rising values above 0 with trials; got"),
        ],
    )
    def test_bad_searches(self, options, message):
        with pytest.raises(ValueError, match=message):
            SearchConfig.resolve(**options)


def trace(run, images):
    """Traces a step of each kind that a run has: all of its program, without compiling it."""
    trainer = compiled.build(run, images)
    indices = np.arange(run.budget.batch_size) % images.train.size
    state = jax.eval_shape(functools.partial(trainer.init, 0))
    steps_per_epoch = images.train.size // run.budget.batch_size
    for kind, _ in enumerate(methods.phases(run, steps_per_epoch)[0]):
        step = functools.partial(trainer.step, kind=kind)
        after, loss = jax.eval_shape(step, state, *images.train, indices)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert (loss.shape, loss.dtype) == ((), np.float32)


@pytest.mark.parametrize("dataset", presets.DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_makes_a_step(dataset, method):
    tiny = {"model": "mlp", "epochs": 2, "batch_size": 4}
    trace(resolve(method=method, dataset=dataset, **tiny), problems.random_images(8))


def leave_search(out, name, **best):
    """Leaves what a search named after what it searched leaves, with or without a best."""
    prefix, _, searched = name.partition("-")
    method, _, penalty = searched.partition("-")
    path = out / "search" / name / "search.json"
    path.parent.mkdir(parents=True)
    config = {"method": method, "penalty": penalty or None, "label_noise": 0.8 if prefix == "noisy" else 0.0}
    records.write(path, {"config": config, "best": {"method": method, **best} if best else None})


class TestReproduce:
    def test_every_planned_run_makes_a_step(self, digits, tmp_path):
        config = plan.ReproduceConfig.resolve(epochs=4, train_size=64)
        plans = {part: plan.plan(config, part, 20, tmp_path) for part in ("accuracy", "noise", "ablations")}
        assert {part: len(planned) for part, planned in plans.items()} == {"accuracy": 28, "noise": 96, "ablations": 14}
        images = data.subset(digits, 64, 20)
        # What is compiled depends on none of these.
        plain = {"label_noise": 0.0, "label_noise_kind": "symmetric", "every": "never", "curvature_size": 1000}
        every = {run.replace(**plain) for planned in plans.values() for run in planned.values()}
        assert len(every) == 37
        for run in every:
            trace(run, images)

    @pytest.mark.parametrize(
        ("folder", "record", "message"),
        [
            ("clean-hvp", {}, "searches in folders clean-NAME or noisy-NAME, .*; got .*clean-hvp"),
            ("dirty-hero", {}, "searches in folders clean-NAME or noisy-NAME, .*; got .*dirty-hero"),
            (
                "clean-hero-eigenvalue",
                {"config": {"method": "hero", "penalty": None}, "best": {"rho": 1.0, "gamma": 5.0}},
                "a search of hero with penalty eigenvalue on clean labels of digits by mlp in .*; got one of hero with"
                " penalty detached on clean labels of digits by mlp",
            ),
            (
                "clean-asam",
                {"config": {"method": "asam", "label_noise": 0.8}, "best": {"rho": 1.0, "gamma": None}},
                "a search of asam on clean labels of digits by mlp in .*; got one of asam on noisy labels",
            ),
            (
                "clean-sam",
                {"config": {"method": "sam", "dataset": "cifar10"}, "best": {"rho": 1.0, "gamma": None}},
                "got one of sam on clean labels of cifar10 by resnet20",
            ),
        ],
    )
    def test_a_search_in_the_wrong_place(self, folder, record, message, tmp_path):
        (tmp_path / "search" / folder).mkdir(parents=True)
        records.write(tmp_path / "search" / folder / "search.json", record)
        # Before anything is searched or trained.
        with pytest.raises(ValueError, match=message):
            reproduce.main(plan.ReproduceConfig.resolve(), out=tmp_path)

    def test_a_search_of_ones_own_comes_first_and_stays(self, tmp_path, monkeypatch):
        small = {"epochs": 1, "train_size": 64, "validation_size": 40, "eval_every": 1, "batch_size": 32}
        path = tmp_path / "all" / "search" / "clean-asam"
        search.main(SearchConfig.resolve(method="asam", rho=(0.7,), seeds=1, **small), path)
        before = written(path)
        monkeypatch.setattr(plan, "TUNED", ("asam",))
        monkeypatch.setattr(reproduce.report, "main", lambda folders: None)
        config = plan.ReproduceConfig.resolve(seeds=1, search_seeds=1, noise_rates=(), variants=("asam",), **small)
        reproduce.main(config, ("search", "accuracy"), tmp_path / "all")
        assert written(path) == before
        assert json_config(tmp_path / "all" / "accuracy" / "runs" / "asam-s0").method.rho == 0.7

    def test_a_search_goes_on_with_more_seeds_never_fewer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "TUNED", ("asam",))
        monkeypatch.setitem(plan.FACTORS, "asam", {"rho": (1.0, 2.0)})
        monkeypatch.setattr(reproduce.report, "main", lambda folders: None)
        small = {"epochs": 1, "train_size": 64, "validation_size": 40, "batch_size": 32}
        config = plan.ReproduceConfig.resolve(noise_rates=(), **small)
        for seeds, expected in ((1, 1), (2, 2), (1, 2)):
            reproduce.main(config.replace(search_seeds=seeds), ("search",), tmp_path / "all")
            record = json.loads((tmp_path / "all" / "search" / "clean-asam" / "search.json").read_text())
            assert [row["n"] for row in record["grid"]] == [expected] * 2

    @pytest.mark.parametrize("end", ["ended", "diverged"])
    def test_a_search_without_a_best_does_not_bar_another_rate(self, end, tmp_path, monkeypatch, capsys):
        def searched(config, path, *rest):
            asked.append((config.method, config.labels.label_noise))
            if end == "diverged":
                raise search.AllDiverged("Every run of the search diverged")

        asked = []
        monkeypatch.setattr(plan, "TUNED", ("asam", "sam"))
        monkeypatch.setattr(reproduce.search, "main", searched)
        leave_search(tmp_path, "noisy-asam")
        reproduce.run_searches(plan.ReproduceConfig.resolve(noise_rates=(0.4,)), 20, tmp_path, None)
        assert asked == [("asam", 0.0), ("sam", 0.0), ("sam", 0.4)]
        # Lines are broken anywhere in a long path.
        printed = "".join(capsys.readouterr().out.split())
        assert "noisy-asamhasasearchofitsown,whichisleftasitis" in printed
        assert ("clean-sam:Everyrunofthesearchdiverged" in printed) == (end == "diverged")

    def test_variants_that_are_equal_are_made_once_and_under_one_name(self, tmp_path):
        config = plan.ReproduceConfig.resolve(dataset="cifar10", variants=("hero-published", "sgd", "asam-published"))
        planned = plan.plan(config, "accuracy", 20, tmp_path)
        assert list(planned) == ["sgd", "asam", "hero"]
        noisy = plan.plan(config.replace(noise_kinds=("uniform",)), "noise", 20, tmp_path)
        assert list(noisy)[:2] == ["sgd-uniform_0.2", "sgd-uniform_0.4"]
        assert {name.split("-")[0] for name in noisy} == {"sgd", "asam", "hero"}
        with pytest.raises(ValueError, match=r"`variants` must be one of .*; got 'adam'"):
            plan.ReproduceConfig.resolve(variants=("adam",))

    def test_settings_of_every_run(self, tmp_path):
        config = plan.ReproduceConfig.resolve(
            dataset="cifar10", batch_size=50, epochs=8, eval_every=3, augment=False, train_size=200
        )
        planned = plan.plan(config, "accuracy", 20, tmp_path)
        for run in planned.values():
            assert (run.budget.batch_size, run.watch.eval_every, run.task.augment, run.task.train_size) == (
                50,
                3,
                False,
                200,
            )
        assert (planned["sgd-longer"].budget.epochs, planned["sgd-longer"].watch.every) == (32, 8)
        assert (planned["sgd"].budget.epochs, planned["sgd"].watch.every) == (8, 2)
        changed = plan.plan(config, "ablations", 20, tmp_path)
        assert [
            run.method.penalty_batch_size for run in changed.values() if run.method.penalty_batch_size != "all"
        ] == [10]

    def test_all_spend_the_gradients_of_hero_at_equal_cost(self, tmp_path):
        config = plan.ReproduceConfig.resolve(epochs=12, noise_rates=(0.4,), noise_kinds=("uniform", "asymmetric"))
        planned = plan.plan(config, "cost", 20, tmp_path)
        assert list(planned) == [name for each in plan.AT_EQUAL_COST for name in (each, f"{each}-uniform_0.4")]
        epochs = {name: planned[name].budget.epochs for name in ("sgd", "msam", "sam", "grad_l1", "hero", "hero-part")}
        assert epochs == {"sgd": 48, "msam": 48, "sam": 24, "grad_l1": 16, "hero": 12, "hero-part": 24}
        assert planned["hero-late"].budget.epochs == 27
        for name, run in planned.items():
            assert run.budget.epochs * methods.gradients(run) == pytest.approx(48, rel=0.02), name
            assert run.labels.label_noise == (0.4 if "uniform" in name else 0.0)

    def test_every_search_has_as_many_trials(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(reproduce.search, "main", lambda config, path, *rest: asked.append((path.name, config)))
        reproduce.run_searches(plan.ReproduceConfig.resolve(noise_rates=(0.8,)), 20, tmp_path, None)
        assert [name for name, _ in asked] == [f"{label}-{n}" for label in ("clean", "noisy") for n in plan.TUNED]
        assert {len(config.runs()) for _, config in asked} == {15}
        suppressed = next(config for name, config in asked if name == "clean-sam-suppress")
        assert suppressed.suppress == (0.25, 0.5, 0.9)
        drawn = plan.searches(plan.ReproduceConfig.resolve(noise_rates=(0.8,), search_trials=20), 20)
        assert list(drawn) == [name for name, _ in asked]
        for each, (_, grid) in zip(drawn.values(), asked, strict=True):
            assert len(each.runs()) == 20
            for field, (least, greatest) in ((name, (d.low, d.high)) for name, d in each.space.items()):
                assert (least, greatest) == (min(getattr(grid, field)), max(getattr(grid, field)))

    def test_what_was_found_for_a_variant_is_its_own(self, tmp_path):
        leave_search(tmp_path, "clean-sam", rho=0.3)
        leave_search(tmp_path, "clean-sgd", learning_rate=0.2, weight_decay=0.002)
        path = tmp_path / "search" / "clean-sam-suppress" / "search.json"
        path.parent.mkdir()
        best = {"rho": 0.15, "suppress": 0.9}
        records.write(path, {"config": {"method": "sam", "suppress": [0.5, 0.9]}, "best": best})
        planned = plan.plan(plan.ReproduceConfig.resolve(), "accuracy", 20, tmp_path)
        assert (planned["sam"].method.rho, planned["sam"].method.suppress) == (0.3, 0.0)
        assert (planned["sam-suppress"].method.rho, planned["sam-suppress"].method.suppress) == (0.15, 0.9)
        # What is built on SGD has what was found for it.
        for name in ("sgd", "noise", "ema", "sgd-longer"):
            assert (planned[name].optimizer.learning_rate, planned[name].optimizer.weight_decay) == (0.2, 0.002)
        # A search without suppression is not one of it.
        records.write(path, {"config": {"method": "sam"}, "best": best})
        with pytest.raises(ValueError, match=r"a search of sam with suppression on clean labels .*; got one of sam on"):
            plan.plan(plan.ReproduceConfig.resolve(), "accuracy", 20, tmp_path)

    def test_one_that_diverged_is_not_in_the_landscape(self, tmp_path, monkeypatch, capsys):
        drawn = []
        monkeypatch.setattr(reproduce.landscape, "main", lambda folders, *rest: drawn.extend(folders))
        for name, status in (("sgd", "done"), ("asam", "diverged"), ("hero", "done")):
            folder = tmp_path / "accuracy" / "runs" / f"{name}-s0"
            folder.mkdir(parents=True)
            records.write(folder / "status.json", {"status": status})
        reproduce.draw_landscape(plan.ReproduceConfig.resolve(), tmp_path, None)
        assert [folder.name for folder in drawn] == ["sgd-s0", "hero-s0"]
        drawn.clear()
        # Another one is there; one of the runs is still to end.
        (tmp_path / "landscape").mkdir()
        asked = {"radius": 1.0, "rise": 0.1, "directions": 2}
        basin = {"line": {"mean": 0.1, "std": 0.1}, "plane": 0.1}
        around = {"center": {"loss": 1.0, "accuracy": 0.5}, "basin": basin}
        record = {"config": asked, "environment": {}, "runs": {"sgd-s0": around}}
        records.write(tmp_path / "landscape" / "landscape.json", record)
        reproduce.draw_landscape(plan.ReproduceConfig.resolve(), tmp_path, None)
        records.write(tmp_path / "accuracy" / "runs" / "hero-s0" / "status.json", {"status": "running"})
        reproduce.draw_landscape(plan.ReproduceConfig.resolve(), tmp_path, None)
        printed = "".join(capsys.readouterr().out.split())
        assert "landscapeisofotherruns:removeitforoneof2nolandscapebeforehero-s0ended" in printed
        assert not drawn
        (tmp_path / "new" / "accuracy").mkdir(parents=True)
        reproduce.draw_landscape(plan.ReproduceConfig.resolve(variants=("sam",)), tmp_path / "new", None)
        assert not drawn

    def test_what_the_search_found_is_taken(self, tmp_path):
        leave_search(tmp_path, "clean-sam", rho=0.3, gamma=None)
        leave_search(tmp_path, "clean-hero", rho=0.7, gamma=11.0)
        leave_search(tmp_path, "noisy-hero", rho=2.0, gamma=300.0)
        leave_search(tmp_path, "noisy-hero-eigenvalue", rho=1.5, gamma=0.02)
        # One that was ended, or of which every run diverged.
        leave_search(tmp_path, "clean-asam")
        config = plan.ReproduceConfig.resolve()
        clean, noisy, changed = (plan.plan(config, part, 20, tmp_path) for part in ("accuracy", "noise", "ablations"))
        assert clean["sam"].method.rho == clean["sam-noise"].method.rho == 0.3
        assert clean["asam"].method.rho == 1.0
        assert (clean["hero"].method.rho, clean["hero"].method.gamma, clean["hero-hvp"].method.gamma) == (
            0.7,
            11.0,
            11.0,
        )
        assert (clean["hero-eigenvalue"].method.rho, clean["hero-eigenvalue"].method.gamma) == (0.7, 0.1)
        assert noisy["hero-symmetric_0.8"].method.gamma == 300.0
        # Without a search on noisy labels that on clean ones counts; each penalty has its own.
        assert noisy["sam-symmetric_0.8"].method.rho == 0.3
        eigenvalue = noisy["hero-eigenvalue-symmetric_0.8"]
        assert (eigenvalue.method.rho, eigenvalue.method.gamma) == (1.5, 0.02)
        assert changed["hero-gamma_0.0"].method.rho == 0.7
        assert changed["hero"].method.gamma == 11.0
        assert changed["hero-penalty_eigenvalue"].method.gamma == 0.1
        leave_search(tmp_path, "clean-hero-eigenvalue", rho=1.0, gamma=0.3)
        again = plan.plan(config, "ablations", 20, tmp_path)
        assert next(
            (run.method.rho, run.method.gamma) for run in again.values() if run.method.penalty == "eigenvalue"
        ) == (0.7, 0.3)
        assert not any(
            run.labels.label_noise_kind == "asymmetric" and run.labels.label_noise >= 0.5 for run in noisy.values()
        )

    def test_one_command_runs_all_and_reports(self, tmp_path, monkeypatch):
        original = plan.variants
        methods = ("sgd", "asam", "hero")
        monkeypatch.setattr(plan, "variants", lambda *given: {name: original(*given)[name] for name in methods})
        monkeypatch.setattr(plan, "ON_NOISY", ("sgd",))
        monkeypatch.setattr(plan, "TUNED", ("asam", "hero"))
        monkeypatch.setitem(plan.FACTORS, "asam", {"rho": (3.0,)})
        monkeypatch.setitem(plan.FACTORS, "hero", {"rho": (3.0,), "gamma": (2.0,)})
        monkeypatch.setattr(plan, "AT_EQUAL_COST", ("sgd",))
        monkeypatch.setattr(plan, "ablations", lambda *given: {"hero-gamma_0": {"method": "hero", "gamma": 0.0}})
        out = tmp_path / "all"
        config = plan.ReproduceConfig.resolve(
            epochs=1, train_size=64, validation_size=40, seeds=1, search_seeds=1, noise_rates=(0.4,),
            noise_kinds=("uniform",), specs=("channel-narrow",), curvature_size=20,
        )  # fmt: skip
        reproduce.main(config, out=out)
        page = (out / "report" / "report.html").read_text()
        for section in (
            "Cost",
            "Accuracy",
            "Label noise",
            "Quantization",
            "Curvature",
            "Landscapes",
            "Ablations",
            "Search",
        ):
            assert f">{section}</h2>" in page
        # The search was on that noise, and what it found, three times the preset, was taken.
        assert (
            json_config(out / "search" / "noisy-hero" / "runs" / "hero-rho3.0-gamma200.0-s0").labels.label_noise == 0.4
        )
        hero = json_config(out / "accuracy" / "runs" / "hero-s0")
        assert (hero.method.rho, hero.method.gamma, hero.validation_size) == (3.0, 200.0, 40)
        before = [written(out / part) for part in ("accuracy", "noise", "ablations")]
        reproduce.main(config, out=out)
        assert [written(out / part) for part in ("accuracy", "noise", "ablations")] == before
        # Another rate is added to what is there.
        reproduce.main(config.replace(noise_rates=(0.2,)), ("noise",), out)
        added = json_config(out / "noise" / "runs" / "sgd-uniform_0.2-s0")
        assert added == json_config(out / "noise" / "runs" / "sgd-uniform_0.4-s0").replace(label_noise=0.2)
        assert {**before[1], **written(out / "noise")} == written(out / "noise")

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match=r"`parts` must be one of .*; got 'all'"):
            reproduce.main(plan.ReproduceConfig.resolve(), ("all",), tmp_path)
        with pytest.raises(ValueError, match="`parts` must have accuracy before landscape"):
            reproduce.main(plan.ReproduceConfig.resolve(), ("landscape",), tmp_path / "out")
        with pytest.raises(ValueError, match=r"`noise_rates` must be between 0 and 1; got 1\.5"):
            plan.ReproduceConfig.resolve(noise_rates=(1.5,))
        with pytest.raises(ValueError, match=r"`noise_rates` must be above 0: .*; got 0"):
            plan.ReproduceConfig.resolve(noise_rates=(0.4, 0.0))
        with pytest.raises(ValueError, match="`validation_size` must be an integer >= 1; got 0"):
            plan.ReproduceConfig.resolve(validation_size=0)
        with pytest.raises(ValueError, match="`noise_kinds` must be one of"):
            plan.ReproduceConfig.resolve(noise_kinds=("all",))

"""Runs that Ray makes are those of the plain loop, number by number, also where a worker is killed or all are ended."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import data
from experiments.config import resolve
from experiments.measure import sweep
from experiments.measure.workers import Engine
from experiments.storage import claims, environment, files, records, runs
from tests import problems

ray = pytest.importorskip("ray")
# Ray starts its processes by a fork, which JAX warns of.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 3, "batch_size": 64, "train_size": 128}
MEASURING = sweep.Measuring(bits=(8, 2), curvature_size=50, curvature_products=60)
# By Ray, which has two cores.
BY_RAY = Engine(workers=2)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two cores, which this process is connected to."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, **options)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def run_all(configs, dataset, out, engine, lines=None):
    """With two seeds each; what is reported of all runs goes to `lines`."""

    def begin(description, total):
        return lambda done, metrics: None if lines is None else lines.append((description, done, total))

    return sweep.run_all(configs, range(2), dataset, out, begin, MEASURING, engine)


def numbers(found):
    """What a run gives, without how fast it was."""
    return [
        (run.name, run.config.seed, [{**row, "images_per_second": 0} for row in run.history], run.measured)
        for run in found
    ]


def assert_same_weights(out, other):
    for folder in (other / "runs").iterdir():
        states = [runs.load_variables(each) for each in (out / "runs" / folder.name, folder)]
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """(configurations, folder, what was found) of the plain loop; HERO saves all the time."""
    changed = {"sgd": {"method": "sgd"}, "hero": {"method": "hero", "epochs": 150, "save_minutes": 0.002}}
    configs = {name: resolve(**SMALL | each) for name, each in changed.items()}
    out = tmp_path_factory.mktemp("plain")
    return configs, out, run_all(configs, digits, out, Engine())


def writer(folder):
    """The process that has the lock of a folder open; None where there is none."""
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(file) == str(folder / "lock"):
                return int(file.parts[2])
        except OSError:
            continue
    return None


def test_a_worker_that_is_killed(cluster, plain, digits, tmp_path):
    configs, out, found = plain
    killed = []

    def kill():
        folder = tmp_path / "runs" / "hero-s1"
        while problems.last_step(folder) < 2:
            time.sleep(0.01)
        killed.append(writer(folder))
        os.kill(killed[0], signal.SIGKILL)
        killed.append(problems.last_step(folder))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    lines = []
    again = run_all(configs, digits, tmp_path, BY_RAY, lines)
    thread.join()
    assert killed[0] != os.getpid()
    assert 2 <= killed[1] < 60
    assert numbers(again) == numbers(found)
    assert_same_weights(tmp_path, out)
    continued = {path.name: records.read(path / "environment.json") for path in (tmp_path / "runs").iterdir()}
    assert {name for name, record in continued.items() if "continued" in record} == {"hero-s1"}
    # A run says the command that it was made by, not that of the worker.
    assert continued["hero-s0"]["command"] == environment.current()["command"]
    assert lines == [("all runs", done, 4) for done in range(1, 5)]
    # What is there is not made again.
    assert run_all(configs, digits, tmp_path, BY_RAY) == again


def test_one_that_diverges_does_not_end_the_others(cluster, digits, tmp_path, caplog):
    caplog.set_level("INFO")
    diverging = resolve(method="sgd", learning_rate=1e30, **SMALL)
    configs = {"diverging": diverging, "sgd": diverging.replace(learning_rate=0.1)}
    found = run_all(configs, digits, tmp_path, BY_RAY)
    assert [(run.name, run.config.seed) for run in found] == [("sgd", 0), ("sgd", 1)]
    assert "diverging-s0 diverged; the others go on" in caplog.text


def test_what_a_run_raises_comes_back(cluster, plain, digits, tmp_path):
    configs, _, _ = plain
    with runs.RunFolder(tmp_path / "runs" / "sgd-s1", configs["sgd"].replace(seed=1)) as folder:
        folder.status("interrupted")
    other = {"sgd": configs["sgd"].replace(learning_rate=0.3)}
    with pytest.raises(FileExistsError, match=r"^`out` must be .* has learning_rate 0\.1, not 0\.3"):
        run_all(other, digits, tmp_path, BY_RAY)


def test_a_run_of_another_process_is_left_to_it(cluster, plain, digits, tmp_path):
    configs, _, _ = plain
    path = tmp_path / "runs" / "sgd-s0"
    path.mkdir(parents=True)
    with claims.locked(path), pytest.raises(files.Failed, match="1 of 2 runs are left, such as sgd-s0: another"):
        run_all({"sgd": configs["sgd"]}, digits, tmp_path, BY_RAY)
    assert runs.status(tmp_path / "runs" / "sgd-s1") == "done"


def test_an_interruption_leaves_checkpoints(cluster, tmp_path, called):
    """SIGTERM at the command, whose runs are on a cluster; given again without one it ends as if nothing had been."""
    command = "experiments.search --method hero --rho 1 2 --seeds 1 --epochs 1000 --eval-every 20 --train-size 128"
    command = [*command.split(), "--validation-size", "100", "--out"]
    out = tmp_path / "interrupted"
    folders = [out / "runs" / f"hero-rho{rho}-gamma100.0-s0" for rho in (1.0, 2.0)]
    started = [sys.executable, "-m", *command, str(out), "--ray-address", cluster]
    process = subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not all((folder / "metrics.jsonl").exists() for folder in folders):
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=300)[1] == "interrupted\n"
    assert process.returncode == 130
    assert [runs.status(folder) for folder in folders] == ["interrupted"] * 2
    for folder in folders:
        assert problems.last_step(folder) > 0
    for path in (out, tmp_path / "whole"):
        done = called(*command, path)
        assert done.returncode == 0, done.stderr
    grids = [records.read(path / "search.json")["grid"] for path in (out, tmp_path / "whole")]
    assert grids[0] == grids[1]
    assert_same_weights(out, tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` must be an integer >= 1; got 0"),
        ({"workers": 2, "ray_address": "auto"}, "`workers` must be left out with ray_address: .*; got 2"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(**options)


@pytest.mark.parametrize("options", [{"workers": 2}, {"ray_address": "auto"}])
def test_without_ray(options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (name,) = options
    with pytest.raises(ValueError, match=re.escape(f"`{name}` needs the package ray: pip install 'ray>=2.40'.")):
        Engine(**options)

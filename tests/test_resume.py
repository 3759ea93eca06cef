"""Runs that end early and go on: bit for bit, after any end, on other devices; folders that must not be touched."""

import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from experiments.config import resolve
from experiments.storage import checkpoints, claims, files, records, runs, tensorboard
from experiments.training import compiled, layouts, loop
from hero_jax.models import resnet
from tests import problems

COMMAND = [sys.executable, "-m", "experiments.train", "--epochs", "6", "--train-size", "256"]


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Under nohup SIGHUP is, and in the background of a script SIGINT, and what is ignored stays so."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def images():
    """16 random images in color, which are cropped and flipped."""
    return problems.random_images(16)


def build(config, images):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.models, "create", lambda _, n, **options: resnet.CifarResNet(0, n, **options))
        return compiled.build(config, images)


@pytest.fixture(scope="module")
def config():
    """4 epochs of 4 steps; BatchNorm, augmentation, an eigenvector in the state, one that is measured."""
    options = {"penalty": "eigenvalue", "gamma": 0.1, "gamma_warmup": 0, "rho": 0.1, "every": 2}
    return resolve(dataset="cifar10", epochs=4, batch_size=4, **options)


@pytest.fixture(scope="module")
def trainer(config, images):
    return build(config, images)


def part(config, images, out, trainer, **options):
    """One part of a run; `options` are what ends it."""
    config = config.replace(**options)
    with runs.RunFolder(out, config, config.may_differ()) as folder:
        return loop.train(config, images, folder, trainer=trainer)


@pytest.fixture(scope="module")
def whole(config, images, trainer, tmp_path_factory):
    """(folder, result) of the run in one part, with checkpoints of its last two steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, part(config, images, out, trainer, save_minutes=0.0)


def rows(folder):
    found = runs.read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def status(folder):
    return json.loads((folder / "status.json").read_text())["status"]


def assert_same(folder, whole):
    """Everything that a run leaves is equal, bit for bit."""
    states = [runs.load_variables(f) for f in (folder, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert rows(folder) == rows(whole)
    assert status(folder) == status(whole) == "done"


class TestBitForBit:
    def test_a_part_for_every_step(self, config, images, trainer, whole, tmp_path):
        out = tmp_path / "run"
        for step in range(1, 16):
            result = part(config, images, out, trainer, max_minutes=1e-9)
            assert status(out) == "interrupted"
            assert max(int(p.name) for p in (out / "checkpoint").iterdir()) == step
            assert bool(result.metrics) == (step % 4 == 0)
        part(config, images, out, trainer)
        assert_same(out, whole[0])
        assert len(rows(out)) == 4
        # The measured eigenvector was carried over: it takes fewer products than a random start.
        assert rows(out)[3]["eigenvalue_products"] == rows(whole[0])[3]["eigenvalue_products"]
        continued = json.loads((out / "environment.json").read_text())["continued"]
        assert len(continued) == 15

    def test_a_state_that_is_not_carried_over_shows(self, config, images, trainer, whole, tmp_path):
        """Without the eigenvector of the penalty the weights come out otherwise."""
        out = tmp_path / "run"
        part(config, images, out, trainer, max_minutes=1e-9)

        def steps_like(state):
            forgotten = trainer.init(1).opt_state[0]
            return state._replace(opt_state=(forgotten._replace(count=state.opt_state[0].count), *state.opt_state[1:]))

        forgotten = iter([True])

        def step(state, *arguments, **options):
            return trainer.step(steps_like(state) if next(forgotten, False) else state, *arguments, **options)

        result = part(config, images, out, trainer._replace(step=step))
        kernels = [r.variables["params"]["head"]["kernel"] for r in (result, whole[1])]
        assert np.abs(kernels[0] - kernels[1]).max() > 0

    def test_epochs_that_are_not_evaluated(self, config, images, trainer, whole, tmp_path):
        out = tmp_path / "run"
        for _ in range(4):
            part(config, images, out, trainer, max_minutes=1e-9, eval_every=4, every=4)
        assert rows(out) == []
        part(config, images, out, trainer, eval_every=4, every=4)
        states = [runs.load_variables(f) for f in (out, whole[0])]
        jax.tree.map(np.testing.assert_array_equal, *states)
        assert [row["epoch"] for row in rows(out)] == [4]

    @pytest.mark.parametrize("urgent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_ends_after_the_step(self, config, images, trainer, whole, tmp_path, urgent, capfd):
        out = tmp_path / "run"

        def step(state, *arguments, **options):
            if int(state.step) == 5:
                os.kill(os.getpid(), urgent)
            return trainer.step(state, *arguments, **options)

        handler = signal.getsignal(urgent)
        with pytest.raises(KeyboardInterrupt):
            part(config, images, out, trainer._replace(step=step))
        assert signal.getsignal(urgent) == handler
        assert "ending soon" in capfd.readouterr().err
        assert status(out) == "interrupted"
        assert "6" in {p.name for p in (out / "checkpoint").iterdir()}
        part(config, images, out, trainer)
        assert_same(out, whole[0])

    def test_a_signal_in_the_last_step(self, config, images, trainer, whole, tmp_path):
        def step(state, *arguments, **options):
            if int(state.step) == 15:
                os.kill(os.getpid(), signal.SIGINT)
            return trainer.step(state, *arguments, **options)

        out = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            part(config, images, out, trainer._replace(step=step))
        assert status(out) == "interrupted"
        part(config, images, out, trainer)
        assert_same(out, whole[0])

    @pytest.mark.ends
    def test_killed_at_any_moment(self, tmp_path, called):
        """kill -9, twice, while checkpoints are written all the time."""
        command = [*COMMAND, "--save-minutes", "0.00001", "--out"]
        ends = []
        for name, kills in (("whole", 0), ("killed", 2)):
            out = tmp_path / name
            for i in range(kills):
                process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                begun = problems.last_step(out)
                while process.poll() is None and problems.last_step(out) < begun + 2 + 3 * i:
                    time.sleep(0.01)
                process.kill()
                process.wait()
                ends.append(problems.last_step(out))
            found = called(*command[2:], out)
            assert found.returncode == 0, found.stderr
        assert sorted(set(ends)) == ends, ends
        assert ends[-1] < 24
        assert_same(tmp_path / "killed", tmp_path / "whole")
        assert "continuing after step" in found.stdout

    @pytest.mark.ends
    def test_killed_at_random_moments(self, tmp_path, called, attacks, attack_seed):
        """kill -9 while modules are imported, or while it trains and saves, which it does at each step; 2 in CI."""
        rng, moments, kills = random.Random(attack_seed), [], max(2, attacks // 100)
        options = [
            "--method",
            "sgd",
            "--epochs",
            str(40 * kills),
            "--train-size",
            "128",
            "--save-minutes",
            "0.00001",
            "--out",
        ]
        killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
        for i in range(kills):
            command, begun = [*COMMAND[:3], *options, str(killed)], problems.last_step(killed)
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            if (kills - i) % 2:
                # However slow the machine is, this one gets past its imports.
                while process.poll() is None and problems.last_step(killed) <= begun:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 1))
            else:
                time.sleep(rng.uniform(0.5, 4))
            process.kill()
            process.wait()
            moments.append(problems.last_step(killed))
        for folder in (killed, undisturbed):
            found = called(*COMMAND[2:3], *options, folder)
            assert found.returncode == 0, found.stderr
        print(f"{kills} kills, after steps {moments} of {80 * kills}")
        assert moments[-1] > 0
        assert_same(killed, undisturbed)

    def test_done_already(self, config, images, trainer, whole):
        before = {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file() and p.name != "lock"}

        def step(*_, **__):
            raise AssertionError("nothing is left to do")

        result = part(config, images, whole[0], trainer._replace(step=step))
        assert result.metrics == whole[1].metrics
        same = {"checkpoint", "config.json", "environment.json", "status.json"}
        for path, time_ns in before.items():
            if path.relative_to(whole[0]).parts[0] in same:
                assert path.stat().st_mtime_ns == time_ns


@pytest.mark.parametrize("layouts", [("none", "pmap", "sharded"), ("sharded", "jit", "none")])
def test_other_devices_in_every_part(config, images, whole, tmp_path, layouts):
    options = {
        "none": {},
        "pmap": {"parallel": "pmap", "devices": 4},
        "jit": {"parallel": "jit", "devices": 2},
        "sharded": {"parallel": "jit", "shard_params": True, "devices": 4},
    }
    for i, layout in enumerate(layouts):
        changed = config.replace(**options[layout])
        trainer, calls = build(changed, images), []

        def step(*arguments, trainer=trainer, calls=calls, **options):
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return trainer.step(*arguments, **options)

        if i < 2:
            with pytest.raises(KeyboardInterrupt):
                part(changed, images, tmp_path / "run", trainer._replace(step=step))
        else:
            result = part(changed, images, tmp_path / "run", trainer)
    problems.assert_close(result.variables, whole[1].variables, rtol=1e-4)


def test_tensorboard_has_every_epoch_once(config, images, tmp_path, called):
    out = tmp_path / "run"
    command = [*COMMAND[2:], "--eval-every", "4", "--tensorboard", "--out", str(out)]
    for options in (["--max-minutes", "1e-9"], ["--max-minutes", "1e-9"], []):
        found = called(*command, *options)
        assert found.returncode == 0, found.stderr
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]
    rows = runs.read_metrics(out)
    assert [row["epoch"] for row in rows] == [4, 6]
    scalars = [(event.step, event.value) for event in events.Scalars("accuracy")]
    np.testing.assert_allclose(scalars, [(row["epoch"], row["accuracy"]) for row in rows], rtol=1e-6)


def test_tensorboard_forgets_what_is_made_again(tmp_path):
    for first, last in ((1, 4), (3, 5)):
        with tensorboard.events(tmp_path) as report:
            for epoch in range(first, last + 1):
                report({"epoch": epoch, "train_loss": 10.0 * first + epoch, "step": 3})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]
    assert events.Tags()["scalars"] == ["train_loss"]


class TestDamage:
    @pytest.fixture
    def begun(self, config, images, trainer, tmp_path):
        for _ in range(2):
            part(config, images, tmp_path / "run", trainer, max_minutes=1e-9)
        return tmp_path / "run"

    @pytest.mark.parametrize("how", ["cut", "changed", "gone", "empty"])
    def test_of_the_last_checkpoint_falls_back_to_the_one_before(self, config, images, trainer, whole, begun, how):
        damage(begun / "checkpoint" / "2", how)
        (begun / "damaged-2").mkdir()
        with pytest.warns(UserWarning, match=r"The checkpoint of step 2 in .* is damaged \("):
            part(config, images, begun, trainer)
        assert_same(begun, whole[0])
        assert (begun / "damaged-2-2").exists()

    @pytest.mark.parametrize("damaged", ["default/d/*", checkpoints.METADATA])
    def test_is_told_once(self, begun, caplog, capfd, damaged):
        """Not by orbax at once, and by asyncio when what failed is collected, too."""
        for file in (begun / "checkpoint" / "2").glob(damaged):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0x80
            file.write_bytes(content)
        with pytest.warns(UserWarning, match="step 2") as told:
            runs.load_variables(begun)
        gc.collect()
        assert len(told) == 1
        assert not caplog.records
        assert not any(capfd.readouterr())

    def test_of_a_run_that_is_done(self, config, images, trainer, whole, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(whole[0], out)
        damage(out / "checkpoint" / "16", "cut")
        with pytest.warns(UserWarning, match="step 16"):
            runs.load_variables(out)
        with pytest.warns(UserWarning, match="step 16"), pytest.raises(RuntimeError, match="in the middle"):
            part(config, images, out, trainer._replace(step=failing))
        assert status(out) == "failed"
        part(config, images, out, trainer)
        assert_same(out, whole[0])
        shutil.rmtree(out / "checkpoint")
        with pytest.raises(files.Failed, match="is a run that is done, and its checkpoint is gone"):
            part(config, images, out, trainer)
        assert len(rows(out)) == 4

    def test_of_all_is_an_error_and_loses_nothing(self, config, images, trainer, begun):
        for step in "12":
            damage(begun / "checkpoint" / step, "cut")
        with pytest.raises(files.Failed, match=r"No checkpoint in .* can be read \(the last is that of step 2: "):
            part(config, images, begun, trainer)
        assert problems.last_step(begun) == 2
        assert status(begun) == "failed"

    def test_of_the_evaluations_is_never_gone_on_from(self, config, images, trainer, tmp_path):
        out = tmp_path / "run"
        for _ in range(9):
            part(config, images, out, trainer, max_minutes=1e-9)
        file = out / "metrics.jsonl"
        first, second = file.read_text().splitlines(keepends=True)
        for content, told in (("", "lacks the evaluation of epoch 1"), (first, "epoch 2"), (second, "line 1: ")):
            file.write_text(content)
            with pytest.raises(records.Damaged, match=rf"run.metrics.jsonl is damaged \(.*{told}"):
                part(config, images, out, trainer)
            assert file.read_text() == content
        file.write_text(first + second)
        part(config, images, out, trainer, max_minutes=1e-9)
        assert len(rows(out)) == 2

    def test_full_disk(self, config, images, trainer, tmp_path, called):
        """From the fifth step on no file may grow over 2 kB, which a checkpoint does not fit in."""
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "from experiments import cli, train; from experiments.storage import runs;"
            "save = runs.RunFolder.save\n"
            "def limited(self, step, state):\n"
            "    if step > 4: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "    return save(self, step, state)\n"
            "runs.RunFolder.save = limited; cli.run(train.main)"
        )
        out = tmp_path / "run"
        command = [sys.executable, "-c", code, *COMMAND[3:], "--save-minutes", "0.00001", "--out", str(out)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 1, found.stderr
        (line,) = found.stderr.splitlines()
        assert line.startswith(f"stopped: {out} could not be written (")
        assert problems.last_step(out) == 4
        assert status(out) == "failed"
        found = called(*COMMAND[2:], "--out", out)
        assert found.returncode == 0, found.stderr
        assert "continuing after step 4" in found.stdout

    def test_a_flipped_bit_of_an_array(self, config, images, trainer, whole, begun):
        """The store has no checksum of the pages that hold the arrays; not every byte of them is in use."""
        page = max((begun / "checkpoint" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
        content, right, found = page.read_bytes(), runs.load_variables(begun), []
        for place in range(len(content) // 32, len(content), len(content) // 16):
            page.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                variables = runs.load_variables(begun)
            if told:
                found.append(place)
                assert re.search(r"The checkpoint of step 2 in .*run is damaged \(", str(told[0].message))
            else:
                jax.tree.map(np.testing.assert_array_equal, variables, right)
        assert len(found) > 4
        page.write_bytes(content[: found[0]] + bytes([content[found[0]] ^ 1]) + content[found[0] + 1 :])
        with pytest.warns(UserWarning, match=r"The checkpoint of step 2 in .*run is damaged \("):
            part(config, images, begun, trainer)
        assert_same(begun, whole[0])

    @pytest.mark.parametrize(
        "other",
        [
            {"a": np.ones((2, 3), np.float32)},
            {"b": np.ones((3, 2), np.float32)},
            {"a": np.ones((3, 2), np.float32), "b": np.ones(())},
            {"a": np.ones((3, 2), np.int32)},
            {"a": np.full((3, 2), np.nextafter(np.float32(1), np.float32(2)))},
        ],
    )
    def test_digests_tell_shapes_names_types_and_values_apart(self, other):
        state = {"a": np.ones((3, 2), np.float32)}
        assert checkpoints.digests({"x": other}) != checkpoints.digests({"x": state})
        assert checkpoints.digests({"x": state}) == checkpoints.digests({"x": {"a": np.ones((2, 3), np.float32).T}})

    def test_of_version_0_1_are_not_checked(self, config, images, trainer, whole, begun):
        for step in "12":
            file = begun / "checkpoint" / step / checkpoints.METADATA
            metadata = json.loads(file.read_text())
            assert metadata["custom_metadata"]["digests"].keys() > {"params/head/kernel", "step"}
            file.write_text(json.dumps(metadata | {"custom_metadata": {}}))
        part(config, images, begun, trainer)
        assert_same(begun, whole[0])


def failing(*_, **__):
    raise RuntimeError("in the middle")


def damage(checkpoint, how):
    """Spoils the file of a checkpoint that lists all others; "empty" leaves its folder alone."""
    if how == "empty":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        return
    file = checkpoint / "default" / "manifest.ocdbt"
    content = file.read_bytes()
    half = len(content) // 2
    file.unlink()
    if how != "gone":
        rest = bytes([content[half] ^ 0x55]) + content[half + 1 :] if how == "changed" else b""
        file.write_bytes(content[:half] + rest)


class TestFolders:
    def test_of_another_run(self, config, whole):
        other = config.replace(rho=0.7)
        with pytest.raises(FileExistsError, match=r"`out` must be .* or that of the same run; .* has rho 0.1, not 0.7"):
            runs.RunFolder(whole[0], other, other.may_differ())

    def test_from_before_a_field_was_there(self, config, images, trainer, whole, tmp_path):
        part(config, images, tmp_path / "run", trainer, max_minutes=1e-9)
        file = tmp_path / "run" / "config.json"
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in fields.items() if name != "augment"}))
        part(config, images, tmp_path / "run", trainer)
        assert_same(tmp_path / "run", whole[0])
        other = config.replace(augment=False)
        with pytest.raises(FileExistsError, match="has augment True, not False"):
            runs.RunFolder(tmp_path / "run", other)

    @pytest.mark.parametrize("content", ["", '{"method": "sg'])
    def test_with_a_damaged_configuration(self, content, config, tmp_path):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FileExistsError, match=r"`out` must be .*; .*config.json is damaged"):
            runs.RunFolder(tmp_path, config)

    def test_of_something_else(self, config, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        (tmp_path / "lock").touch()
        with pytest.raises(FileExistsError, match=r"`out` must be a new or empty folder; .* exists"):
            runs.RunFolder(tmp_path, config)

    def test_that_a_crash_left_unfinished(self, config, images, trainer, whole, tmp_path):
        out = tmp_path / "run"
        out.mkdir()
        for name in ("lock", "config.json.0123abcd.tmp"):
            (out / name).touch()
        part(config, images, out, trainer, max_minutes=1e-9)
        for name in ("status.json", "environment.json"):
            (out / name).write_text("")
        part(config, images, out, trainer)
        assert_same(out, whole[0])

    def test_a_lock_that_is_waited_for(self, tmp_path, caplog):
        caplog.set_level("INFO")
        entered = threading.Event()

        def other():
            with claims.locked(tmp_path, wait=True):
                entered.set()

        thread = threading.Thread(target=other)
        with claims.locked(tmp_path):
            thread.start()
            assert not entered.wait(0.3)
        assert entered.wait(10)
        thread.join()
        assert "waiting for another process" in caplog.text

    def test_without_locks(self, config, monkeypatch, tmp_path):
        def acquire(*_, **__):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(claims.filelock.FileLock, "acquire", acquire)
        with pytest.warns(UserWarning, match="without locks"), runs.RunFolder(tmp_path / "run", config):
            pass
        assert status(tmp_path / "run") == "done"

    def test_a_lock_ends_with_its_process(self, tmp_path):
        """kill -9 lets go of it, and there is nothing to clear away."""
        code = (
            "import pathlib, sys; from experiments.storage import claims\n"
            "with claims.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(claims.Busy), claims.locked(tmp_path):
                pass
            process.kill()
        with claims.locked(tmp_path):
            pass

    def test_that_another_process_writes(self, config, tmp_path):
        with runs.RunFolder(tmp_path / "run", config):
            code = (
                "import sys, pathlib; from experiments.config import resolve; from experiments.storage import runs;"
                "runs.RunFolder(pathlib.Path(sys.argv[1]), resolve(**__import__('json').loads(sys.argv[2])))"
            )
            arguments = [str(tmp_path / "run"), json.dumps(claims.to_json(config))]
            found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert "Busy: `out` must be free; another process is writing" in found.stderr

    def test_a_folder_of_something_else_is_told_by_what_differs(self, config, tmp_path):
        saved, wanted = config.flat(), "`out` must be a new or empty folder, or that of the same run; .* has "
        others = {
            "of a comparison": ({"methods": ["sgd"], "dataset": "cifar10"}, "method None, not 'hero'"),
            "without a setting": ({name: saved[name] for name in saved if name != "epochs"}, "epochs None, not"),
            "impossible": (saved | {"rho": -1.0}, "rho -1.0, not"),
        }
        for kind, (there, message) in others.items():
            path = tmp_path / kind
            path.mkdir()
            records.write(path / "config.json", there)
            with pytest.raises(FileExistsError, match=wanted + message):
                runs.RunFolder(path, config)

    def test_parts_may_differ_in_what_does_not_change_the_result(self, config):
        assert config.may_differ() >= {"parallel", "devices", "shard_params", "remat", "max_minutes", "steps_per_call"}
        for parts in ({"sync": False, "groups": 2}, {"microbatch_size": 2}):
            changed = config.replace(**parts)
            assert not changed.may_differ() & {"parallel", "devices", "groups", "sync", "microbatch_size"}

    def test_m_sharpness_says_how_many_devices(self, config):
        assert layouts.with_devices(config) == config
        changed = config.replace(sync=False, parallel="pmap")
        assert layouts.with_devices(changed).layout.devices == 8

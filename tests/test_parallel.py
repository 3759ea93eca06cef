"""One answer on every layout of the trainer, two real processes included; m-sharpness; what is split; errors."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hero_jax
from experiments import data
from experiments.config import resolve
from experiments.storage import runs
from experiments.training import compiled, layouts, loop
from hero_jax import models
from hero_jax.models import resnet
from tests import problems

LAYOUTS = {
    "pmap": {"parallel": "pmap"},
    "shard_map": {"parallel": "shard_map"},
    "jit": {"parallel": "jit"},
    "sharded": {"parallel": "jit", "shard_params": True},
    # Two copies, each split over four devices; of two processes each has one.
    "hybrid": {"parallel": "jit", "shard_params": True, "shard_devices": 4},
}
# HERO where the program is one of its own: under shard_map it is that of pmap, and split in one way as in another.
OF_PROCESSES = {
    name: (method, LAYOUTS[name])
    for name, method in {"pmap": "hero", "shard_map": "sgd", "sharded": "sgd", "hybrid": "hero"}.items()
}
SIZES = {"epochs": 2, "batch_size": 16}
# Two processes run this on 4 devices each, on the network with BatchNorm.
PROCESS = """
import sys
import jax
from experiments.training import layouts
layouts.join(sys.argv[1], 2, int(sys.argv[2]))
from tests import test_parallel
assert (jax.local_device_count(), jax.device_count()) == (4, 8)
import numpy as np
for name, (method, layout) in test_parallel.OF_PROCESSES.items():
    losses, result = test_parallel.curve("conv", method, **layout)
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(result.variables))}
    np.savez(f"{sys.argv[3]}/{name}-{sys.argv[2]}.npz", losses=losses, **leaves)
"""


@functools.cache
def dataset(problem):
    """64 images: of digits, or random ones in color that are cropped and flipped."""
    if problem == "mlp":
        return data.subset(data.load("digits"), 64, 0)
    return problems.random_images(64)


def config(problem, method, **options):
    name = {"mlp": "digits", "conv": "cifar10"}[problem]
    warmup = {"gamma_warmup": 0} if method == "hero" else {}
    return resolve(dataset=name, method=method, **SIZES, **warmup, **options)


def build(config, images):
    """A trainer of a network of the smallest size: 16 hidden units, or one convolution with BatchNorm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.models, "create", small)
        return compiled.build(config, images)


def small(name, num_classes, **options):
    if name == "mlp":
        return models.mlp(num_classes, hidden=(16,), **options)
    return resnet.CifarResNet(0, num_classes, **options)


@functools.cache
def curve(problem, method, **options):
    """The losses of 8 steps and the result of a run."""
    run, losses = config(problem, method, **options), []
    trainer = build(run, dataset(problem))

    def step(*arguments, **options):
        state, loss = trainer.step(*arguments, **options)
        losses.append(loss)
        return state, loss

    result = loop.train(run, dataset(problem), trainer=trainer._replace(step=step))
    return np.array(jax.device_get(losses)), result


def assert_same(actual, expected):
    """Curves, parameters, statistics and accuracy agree to float32 tolerance."""
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    problems.assert_close(actual[1].variables, expected[1].variables, rtol=1e-4)
    assert actual[1].metrics["accuracy"] == expected[1].metrics["accuracy"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("problem", "method"), [("mlp", "sgd"), ("conv", "hero")])
def test_eight_devices_equal_one(problem, method, layout):
    assert_same(curve(problem, method, **LAYOUTS[layout]), curve(problem, method))


@pytest.mark.parametrize("layout", ["pmap", "shard_map", "sharded"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("msam", {"rho": 0.5}),
        ("nso", {"sigma": 0.05}),
        ("sam", {"rho": 0.5, "ascent_decay": 0.9, "ascent_batch_size": 8, "suppress": 0.5}),
    ],
)
def test_cheaper_methods_on_several_devices_equal_one(method, options, layout):
    found = curve("mlp", method, devices=4, **options, **LAYOUTS[layout])
    assert_same(found, curve("mlp", method, **options))
    assert np.abs(found[0] / curve("mlp", "sgd")[0] - 1).max() > 1e-3


def test_the_curves_that_are_compared_tell_methods_and_seeds_apart():
    losses = curve("mlp", "hero")[0]
    for other in (curve("mlp", "sgd"), curve("mlp", "hero", seed=1)):
        assert np.abs(other[0] / losses - 1).max() > 1e-2


def test_fewer_devices_than_there_are():
    found = curve("mlp", "hero", parallel="pmap", devices=2)
    assert_same(found, curve("mlp", "hero"))
    assert build(config("mlp", "hero", parallel="pmap", devices=2), dataset("mlp")).layout.examples.num_devices == 2


@pytest.mark.parametrize(
    "options",
    [
        {"microbatch_size": 4},
        {"microbatch_size": 1, "parallel": "pmap"},
        {"microbatch_size": 1, "parallel": "shard_map"},
        {"microbatch_size": 4, "parallel": "jit"},
    ],
)
def test_microbatches_equal_the_whole_batch(options):
    assert_same(curve("mlp", "hero", **options), curve("mlp", "hero"))


def test_microbatches_take_an_eighth_of_the_memory():
    images = dataset("conv")

    def memory(microbatch_size):
        run = resolve(method="hero", dataset="cifar10", batch_size=64, epochs=1, microbatch_size=microbatch_size)
        trainer = build(run, images)
        arguments = (trainer.init(0), *trainer.layout.replicate(images.train), np.arange(64))
        compiled = jax.jit(trainer.step).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(
            x.nbytes for x in jax.tree.leaves(arguments[0].params)
        )

    (whole, _), (part, params) = memory(None), memory(8)
    # The gradients, vectors and normalised images of a step stay whole.
    assert part < whole / 8 + 10 * params + 2 * 64 * 8 * 8 * 3 * 4


@pytest.mark.parametrize("layout", ["none", "pmap", "sharded"])
def test_rematerialisation_changes_no_number(layout):
    options = LAYOUTS.get(layout, {})
    assert_same(curve("conv", "hero", remat=True, **options), curve("conv", "hero", **options))


@pytest.mark.parametrize("remat", [False, True])
def test_rematerialisation_is_in_every_pass(remat):
    """What it saves is the compiler's, and on CPU nothing: the program that is handed to it says what may be kept."""
    run = config("conv", "hero", remat=remat)
    trainer = build(run, dataset("conv"))
    arguments = (trainer.init(0), *trainer.layout.replicate(dataset("conv").train), np.arange(run.budget.batch_size))
    recomputed = str(jax.make_jaxpr(trainer.step)(*arguments)).count("remat2[")
    # The clean pass, and the perturbed one with its product.
    assert recomputed == (3 if remat else 0)


@pytest.mark.parametrize(
    ("problem", "layout"),
    [("conv", "groups"), *(("mlp", name) for name in ("none", "pmap", "shard_map", "hybrid"))],
)
def test_several_steps_in_one_call_equal_single_ones(problem, layout):
    """Calls of 3 and of 1 step an epoch; every second step with the penalty."""
    options = {"none": {}, "groups": {"groups": 8, "sync": False}, **LAYOUTS}[layout] | {"interval": 2, "gamma": 30.0}
    run = config(problem, "hero", steps_per_call=3, **options)
    trainer = build(run, dataset(problem))

    def step(*_, **__):
        raise AssertionError("not one by one")

    found = loop.train(run, dataset(problem), trainer=trainer._replace(step=step))
    problems.assert_close(found.variables, curve(problem, "hero", **options)[1].variables, rtol=1e-4)
    # The same on every layout, so that one of each problem is compiled.
    plain = {**options, "interval": 1} if problem == "conv" else {"gamma": 30.0}
    every_step = curve(problem, "hero", **plain)[1].variables["params"]["head"]["kernel"]
    assert np.abs(every_step - found.variables["params"]["head"]["kernel"]).max() > 1e-4


def test_penalty_of_a_part_of_the_batch_is_the_same_on_every_layout():
    options = {"gamma": 30.0, "penalty_batch_size": 8}
    expected = curve("mlp", "hero", **options)
    for layout in (LAYOUTS[name] for name in ("pmap", "shard_map", "hybrid")):
        assert_same(curve("mlp", "hero", devices=4, **options, **layout), expected)
    assert_same(curve("mlp", "hero", microbatch_size=4, **options), expected)
    whole = curve("mlp", "hero", gamma=30.0)[0]
    assert np.abs(expected[0] / whole - 1).max() > 1e-4


def test_interval_leaves_the_penalty_out_of_the_steps_between():
    every, second, never = (curve("mlp", "hero", gamma=1e3, interval=k)[0] for k in (1, 2, 100))
    # The penalty of step 0 shows in the loss of step 1.
    np.testing.assert_array_equal(every[:2], second[:2])
    np.testing.assert_array_equal(second[:2], never[:2])
    assert np.abs(every[2] / second[2] - 1) > 1e-4
    np.testing.assert_array_equal(second[2], never[2])
    assert np.abs(second[3] / never[3] - 1) > 1e-4


def test_batch_norm_under_pmap_is_that_of_the_whole_batch_up_to_the_third_derivative(x64):
    images = jax.random.normal(jax.random.key(0), (16, 6, 5, 3), jnp.float64)
    labels = jnp.arange(16) % 3

    def direction(axis_name, images, labels):
        model = resnet.CifarResNet(0, 3, axis_name=axis_name)
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(1), images))
        params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}

        def loss_fn(params):
            logits, new = model.apply({"params": params} | statistics, images, train=True, mutable=["batch_stats"])
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean(), new

        grad_fn = jax.grad(lambda params: loss_fn(params)[0])
        tx = hero_jax.hero(0.3, 20.0, penalty="hvp", axis_name=axis_name)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0], loss_fn(params)[1]

    expected = jax.jit(functools.partial(direction, None))(images, labels)
    by_device = images.reshape(8, 2, 6, 5, 3), labels.reshape(8, 2)
    found = jax.pmap(functools.partial(direction, "data"), axis_name="data", out_axes=None)(*by_device)
    problems.assert_close(found, expected, rtol=1e-9)


def test_processes_agree_after_what_is_in_flight(monkeypatch):
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), x))
    made = slow(jnp.eye(500)).block_until_ready()
    seen = []

    def allgather(urgency):
        seen.append(made.is_ready())
        return np.array([urgency, 3])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(layouts.multihost_utils, "process_allgather", allgather)
    made = slow(jnp.eye(500))
    assert layouts.agreed(1, after={"made": made}) == 3
    assert seen == [True]


def test_the_clock_asks_after_the_steps_that_were_called(monkeypatch):
    asked = []

    def agreed(urgency, after=None):
        asked.append(after if after is None else int(after.step))
        return urgency

    monkeypatch.setattr(layouts, "agreed", agreed)
    loop.train(resolve(method="sgd", epochs=1, batch_size=256), data.load("digits"))
    assert [step for step in asked if step is not None] == [1, 2, 3, 4, 5]


class TestTwoProcesses:
    def test_equal_one_device(self, tmp_path):
        outputs = run_two([sys.executable, "-c", PROCESS], lambda address, i: [address, str(i), str(tmp_path)])
        assert [code for code, _ in outputs] == [0, 0], outputs
        for layout, (method, _) in OF_PROCESSES.items():
            losses, result = curve("conv", method)
            for process in range(2):
                found = np.load(tmp_path / f"{layout}-{process}.npz")
                np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
                leaves = [found[str(i)] for i in range(len(found) - 1)]
                problems.assert_close(leaves, jax.tree.leaves(result.variables), rtol=1e-4)

    def test_the_command_leaves_one_run_folder_that_one_device_can_read(self, tmp_path):
        out = tmp_path / "run"
        options = ["--method", "sgd", "--epochs", "2", "--train-size", "256", "--parallel", "jit"]
        command = [sys.executable, "-m", "experiments.train", *options, "--out", str(out)]
        outputs = run_two(command, process_flags)
        assert [code for code, _ in outputs] == [0, 0], outputs
        assert ["test accuracy" in text for _, text in outputs] == [True, False]
        assert json.loads((out / "environment.json").read_text())["device"]["processes"] == 2
        read, trainer, variables, images = compiled.load(out, None, None)
        assert read.layout.parallel == "none"
        one = loop.train(read, images, trainer=trainer)
        problems.assert_close(variables, one.variables, rtol=1e-4)
        np.testing.assert_allclose(runs.read_metrics(out)[-1]["loss"], one.metrics["loss"], rtol=1e-5)

    @pytest.mark.ends
    def test_the_other_stops_with_a_message_when_one_dies(self, tmp_path):
        out = tmp_path / "run"
        code = (
            "from experiments import cli, train; from experiments.training import layouts;"
            " layouts.HEARTBEAT_TIMEOUT = 10; cli.run(train.main)"
        )
        options = ["--method", "sgd", "--epochs", "100000", "--parallel", "pmap", "--save-minutes", "0.001"]

        def kill_one(processes):
            wait_for(lambda: problems.last_step(out) > 0)
            processes[1].kill()

        command = [sys.executable, "-c", code, *options, "--out", str(out)]
        outputs = run_two(command, process_flags, kill_one)
        assert outputs[0][0] not in (0, None)
        assert "another task died" in outputs[0][1] or "processes is gone" in outputs[0][1]
        # What is left continues on one device.
        stopped = resolve(**json.loads((out / "config.json").read_text())).replace(parallel="none")
        with runs.RunFolder(out, stopped, stopped.may_differ()) as folder:
            before = problems.last_step(out)
            last = stopped.replace(max_minutes=1e-9)
            loop.train(last, data.load("digits"), folder)
            assert problems.last_step(out) == before + 1

    @pytest.mark.ends
    def test_the_other_waits_for_a_slow_last_checkpoint(self, tmp_path):
        code = """
import time
from experiments import cli, train
from experiments.storage import runs
from experiments.training import layouts
save, layouts.SHUTDOWN_TIMEOUT = runs.RunFolder.save, 3
def slow_save(*arguments):
    time.sleep(10)
    save(*arguments)
runs.RunFolder.save = slow_save
cli.run(train.main)
"""
        out = tmp_path / "run"
        options = ["--method", "sgd", "--epochs", "1", "--train-size", "64", "--parallel", "pmap", "--out", str(out)]
        outputs = run_two([sys.executable, "-c", code, *options], process_flags)
        assert [code for code, _ in outputs] == [0, 0], outputs
        assert json.loads((out / "status.json").read_text())["status"] == "done"
        assert problems.last_step(out) == 1

    @pytest.mark.ends
    def test_a_signal_to_one_ends_both_with_a_checkpoint(self, tmp_path):
        out = tmp_path / "run"
        command = [sys.executable, "-m", "experiments.train", "--method", "sgd", "--epochs", "100000"]
        options = ["--parallel", "pmap", "--save-minutes", "0.001", "--out", str(out)]

        def end_one(processes):
            wait_for(lambda: problems.last_step(out) > 0)
            processes[1].send_signal(signal.SIGTERM)

        outputs = run_two([*command, *options], process_flags, end_one)
        assert [code for code, _ in outputs] == [130, 130], outputs
        assert json.loads((out / "status.json").read_text())["status"] == "interrupted"
        runs.load_variables(out)

    def test_continue_what_one_device_began(self, tmp_path):
        """Process 0 alone has the folder."""
        out, options = tmp_path / "run", ["--method", "sgd", "--epochs", "2", "--train-size", "256"]
        begun = resolve("sgd", epochs=2, train_size=256, max_minutes=1e-9)
        images = data.subset(data.load("digits"), 256, 0)
        trainer = compiled.build(begun, images)
        with runs.RunFolder(out, begun, begun.may_differ()) as folder:
            loop.train(begun, images, folder, trainer=trainer)
        assert problems.last_step(out) == 1
        whole = loop.train(begun.replace(max_minutes="never"), images, trainer=trainer)
        command = [sys.executable, "-m", "experiments.train", *options, "--parallel", "pmap", "--out", str(out)]
        outputs = run_two(command, process_flags)
        assert [code for code, _ in outputs] == [0, 0], outputs
        assert "continuing after step 1" in outputs[0][1]
        problems.assert_close(runs.load_variables(out), whole.variables, rtol=1e-4)


def process_flags(address, process):
    return ["--coordinator", address, "--num-processes", "2", "--process-id", str(process)]


def run_two(command, flags, meanwhile=lambda processes: None):
    """Runs two processes of 4 devices each; returns (exit status, all output) of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start([*command, *flags(address, i)], devices=4) for i in range(2)]
    try:
        meanwhile(processes)
        texts = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def start(command, devices):
    # Of two that are the same the last counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError(condition)


class TestMSharpness:
    @pytest.mark.parametrize(("problem", "method"), [("mlp", "hero"), ("conv", "hero")])
    def test_groups_on_one_device_equal_devices(self, problem, method):
        groups = curve(problem, method, sync=False, groups=8)
        for parallel in ("pmap", "shard_map"):
            assert_same(groups, curve(problem, method, sync=False, parallel=parallel))
        whole = curve(problem, method)[0]
        assert np.abs(groups[0] / whole - 1).max() > 1e-4

    def test_without_batch_norm_and_perturbation_there_is_nothing_to_differ(self):
        assert_same(curve("mlp", "sgd", sync=False, groups=4), curve("mlp", "sgd"))

    def test_running_statistics_are_the_mean_over_groups(self):
        images = dataset("conv")._replace(pixels=dataset("conv").pixels._replace(augment=False))
        trainer = build(config("conv", "hero", sync=False, groups=4), images)
        state = trainer.init(0)
        before = {"params": runs.snapshot(state.params), "batch_stats": runs.snapshot(state.batch_stats)}
        batch = images.train.images[:16]
        parts = [trainer.statistics(before, part) for part in batch.reshape(4, 4, 8, 8, 3)]
        after, _ = trainer.step(state, *trainer.layout.replicate(images.train), np.arange(16))
        problems.assert_close(after.batch_stats, jax.tree.map(lambda *x: sum(x) / 4, *parts), rtol=1e-5)
        whole = trainer.statistics(before, batch)["bn"]["var"]
        assert np.abs(after.batch_stats["bn"]["var"] / whole - 1).max() > 1e-4


@pytest.mark.parametrize(("layout", "sharing"), [("sharded", 8), ("hybrid", 4)])
def test_sharded_parameters_and_optimizer_state_stay_split(layout, sharing):
    images = dataset("mlp")
    trainer = build(config("mlp", "hero", **LAYOUTS[layout]), images)
    state = trainer.init(0)
    for _ in range(2):
        for tree in (state.params, state.opt_state):
            for leaf in jax.tree.leaves(tree):
                is_split = any(size and size % sharing == 0 for size in leaf.shape)
                sizes = {shard.data.size for shard in leaf.addressable_shards}
                assert sizes == {leaf.size // sharing if is_split else leaf.size}
        kernel = state.params["dense1"]["kernel"]
        assert kernel.shape == (64, 16)
        assert kernel.addressable_shards[0].data.shape == (64 // sharing, 16)  # the largest axis
        # Neighbours share a copy.
        assert [shard.index[0].start or 0 for shard in kernel.addressable_shards] == [
            i % sharing * (64 // sharing) for i in range(8)
        ]
        state, _ = trainer.step(state, *trainer.layout.replicate(images.train), np.arange(16))
    copied = build(config("mlp", "hero", parallel="jit"), images).init(0)
    assert copied.params["dense1"]["kernel"].addressable_shards[0].data.shape == (64, 16)


def test_rows_of_a_batch_are_altered_as_in_the_whole_batch():
    images = jax.random.uniform(jax.random.key(0), (12, 6, 5, 2))
    whole = data.crop_and_flip(jax.random.key(1), images)
    for first_row in (0, 4, 8):
        part = images[first_row : first_row + 4]
        part = data.crop_and_flip(jax.random.key(1), part, batch_size=12, first_row=first_row)
        np.testing.assert_array_equal(part, whole[first_row : first_row + 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parallel": "jitt"},
            r"`parallel` must be one of 'none', 'pmap', 'shard_map', 'jit'; got 'jitt'. Did you mean 'jit'",
        ),
        ({"devices": 2}, r"`devices` must be 1 with parallel 'none'; got 2"),
        ({"devices": 0, "parallel": "jit"}, r"`devices` must be an integer >= 1; got 0"),
        ({"shard_params": True}, r"`shard_params` needs parallel 'jit'; got parallel 'none'"),
        ({"shard_params": True, "parallel": "pmap"}, r"`shard_params` needs parallel 'jit'; got parallel 'pmap'"),
        ({"shard_devices": 2, "parallel": "jit"}, r"`shard_devices` has no effect without `shard_params`; got 2"),
        ({"shard_devices": 0, "parallel": "jit"}, r"`shard_devices` must be an integer >= 1; got 0"),
        ({"sync": False}, r"`sync` must be True on one device without `groups` to differ; got False and groups 1"),
        ({"sync": False, "parallel": "jit"}, r"`sync` must be True with parallel 'jit', where .*; got False"),
        ({"groups": 4}, r"`groups` needs sync False and parallel 'none' .*; got 4 with sync True and parallel 'none'"),
        ({"groups": 4, "sync": False, "parallel": "pmap"}, r"`groups` needs .*; got 4 with .* parallel 'pmap'"),
        ({"groups": 0}, r"`groups` must be an integer >= 1; got 0"),
        ({"method": "sam", "interval": 2}, r"`interval` has no effect on method 'sam'; got 2"),
        ({"method": "sam", "penalty_batch_size": 2}, r"`penalty_batch_size` has no effect on method 'sam'; got 2"),
        ({"interval": 0}, r"`interval` must be an integer >= 1; got 0"),
        ({"microbatch_size": 0}, r"`microbatch_size` must be an integer >= 1; got 0"),
        ({"steps_per_call": 0}, r"`steps_per_call` must be an integer >= 1; got 0"),
        ({"max_minutes": 0.0}, r"`max_minutes` must be positive and finite; got 0.0"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "pmap", "batch_size": 20}, r"`batch_size` must be a multiple of the 8 devices; got 20"),
        ({"parallel": "jit", "devices": 3}, r"`batch_size` must be a multiple of the 3 devices; got 16"),
        ({"microbatch_size": 6}, r"`microbatch_size` must divide the 16 images of a part; got 6"),
        ({"microbatch_size": 4, "parallel": "pmap"}, r"`microbatch_size` must divide the 2 images of a part; got 4"),
        ({"penalty_batch_size": 6}, r"`penalty_batch_size` must be 16 / k where k divides the 16 images .*; got 6"),
        ({"penalty_batch_size": 4, "parallel": "pmap"}, r"must be 16 / k where k divides the 2 images .*; got 4"),
        ({"penalty_batch_size": 4, "microbatch_size": 8}, r"`microbatch_size` must divide the 4 images .*; got 8"),
        ({"sync": False, "groups": 5}, r"`batch_size` must be a multiple of the 5 groups; got 16"),
        ({"parallel": "jit", "devices": 16}, r"`devices` must be at most 8, which is what there is; got 16"),
        ({"parallel": "pmap", "devices": 1, "sync": False}, r"`sync` must be True on 1 device: .*; got False"),
        (
            {"parallel": "jit", "shard_params": True, "shard_devices": 3},
            r"`shard_devices` must divide the 8 devices; got 3",
        ),
    ],
)
def test_layouts_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        compiled.build(resolve(**{**SIZES, **options}), dataset("mlp"))


def test_layouts_that_do_not_fit_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"`parallel` must be 'pmap', 'shard_map' or 'jit' with 2 processes; got 'none'"
    ):
        layouts.Layout(config("mlp", "sgd"))
    with pytest.raises(ValueError, match=r"`devices` must be all 8 of the 2 processes; got 4"):
        layouts.Layout(config("mlp", "sgd", parallel="pmap", devices=4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1234", 2, None), r"`coordinator`, `num_processes` and `process_id` go together; process_id is missing"),
        ((None, 2, 0), r"`coordinator`, `num_processes` and `process_id` go together; coordinator is missing"),
        (("host", 2, 0), r"`coordinator` must be HOST:PORT; got 'host'"),
        (("host:1234", 0, 0), r"`num_processes` must be an integer >= 1; got 0"),
        (("host:1234", 2, 2), r"`process_id` must be an integer in 0..1; got 2"),
        ((None, None, 1, True), r"`process_id` has no effect with `distributed`, which asks the cluster; got 1"),
    ],
)
def test_process_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(ValueError, match=message):
        layouts.join(*flags)


def test_a_cluster_that_is_not_there():
    command = [sys.executable, "-m", "experiments.train", "--distributed", "--parallel", "pmap"]
    process = start(command, devices=1)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "error: `distributed` needs a cluster that JAX knows; got none" in text

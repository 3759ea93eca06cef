"""The trainer and its run folders: what is in them, divergence, BatchNorm statistics, reproducibility."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from experiments import data, methods, runs
from experiments import train as training
from experiments import trainer as trainers
from experiments.config import METHODS, PRESETS, TAKES, TrainConfig
from hero_jax.models import resnet
from tests import problems


@pytest.fixture(scope="module")
def digits():
    return data.subset(data.load("digits"), 256, 0)


def short(**options):
    return TrainConfig(**{"epochs": 2, "batch_size": 64, **options}).resolved()


@pytest.fixture(scope="module")
def sgd(digits):
    """A configuration and its trainer, compiled once."""
    config = short(method="sgd", epochs=4)
    return config, trainers.build(config, digits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits(digits, method):
    rows = []
    result = training.train(short(method=method, epochs=8), digits, report=rows.append)
    assert result.metrics["accuracy"] > 0.7
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert [row["epoch"] for row in rows] == list(range(1, 9))


@pytest.mark.parametrize("dataset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_fills_every_field_its_method_has(dataset, method):
    config = TrainConfig(method=method, dataset=dataset).resolved()
    for name in ("model", "epochs", "batch_size", "learning_rate", "weight_decay", *TAKES[method]):
        assert getattr(config, name) is not None or name == "penalty_batch_size"
    assert config.resolved() == config
    tx = methods.optimizer(config, 10)
    assert isinstance(tx.init({"w": jnp.ones((2, 3))})[0], hero_jax.HeroState | optax.EmptyState)


def test_given_values_win_over_presets():
    config = TrainConfig(method="hero", rho=0.7, epochs=3).resolved()
    assert (config.rho, config.epochs) == (0.7, 3)
    assert config.gamma == PRESETS["digits"]["methods"]["hero"]["gamma"]


def test_gamma_is_off_for_the_warmup_epochs_and_the_perturbation_is_not(digits):
    rows = []
    training.train(short(epochs=3, gamma_warmup=2), digits, report=rows.append)
    assert [row["penalty_grad_norm"] > 0 for row in rows] == [False, False, True]
    assert all(row["perturbation_norm"] > 0 for row in rows)


def test_learning_rate_falls_by_epochs_to_zero():
    config = short(method="sgd", epochs=4, learning_rate=0.2, weight_decay=0.0)
    tx = methods.optimizer(config, steps_per_epoch=5)
    state, params, rates = tx.init(jnp.ones(1)), jnp.ones(1), []
    trace = 0.0
    for _ in range(20):
        updates, state = tx.update(jnp.ones(1), state, params)
        trace = 0.9 * trace + 1
        rates.append(-float(updates[0]) / trace)
    expected = np.repeat(0.2 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, 5)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_weight_decay_is_taken_at_the_weights_on_all_parameters():
    config = short(method="hero", learning_rate=1.0, weight_decay=0.25, gamma_warmup=0)
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.full((2,), 2.0)}
    tx = methods.optimizer(config, steps_per_epoch=5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, grad_fn=lambda p: zero)
    np.testing.assert_allclose(updates["w"], -0.75)
    np.testing.assert_allclose(updates["b"], -0.5)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A finished run: (folder, config, result)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = short(epochs=3, eval_every=2)
    with runs.RunFolder(folder, config) as out:
        result = training.train(config, digits, out)
    return folder, config, result


class TestRunFolder:
    def test_holds_config_environment_and_status(self, run):
        folder, config, _ = run
        assert json.loads((folder / "config.json").read_text()) == dataclasses.asdict(config)
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["versions"]["jax"] == jax.__version__
        assert environment["device"]["platform"] == jax.devices()[0].platform
        assert environment["commit"]
        assert json.loads((folder / "status.json").read_text())["status"] == "done"

    def test_metrics_have_one_line_an_evaluation(self, run):
        folder, _, result = run
        rows = runs.read_metrics(folder)
        assert [row["epoch"] for row in rows] == [2, 3]
        assert [row["step"] for row in rows] == [8, 12]
        assert rows[-1]["accuracy"] == result.metrics["accuracy"]
        assert {"loss", "train_loss", *hero_jax.Metrics._fields} <= set(rows[-1])

    def test_half_a_line_is_dropped(self, run, tmp_path):
        text = (run[0] / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").write_text(text + '{"epoch": 4, "acc')
        assert len(runs.read_metrics(tmp_path)) == 2

    def test_checkpoint_gives_the_weights_back(self, run, digits):
        folder, config, result = run
        variables = runs.load_variables(folder)
        jax.tree.map(np.testing.assert_array_equal, variables["params"], result.variables["params"])
        trainer = trainers.build(config, digits)
        assert trainer.evaluate(variables, digits.test) == result.metrics

    def test_without_a_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="`run` must be a run folder with a checkpoint"):
            runs.load_variables(tmp_path)


def test_divergence_ends_with_a_message_and_keeps_the_last_good_checkpoint(digits, sgd, tmp_path):
    config, trainer = sgd

    def failing_step(state, *rest, **options):
        step = int(state.step)
        state, loss = trainer.step(state, *rest, **options)
        return state, loss * jnp.nan if step == 6 else loss

    message = r"The loss of sgd stopped being finite at step 7 \(epoch 2\); the one before was \d"
    with pytest.raises(training.Diverged, match=message), runs.RunFolder(tmp_path / "run", config) as folder:
        training.train(config, digits, folder, trainer=trainer._replace(step=failing_step))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "diverged"
    assert "step 7" in status["message"]
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["4"]
    kept = runs.load_variables(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


def test_weights_that_are_not_finite_are_not_saved(digits, sgd, tmp_path):
    """The loss of a step precedes its update."""
    config, trainer = sgd

    def failing_step(state, *rest, **options):
        state, loss = trainer.step(state, *rest, **options)
        params = jax.tree.map(lambda x: jnp.where(state.step == 8, jnp.inf, x), state.params)
        return state._replace(params=params), loss

    message = r"The weights of sgd stopped being finite by step 8\. The last good state is that of step 4"
    with pytest.raises(training.Diverged, match=message), runs.RunFolder(tmp_path / "run", config) as folder:
        training.train(config, digits, folder, trainer=trainer._replace(step=failing_step))
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["4"]


def test_interruption_at_once_saves_the_last_evaluated_state(digits, sgd, tmp_path):
    config, trainer = sgd

    def interrupted_step(state, *rest, **options):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return trainer.step(state, *rest, **options)

    with pytest.raises(KeyboardInterrupt), runs.RunFolder(tmp_path / "run", config) as folder:
        training.train(config, digits, folder, trainer=trainer._replace(step=interrupted_step))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["4"]


def test_same_seed_gives_the_same_run_and_another_seed_another(digits):
    trainer = trainers.build(short(), digits)
    first, again, other = (training.train(short(seed=seed), digits, trainer=trainer) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    assert not np.allclose(first.variables["params"]["head"]["kernel"], other.variables["params"]["head"]["kernel"])


def test_batch_statistics_are_those_of_the_clean_pass(monkeypatch):
    """After one step from the same weights, HERO and SGD have the same running statistics and other weights."""
    monkeypatch.setattr(trainers.models, "create", lambda _, num_classes: resnet.CifarResNet(0, num_classes))
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int32) % 10)
    images = data.Dataset(split, split, 10, data.Pixels(255.0, (0.5,) * 3, (0.25,) * 3, augment=True))
    sgd, hero = (
        trainers.build(TrainConfig(method=method, dataset="cifar10", batch_size=8, epochs=1).resolved(), images)
        for method in ("sgd", "hero")
    )
    after = [trainer.step(trainer.init(0), *split, np.arange(8))[0] for trainer in (sgd, hero)]
    problems.assert_close(after[1].batch_stats, after[0].batch_stats, rtol=1e-5)
    initial = sgd.init(0).batch_stats["bn"]["mean"]
    assert np.abs(after[1].batch_stats["bn"]["mean"] - initial).max() > 1e-3
    kernels = [state.params["head"]["kernel"] for state in after]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_bfloat16_is_for_the_step_alone(digits):
    """Weights differ by its rounding and stay float32; what is measured of the same weights does not differ."""
    built = [trainers.build(short(dtype=dtype), digits) for dtype in ("float32", "bfloat16")]
    images, labels = built[0].layout.replicate(digits.train)
    states = [trainer.step(trainer.init(0), images, labels, np.arange(64))[0] for trainer in built]
    before = built[0].init(0).params["dense1"]["kernel"]
    moves = [np.asarray(state.params["dense1"]["kernel"] - before) for state in states]
    assert {x.dtype for x in jax.tree.leaves(states[1].params)} == {np.dtype("float32")}
    assert 1e-4 < np.linalg.norm(moves[1] - moves[0]) / np.linalg.norm(moves[0]) < 0.1
    variables = {"params": states[0].params, "batch_stats": {}}
    assert built[0].evaluate(variables, digits.test) == built[1].evaluate(variables, digits.test)
    products = []
    for trainer in built:
        matvec, example = trainer.hessian(variables, digits.train)
        products.append(matvec(example))
    chex.assert_trees_all_equal(*products)


def test_evaluation_masks_the_last_batch(digits, sgd, monkeypatch):
    config, trainer = sgd
    state = trainer.init(0)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    whole = trainer.evaluate(variables, digits.test)
    monkeypatch.setattr(trainers, "EVAL_BATCH", 50)  # 364 = 7 * 50 + 14
    parts = trainers.build(config, digits).evaluate(variables, digits.test)
    assert whole["accuracy"] == parts["accuracy"]
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "heroo"}, r"`method` must be one of .*; got 'heroo'. Did you mean 'hero'"),
        ({"dataset": "digit"}, r"`dataset` must be one of .* Did you mean 'digits'"),
        ({"model": "resnet22"}, r"`model` must be one of .* Did you mean 'resnet32'|'resnet20'"),
        ({"penalty": "eigen"}, r"`penalty` must be one of .* Did you mean 'eigenvalue'"),
        ({"epochs": 0}, r"`epochs` must be an integer >= 1; got 0"),
        ({"seed": -1}, r"`seed` must be an integer >= 0; got -1"),
        ({"rho": -0.5}, r"`rho` must be non-negative and finite; got -0.5"),
        ({"save_minutes": -1.0}, r"`save_minutes` must be non-negative and finite; got -1.0"),
        ({"learning_rate": float("nan")}, r"`learning_rate` must be non-negative and finite; got nan"),
        ({"method": "sgd", "rho": 0.1}, r"`rho` has no effect on method 'sgd'; got 0.1"),
        ({"dtype": "float16"}, r"`dtype` must be one of 'float32', 'bfloat16'; got 'float16'. Did you mean 'bfloat16'"),
        ({"method": "sam", "gamma": 0.1}, r"`gamma` has no effect on method 'sam'; got 0.1"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_batch_larger_than_the_data(digits):
    with pytest.raises(ValueError, match=r"`batch_size` must be at most the 256 training images; got 300"):
        trainers.build(short(batch_size=300), digits)

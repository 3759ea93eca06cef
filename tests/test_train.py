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
from experiments import data
from experiments.config import LABEL_NOISE_KINDS, METHODS, presets, resolve
from experiments.config import methods as configured
from experiments.config.fields import types_of
from experiments.data import label_noise
from experiments.storage import runs
from experiments.training import compiled, loop, methods
from hero_jax import curvature, models, quantize
from hero_jax.models import resnet
from tests import problems


@pytest.fixture(scope="module")
def digits():
    return data.subset(data.load("digits"), 256, 0)


def short(**options):
    return resolve(**{"epochs": 2, "batch_size": 64, **options})


@pytest.fixture(scope="module")
def sgd(digits):
    """A configuration and its trainer, compiled once."""
    config = short(method="sgd", epochs=4)
    return config, compiled.build(config, digits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits(digits, method):
    rows = []
    result = loop.train(short(method=method, epochs=8), digits, report=rows.append)
    assert result.metrics["accuracy"] > 0.7
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert [row["epoch"] for row in rows] == list(range(1, 9))


# What a method takes and leaves out unless it is given.
OPTIONAL = {
    "noise": {"ema_decay"},
    "nso": {"noise_bits", "ema_decay"},
    "sam": {"noise_bits", "ema_decay", "ascent_decay", "ascent_batch_size"},
    "grad_l1": {"noise_bits", "ema_decay", "penalty_batch_size"},
}
OPTIONAL["asam"] = OPTIONAL["sam"]
OPTIONAL["hero"] = OPTIONAL["sam"] | OPTIONAL["grad_l1"]


@pytest.mark.parametrize("dataset", presets.DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_fills_every_field_its_method_has(dataset, method):
    config = resolve(method=method, dataset=dataset)
    filled = config.flat()
    assert {"model", "epochs", "batch_size", "learning_rate", "weight_decay"} <= filled.keys()
    assert None not in filled.values()
    taken = {name for name in filled if name in configured.SETTINGS}
    assert taken == set(types_of(METHODS[method]))
    assert {name for name in taken if filled[name] in ("none", "all")} == OPTIONAL.get(method, set())
    assert resolve(**filled) == config
    tx = methods.optimizer(config, 10)
    assert isinstance(tx.init({"w": jnp.ones((2, 3))})[0], hero_jax.HeroState | hero_jax.NsoState | optax.EmptyState)


def test_given_values_win_over_presets():
    config = resolve(method="hero", rho=0.7, epochs=3)
    assert (config.method.rho, config.budget.epochs) == (0.7, 3)
    assert config.method.gamma == presets.DATASETS["digits"]["methods"]["hero"]["gamma"]
    assert resolve(dataset="cifar10", model="vgg19_bn").optimizer.learning_rate == 0.05
    assert resolve(dataset="cifar10", model="vgg19_bn", learning_rate=0.1).optimizer.learning_rate == 0.1
    assert resolve(penalty="eigenvalue").method.gamma != config.method.gamma


def test_presets_name_what_there_is():
    assert set(presets.DATASETS) == set(data.DATASETS)
    for preset in presets.DATASETS.values():
        assert {preset["model"], *preset.get("models", {})} <= set(models.MODELS)
        assert set(preset["methods"]) == set(METHODS) - {"sgd"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ema", "ema_decay": 1.5}, "`ema_decay` must be between 0 and 1; got 1.5"),
        ({"label_noise": -0.1}, "`label_noise` must be between 0 and 1; got -0.1"),
        ({"label_noise_kind": "random"}, "`label_noise_kind` must be one of .* got 'random'"),
        ({"scope": "layer"}, "`scope` must be one of 'global', 'leaf'; got 'layer'"),
        ({"reduction": "max"}, "`reduction` must be one of 'mean', 'sum'; got 'max'"),
        ({"noise_bits": 1}, "`noise_bits` must be an integer in 2..16; got 1"),
        ({"method": "sgd", "noise_bits": 3}, "`noise_bits` has no effect on method 'sgd'; got 3"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_refuses_the_name_of_another(method):
    other = next(name for name in METHODS if name != method)
    with pytest.raises(ValueError, match=rf"`method` must be '{method}' in \w+; got '{other}'"):
        dataclasses.replace(resolve(method).method, method=other)


@pytest.mark.parametrize(("field", "values"), [("scope", ("global", "leaf")), ("reduction", ("mean", "sum"))])
def test_settings_of_the_transformation_reach_it(digits, field, values):
    steps = []
    for value in values:
        trainer = compiled.build(short(gamma_warmup=0, **{field: value}), digits)
        steps.append(trainer.step(trainer.init(0), *digits.train, np.arange(64))[0].params)
    assert not np.allclose(steps[0]["dense1"]["kernel"], steps[1]["dense1"]["kernel"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("method", "around"), [("noise", "sgd"), ("asam", "asam")])
def test_noise_moves_the_point_of_every_pass_and_not_the_weights(digits, method, around):
    """The step is that of the method on the loss w -> L(w + u), with u drawn anew in every step."""
    config = short(method=method, noise_bits=2)
    trainer = compiled.build(config, digits)
    apply = models.create("mlp", 10).apply
    tx = methods.optimizer(short(method=around), 4)
    state, key = trainer.init(0), jax.random.split(jax.random.key(0))[1]
    params, opt_state = jax.tree.map(jnp.copy, state.params), tx.init(state.params)
    draws = []
    for step, indices in enumerate((np.arange(64), np.arange(64, 128))):
        u = quantize.rounding_noise(
            params, 2, jax.random.fold_in(jax.random.fold_in(key, step), 2), spec=quantize.named("channel-narrow")
        )
        draws.append(u)
        x, y = data.normalize(digits.train.images[indices], digits.pixels), digits.train.labels[indices]

        def loss(p, x=x, y=y, u=u):
            logits = apply({"params": optax.tree.add(p, u)}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params, grad_fn=jax.grad(loss))
        state, _ = trainer.step(state, *digits.train, indices)
        params = optax.apply_updates(params, updates)
        problems.assert_close(state.params, params, rtol=1e-4)
    assert not np.allclose(draws[0]["dense1"]["kernel"], draws[1]["dense1"]["kernel"])


@pytest.mark.parametrize("method", ["ema", "sam"])
def test_ema_evaluates_and_saves_the_average_of_the_steps(method, digits, tmp_path):
    config = short(method=method, epochs=2, ema_decay=0.6)
    trainer = compiled.build(config, digits)
    state = trainer.init(0)
    average = runs.snapshot(state.params)
    for step, indices in enumerate(
        np.concatenate([data.epoch_order(0, epoch, len(digits.train.labels), 64) for epoch in range(2)])
    ):
        state, _ = trainer.step(state, *digits.train, indices)
        beta = min(0.6, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, x, beta=beta: beta * a + (1 - beta) * x, average, runs.snapshot(state.params))
    with runs.RunFolder(tmp_path / "run", config) as folder:
        result = loop.train(config, digits, folder, trainer=trainer)
    problems.assert_close(result.variables["params"], average, rtol=1e-5)
    saved = runs.load_variables(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, saved["params"], result.variables["params"])
    assert trainer.evaluate(saved, digits.test) == result.metrics
    last = {"params": state.params, "batch_stats": state.batch_stats}
    assert trainer.evaluate(last, digits.test)["loss"] != result.metrics["loss"]


def test_ema_averages_the_statistics_of_batch_norm(monkeypatch):
    monkeypatch.setattr(compiled.models, "create", lambda _, num_classes: resnet.CifarResNet(0, num_classes))
    images = problems.random_images(16)
    config = resolve(method="ema", dataset="cifar10", batch_size=8, epochs=1)
    trainer = compiled.build(config, images)
    first = trainer.init(0)
    before = runs.snapshot(first.batch_stats)
    state = trainer.step(first, *images.train, np.arange(8))[0]
    expected = jax.tree.map(lambda a, x: 0.1 * a + 0.9 * x, before, runs.snapshot(state.batch_stats))
    problems.assert_close(state.averaged["batch_stats"], expected, rtol=1e-5)


class TestLabelNoise:
    def test_trains_on_altered_labels_and_tells_what_was_learnt(self, digits):
        config = short(method="sgd", epochs=30, label_noise=0.5, validation_size=0)
        rows = []
        result = loop.train(config, digits, report=rows.append)
        noisy = label_noise.alter(digits, 0.5, "symmetric", 0)
        is_altered = noisy.train.labels != noisy.true_labels
        assert is_altered.sum() == 128
        trainer = compiled.build(config, digits)
        variables = jax.tree.map(jnp.asarray, result.variables)
        predicted = np.argmax(trainer.forward(variables, jnp.asarray(noisy.train.images)), -1)
        np.testing.assert_allclose(rows[-1]["memorized"], (predicted == noisy.train.labels)[is_altered].mean())
        np.testing.assert_allclose(rows[-1]["recovered"], (predicted == noisy.true_labels)[is_altered].mean())
        # SGD recovers first and memorizes then.
        assert max(row["recovered"] for row in rows[:10]) > rows[-1]["recovered"] + 0.1
        assert rows[-1]["memorized"] > rows[4]["memorized"] + 0.2
        assert rows[-1]["accuracy"] == trainer.evaluate(variables, digits.test)["accuracy"]

    def test_kind_and_seed_reach_the_labels_and_none_alters_nothing(self, digits):
        kinds = [short(label_noise=0.3, label_noise_kind=kind) for kind in LABEL_NOISE_KINDS]
        others = [kinds[0].replace(seed=1), kinds[0].replace(label_noise=0.4)]
        labels = [compiled.with_label_noise(config, digits).train.labels for config in kinds + others]
        assert all((a != b).any() for i, a in enumerate(labels) for b in labels[:i])
        assert compiled.with_label_noise(short(), digits) is digits


def test_held_out_images_are_evaluated_beside_the_test_images(digits):
    images = data.subset(data.load("digits"), 128, 100)
    rows = []
    config = short(method="sgd", train_size=128, validation_size=100)
    result = loop.train(config, images, report=rows.append)
    trainer = compiled.build(config, images)
    variables = jax.tree.map(jnp.asarray, result.variables)
    for prefix, split in (("", images.test), ("validation_", images.validation)):
        for name, value in trainer.evaluate(variables, split).items():
            assert rows[-1][prefix + name] == value
    assert len(images.test.labels) == 364


def test_gamma_is_off_for_the_warmup_epochs_and_the_perturbation_is_not(digits):
    rows = []
    loop.train(short(epochs=3, gamma_warmup=2), digits, report=rows.append)
    assert [row["penalty_grad_norm"] > 0 for row in rows] == [False, False, True]
    assert all(row["perturbation_norm"] > 0 for row in rows)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_learning_rate_falls_by_epochs_to_its_floor(floor):
    config = short(method="sgd", epochs=4, learning_rate=0.2, learning_rate_floor=floor, weight_decay=0.0)
    tx = methods.optimizer(config, steps_per_epoch=5)
    state, params, rates = tx.init(jnp.ones(1)), jnp.ones(1), []
    trace = 0.0
    for _ in range(20):
        updates, state = tx.update(jnp.ones(1), state, params)
        trace = 0.9 * trace + 1
        rates.append(-float(updates[0]) / trace)
    expected = np.repeat(0.2 * (floor + (1 - floor) * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2), 5)
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
        result = loop.train(config, digits, out)
    return folder, config, result


class TestRunFolder:
    def test_holds_config_environment_and_status(self, run):
        folder, config, _ = run
        assert json.loads((folder / "config.json").read_text()) == config.flat()
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
        trainer = compiled.build(config, digits)
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
    with pytest.raises(loop.Diverged, match=message), runs.RunFolder(tmp_path / "run", config) as folder:
        loop.train(config, digits, folder, trainer=trainer._replace(step=failing_step))
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
    with pytest.raises(loop.Diverged, match=message), runs.RunFolder(tmp_path / "run", config) as folder:
        loop.train(config, digits, folder, trainer=trainer._replace(step=failing_step))
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["4"]


def test_interruption_at_once_saves_the_last_evaluated_state(digits, sgd, tmp_path):
    config, trainer = sgd

    def interrupted_step(state, *rest, **options):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return trainer.step(state, *rest, **options)

    with pytest.raises(KeyboardInterrupt), runs.RunFolder(tmp_path / "run", config) as folder:
        loop.train(config, digits, folder, trainer=trainer._replace(step=interrupted_step))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["4"]


def test_without_augmentation_images_are_as_they_are():
    images = problems.random_images(16)
    run = resolve(method="sgd", model="mlp", epochs=1, batch_size=8)
    off = run.replace(augment=False)
    plain = images._replace(pixels=images.pixels._replace(augment=False))
    cases = [(off, images), (run, plain), (run, images)]
    found, expected, cropped = (loop.train(r, compiled.subset(r, x)).metrics["loss"] for r, x in cases)
    assert found == expected != cropped


def test_same_seed_gives_the_same_run_and_another_seed_another(digits):
    trainer = compiled.build(short(), digits)
    first, again, other = (loop.train(short(seed=seed), digits, trainer=trainer) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    assert not np.allclose(first.variables["params"]["head"]["kernel"], other.variables["params"]["head"]["kernel"])


def test_batch_statistics_are_those_of_the_clean_pass(monkeypatch):
    """After one step from the same weights, HERO and SGD have the same running statistics and other weights."""
    monkeypatch.setattr(compiled.models, "create", lambda _, num_classes: resnet.CifarResNet(0, num_classes))
    images = problems.random_images(16)
    sgd, hero = (
        compiled.build(resolve(method=method, dataset="cifar10", batch_size=8, epochs=1), images)
        for method in ("sgd", "hero")
    )
    after = [trainer.step(trainer.init(0), *images.train, np.arange(8))[0] for trainer in (sgd, hero)]
    problems.assert_close(after[1].batch_stats, after[0].batch_stats, rtol=1e-5)
    initial = sgd.init(0).batch_stats["bn"]["mean"]
    assert np.abs(after[1].batch_stats["bn"]["mean"] - initial).max() > 1e-3
    kernels = [state.params["head"]["kernel"] for state in after]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_bfloat16_is_for_the_step_alone(digits):
    """Weights differ by its rounding and stay float32; what is measured of the same weights does not differ."""
    built = [compiled.build(short(dtype=dtype), digits) for dtype in ("float32", "bfloat16")]
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
        operator = trainer.hessian(variables, digits.train)
        products.append(operator(curvature.restrict(variables, {"params": True, "batch_stats": False})))
    chex.assert_trees_all_equal(*products)


def test_evaluation_masks_the_last_batch(digits, sgd, monkeypatch):
    config, trainer = sgd
    state = trainer.init(0)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    whole = trainer.evaluate(variables, digits.test)
    monkeypatch.setattr(compiled, "EVAL_BATCH", 50)  # 364 = 7 * 50 + 14
    parts = compiled.build(config, digits).evaluate(variables, digits.test)
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
        ({"method": "sam", "penalty": "eigenvalue"}, r"`penalty` has no effect on method 'sam'; got 'eigenvalue'"),
        ({"method": "nso", "sigma": "none"}, "`sigma` must be a number where noise_bits is not given; got 'none'"),
        (
            {"method": "nso", "sigma": 0.1, "noise_bits": 3},
            "`sigma` must be left out where noise_bits is given; got 0.1",
        ),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


def test_batch_larger_than_the_data(digits):
    with pytest.raises(ValueError, match=r"`batch_size` must be at most the 256 training images; got 300"):
        compiled.build(short(batch_size=300), digits)

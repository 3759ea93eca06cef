"""The methods as they are trained: MSAM, NSO, suppression, cheaper HERO, phases of training; what each costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from experiments import data
from experiments.analysis import networks
from experiments.config import METHODS, resolve
from experiments.storage import claims, runs
from experiments.training import compiled, loop, methods
from hero_jax import models, quantize
from tests import problems


@functools.cache
def images():
    return data.subset(data.load("digits"), 256, 0)


@pytest.fixture
def digits():
    return images()


def short(**options):
    return resolve(**{"epochs": 2, "batch_size": 64, **options})


def batches(dataset, epochs=2):
    """The batches of a run with seed 0, normalised, with their indices."""
    for epoch in range(epochs):
        for indices in data.epoch_order(0, epoch, dataset.train.size, 64):
            x = data.normalize(dataset.train.images[indices], dataset.pixels)
            yield indices, x, dataset.train.labels[indices]


def loss_fn(params, x, y):
    logits = models.create("mlp", 10).apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def initial():
    """The first weights of a run with seed 0."""
    return runs.snapshot(compiled.build(short(method="sgd"), images()).init(0).params)


def by_hand(config, step, optimizer=None):
    """The weights after a run, and the state of its optimizer (that of `optimizer`, or of the configuration).

    By `step(tx, params, opt_state, x, y, i)`, which is jitted.
    """
    tx = methods.optimizer(optimizer or config, 4)
    step = jax.jit(functools.partial(step, tx))
    params = jax.tree.map(jnp.asarray, initial())
    opt_state = tx.init(params)
    for i, (_, x, y) in enumerate(batches(images())):
        params, opt_state = step(params, opt_state, x, y, i)
    return params, opt_state


@functools.cache
def run(config):
    """The weights that the steps of a run leave, and their losses."""
    trainer, losses = compiled.build(config, images()), []
    state = trainer.init(0)
    for i, (indices, _, _) in enumerate(batches(images())):
        state, loss = trainer.step(state, *images().train, indices, kind=trainer.kind(i))
        losses.append(float(loss))
    return runs.evaluated(methods.on_host(config, runs.snapshot(state))._asdict())["params"], losses


def trained(config):
    return run(config)[0]


def away(a, b):
    """The largest difference of two trees, relative to the largest entry."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max() / np.abs(y).max(), a, b)
    return max(jax.tree.leaves(differences))


class TestMsam:
    def test_evaluates_and_saves_the_weights_without_the_perturbation(self, digits, tmp_path):
        config = short(method="msam", rho=0.5)

        def step(tx, params, opt_state, x, y, i):
            updates, opt_state = tx.update(jax.grad(loss_fn)(params, x, y), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        held, opt_state = by_hand(config, step)
        weights = hero_jax.msam_eval_params(opt_state, held)
        assert away(held, weights) > 1e-2
        trainer = compiled.build(config, digits)
        with runs.RunFolder(tmp_path / "run", config) as folder:
            result = loop.train(config, digits, folder, trainer=trainer)
        problems.assert_close(result.variables["params"], weights, rtol=1e-4)
        saved = runs.load_variables(tmp_path / "run")
        jax.tree.map(np.testing.assert_array_equal, saved["params"], result.variables["params"])
        assert trainer.evaluate(saved, digits.test) == result.metrics

    def test_parts_of_a_run_are_the_whole_run(self, digits, tmp_path):
        config = short(method="msam", rho=0.5)
        trainer = compiled.build(config, digits)
        for part in ({"max_minutes": 1e-9}, {"max_minutes": 1e-9}, {}):
            with runs.RunFolder(tmp_path / "run", config) as folder:
                paced = config.replace(**part)
                variables = loop.train(paced, digits, folder, trainer=trainer).variables
        problems.assert_close(variables["params"], trained(config), rtol=1e-6)

    def test_is_sgd_before_it_perturbs(self, digits):
        late = short(method="msam", rho=0.5, perturb_from=0.5)
        first = short(method="msam", rho=0.0).replace(epochs=2)
        trainer, sgd = (compiled.build(config, digits) for config in (late, first))
        state, expected = trainer.init(0), sgd.init(0)
        for i, (indices, _, _) in enumerate(batches(digits)):
            state, expected = (t.step(s, *digits.train, indices)[0] for t, s in ((trainer, state), (sgd, expected)))
            # rho counts from the e at which the next gradient is taken: that of step 4 of 8 is the first.
            assert (away(state.params, expected.params) > 1e-3) == (i >= 3), i

    @pytest.mark.parametrize("field", ["adaptive", "scope", "ascent_decay"])
    def test_settings_reach_it(self, field):
        values = {"adaptive": (False, True), "scope": ("global", "leaf"), "ascent_decay": (0.9, 0.5)}[field]
        one, other = (trained(short(method="msam", rho=0.5, **{field: value})) for value in values)
        assert away(one, other) > 1e-3


class TestNso:
    @pytest.mark.parametrize("noise_bits", [None, 3])
    def test_is_the_mean_gradient_at_noise_of_both_signs(self, noise_bits):
        config = short(method="nso", noise_bits=noise_bits, **({} if noise_bits else {"sigma": 0.05}))
        key = jax.random.fold_in(jax.random.split(jax.random.key(0))[0], 1)
        spec = quantize.named("channel-narrow")

        def step(tx, params, opt_state, x, y, i):
            key_step = jax.random.fold_in(key, i)
            if noise_bits:
                u = quantize.rounding_noise(params, noise_bits, key_step, spec=spec)
            else:
                u = hero_jax.perturbations.noise(params, 0.05, key_step)
            ups, downs = (
                jax.grad(loss_fn)(jax.tree.map(lambda w, n, s=sign: w + s * n, params, u), x, y) for sign in (1, -1)
            )
            grads = jax.tree.map(lambda a, b: (a + b) / 2, ups, downs)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        expected, _ = by_hand(config, step, optimizer=short(method="sgd"))
        problems.assert_close(trained(config), expected, rtol=1e-4)
        assert away(expected, trained(short(method="sgd"))) > 1e-3

    def test_each_seed_has_its_noise(self, digits):
        trainer = compiled.build(short(method="nso"), digits)
        keys = [trainer.init(seed).opt_state[0].key for seed in (0, 1)]
        assert (keys[0] != keys[1]).any()


class TestPhases:
    @pytest.mark.parametrize(
        ("options", "kinds"),
        [
            ({"method": "sgd"}, "PPPPPPPP"),
            ({"method": "sam", "perturb_from": 0.5}, "....PPPP"),
            ({"method": "sam", "perturb_from": 1.0}, "........"),
            ({"method": "hero", "penalize_from": 0.75}, "ppppppPP"),
            ({"method": "hero", "interval": 3}, "PppPppPp"),
            ({"method": "hero", "interval": 2, "perturb_from": 0.25, "penalize_from": 0.5}, "..ppPpPp"),
            ({"method": "grad_l1", "penalize_from": 0.5}, "ppppPPPP"),
            ({"method": "msam", "perturb_from": 0.5}, "PPPPPPPP"),
        ],
    )
    def test_of_every_step(self, options, kinds):
        """P: penalised and perturbed; p: perturbed alone; a dot: neither."""
        letters = {(True, True): "P", (True, False): "p", (False, False): "."}
        found, kind = methods.phases(short(**options), 4)
        assert "".join(letters[found[kind(step)]] for step in range(8)) == kinds
        traced = jax.vmap(kind)(jnp.arange(8)) if len(found) > 1 else jnp.zeros(8, int)
        assert "".join(letters[found[int(i)]] for i in traced) == kinds

    @pytest.mark.parametrize("method", ["sam", "hero", "nso"])
    def test_late_is_sgd_first_and_the_method_then(self, method):
        options = {"gamma_warmup": 0} if method == "hero" else {}
        late, sgd = run(short(method=method, perturb_from=0.5, **options)), run(short(method="sgd"))
        # The loss of step 4 is the last that does not know of step 4.
        np.testing.assert_allclose(late[1][:5], sgd[1][:5], rtol=1e-6)
        assert away(late[0], sgd[0]) > 1e-4
        assert away(late[0], trained(short(method=method, **options))) > 1e-4

    def test_several_steps_in_one_call_have_their_phases(self, digits):
        late = short(method="sam", perturb_from=0.5)
        together = loop.train(late.replace(steps_per_call=4), digits).variables["params"]
        problems.assert_close(together, trained(late), rtol=1e-5)


class TestOnAPartOfTheBatch:
    @pytest.mark.parametrize("method", ["sam", "hero"])
    def test_perturbation_and_penalty_are_of_the_part_and_the_gradient_of_the_whole(self, method):
        options = {"gamma": 1e3, "gamma_warmup": 0} if method == "hero" else {"suppress": 0.5}
        config = short(method=method, rho=0.5, ascent_batch_size=16, **options)

        def step(tx, params, opt_state, x, y, i):
            def grad_fn(p):
                return jax.grad(loss_fn)(p, x, y)

            def part_fn(p):
                return jax.grad(loss_fn)(p, x[::4], y[::4])

            updates, opt_state = tx.update(part_fn(params), opt_state, params, grad_fn=grad_fn, part_grad_fn=part_fn)
            return optax.apply_updates(params, updates), opt_state

        expected, _ = by_hand(config, step)
        found = trained(config)
        problems.assert_close(found, expected, rtol=1e-3)
        assert away(found, trained(config.replace(ascent_batch_size="all"))) > 1e-3

    def test_before_it_perturbs_it_is_sgd_on_the_whole_batch(self):
        late = short(method="sam", perturb_from=1.0, ascent_batch_size=16)
        problems.assert_close(trained(late), trained(short(method="sgd")), rtol=1e-6)


def test_perturbs_along_a_momentum_where_asked():
    config = short(method="sam", rho=0.5, ascent_decay=0.9)
    sam = hero_jax.sam(0.5)

    def step(tx, params, state, x, y, i):
        m, opt_state = state if isinstance(state[0], dict) else (jax.tree.map(jnp.zeros_like, params), state)

        def grad_fn(p):
            return jax.grad(loss_fn)(p, x, y)

        m = jax.tree.map(lambda g, m: g + 0.9 * m, grad_fn(params), m)
        direction, _ = sam.update(m, sam.init(params), params, grad_fn=grad_fn)
        updates, opt_state = tx.update(direction, opt_state, params)
        return optax.apply_updates(params, updates), (m, opt_state)

    params, _ = by_hand(config, step, optimizer=short(method="sgd"))
    problems.assert_close(trained(config), params, rtol=1e-3)
    assert away(params, trained(short(method="sam", rho=0.5))) > 1e-3


@pytest.mark.parametrize(
    ("method", "field", "values"),
    [
        ("sam", "suppress", (0.0, 0.5)),
        ("asam", "suppress", (0.0, 0.5)),
        ("hero", "suppress", (0.0, 0.5)),
        ("hero", "adaptive", (True, False)),
        ("hero", "product", ("exact", "difference")),
    ],
)
def test_settings_reach_the_transformation(method, field, values):
    penalty = {"gamma_warmup": 0, "gamma": 1e3} if method == "hero" else {}
    one, other = (trained(short(method=method, rho=0.5, **penalty, **{field: value})) for value in values)
    assert away(one, other) > 1e-4


@pytest.mark.parametrize("method", ["sgd", "sam", "grad_l1", "hero"])
def test_a_folder_of_before_these_fields_is_the_same_run(method):
    config = short(method=method)
    later = ("scope", "reduction", "interval", "suppress", "product", "perturb_from", "penalize_from", "adaptive")
    older = {name: value for name, value in claims.to_json(config).items() if name not in later}
    assert claims.difference(older, config, ()) is None
    if method == "sam":
        changed = config.replace(suppress=0.5)
        assert claims.difference(older, changed, ()) == ("suppress", 0.0, 0.5)


def test_no_two_networks_have_one_name():
    options = [{"rho": 0.1}, {"rho": 0.2}, {"rho": 0.1, "noise_bits": 3}, {"rho": 0.2, "noise_bits": 3}]
    options += [{"rho": 0.1, "ascent_decay": 0.9}, {"rho": 0.1, "ascent_batch_size": 16}]
    configs = [short(method="sam", **each) for each in options]
    configs += [short(method="nso"), short(method="nso", sigma=0.1), short(method="nso", noise_bits=3)]
    names = networks.names(networks.settings(config) for config in configs)
    assert len(set(names.values())) == len(configs)
    assert "NSO (noise_bits 3)" in names.values()


class TestGradients:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"method": "sgd"}, 1),
            ({"method": "ema"}, 1),
            ({"method": "msam", "perturb_from": 0.5}, 1),
            ({"method": "nso"}, 2),
            ({"method": "nso", "perturb_from": 0.75}, 1.25),
            ({"method": "sam"}, 2),
            ({"method": "asam", "perturb_from": 0.75}, 1.25),
            ({"method": "sam", "ascent_batch_size": 16}, 1.25),
            ({"method": "grad_l1"}, 3),
            ({"method": "grad_l1", "interval": 4}, 1.5),
            ({"method": "grad_l1", "penalty_batch_size": 16}, 1.75),
            ({"method": "grad_l1", "gamma": 0.0}, 1),
            ({"method": "hero"}, 4),
            ({"method": "hero", "gamma": 0.0, "product": "difference"}, 2),
            ({"method": "hero", "penalty": "hvp"}, 8.5),
            ({"method": "hero", "interval": 4}, 2.5),
            ({"method": "hero", "product": "difference"}, 3),
            ({"method": "hero", "penalty": "difference", "product": "difference"}, 4),
            ({"method": "hero", "penalty_batch_size": 16}, 2.75),
            ({"method": "hero", "penalty": "difference", "penalty_batch_size": 16}, 3.5),
            ({"method": "sam", "ascent_batch_size": 16, "suppress": 0.5}, 1.5),
            ({"method": "sam", "ascent_batch_size": 64}, 2),
            ({"method": "hero", "penalty_batch_size": 64}, 4),
            ({"method": "hero", "ascent_batch_size": 64}, 4),
            ({"method": "hero", "ascent_batch_size": 16, "gamma": 0.0}, 1.25),
            ({"method": "hero", "ascent_batch_size": 16, "penalty": "hvp"}, 2.875),
            ({"method": "hero", "ascent_batch_size": 16, "suppress": 0.5, "interval": 2}, 1.75),
            ({"method": "hero", "ascent_batch_size": 16}, 2),
            ({"method": "hero", "ascent_batch_size": 16, "product": "difference"}, 1.75),
            ({"method": "hero", "perturb_from": 0.75}, 1.75),
            ({"method": "hero", "penalize_from": 0.75}, 2.5),
            ({"method": "hero", "perturb_from": 0.5, "penalize_from": 0.75, "interval": 2}, 1.75),
            ({"method": "hero", "perturb_from": 0.75, "penalize_from": 0.5}, 1.75),
        ],
    )
    def test_of_a_step(self, options, expected):
        assert methods.gradients(short(**options)) == pytest.approx(expected)

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_has_a_cost(self, method):
        assert methods.gradients(short(method=method)) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "nso", "sigma": 0.1, "noise_bits": 3},
            r"`sigma` must be left out where noise_bits is given; got 0.1",
        ),
        (
            {"method": "hero", "product": "difference", "dtype": "bfloat16"},
            r"`product` must be 'exact' with dtype bfloat16",
        ),
        ({"method": "hero", "product": "exakt"}, r"`product` must be one of 'exact', 'difference'; got 'exakt'"),
        ({"method": "sam", "suppress": 1.5}, r"`suppress` must be between 0 and 1; got 1.5"),
        ({"method": "sam", "perturb_from": -0.1}, r"`perturb_from` must be between 0 and 1; got -0.1"),
        ({"method": "sgd", "suppress": 0.5}, r"`suppress` has no effect on method 'sgd'; got 0.5"),
        (
            {"method": "hero", "product": "difference", "penalty": "hvp"},
            r"`product` must be 'exact' with penalty 'hvp'",
        ),
        (
            {"method": "sam", "ascent_decay": 0.9, "sync": False, "groups": 2},
            r"`ascent_decay` needs sync True: a momentum is of all devices; got 0.9",
        ),
        (
            {"method": "hero", "ascent_batch_size": 16, "penalty_batch_size": 16},
            r"`penalty_batch_size` must be left out where ascent_batch_size is given",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        short(**options)


def test_a_part_that_does_not_divide_the_batch(digits):
    with pytest.raises(ValueError, match=r"`ascent_batch_size` must be 64 / k where k divides the 64 images"):
        compiled.build(short(method="sam", ascent_batch_size=24), digits)

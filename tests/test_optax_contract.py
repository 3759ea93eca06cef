"""What optax asks of a transformation, after its suite for contributed optimizers, optax/contrib/_common_test.py."""

import contextlib
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax

# Each entry is (factory, hyper-parameters).
FACTORIES = {
    **{
        penalty: (hero_jax.hero, {"rho": 0.05, "gamma": 1e-3, "penalty": penalty})
        for penalty in ("detached", "difference", "hvp", "eigenvalue")
    },
    "no penalty": (hero_jax.hero, {"rho": 0.05, "gamma": 0.0}),
    "difference product": (hero_jax.hero, {"rho": 0.05, "gamma": 1e-3, "product": "difference"}),
    "sam": (hero_jax.sam, {"rho": 0.05}),
    "sam suppressed": (hero_jax.sam, {"rho": 0.05, "suppress": 0.5}),
    "grad_l1": (hero_jax.grad_l1, {"gamma": 1e-3}),
    "nso": (functools.partial(hero_jax.nso, seed=3), {"sigma": 0.05}),
}


@pytest.fixture(params=FACTORIES)
def factory(request):
    return FACTORIES[request.param]


def loss_fn(params):
    """A smooth, not quadratic bowl on a matrix and a vector with its minimum at 3 and -2."""
    return sum(jnp.sum(jnp.cosh(x - target)) for x, target in zip(params, (3.0, -2.0), strict=True))


def start(dtype=jnp.float32):
    return [jnp.full((2, 3), 2.0, dtype), jnp.full((4,), -1.5, dtype)]


grad_fn = jax.grad(loss_fn)


def of_type(options, dtype):
    """What is to happen to parameters of a type: a difference of gradients refuses 16 bits."""
    if options.get("product") == "difference" and jnp.finfo(dtype).bits < 32:
        return pytest.raises(ValueError, match="must be float32 or wider")
    return contextlib.nullcontext()


def step(tx, params, state):
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


def test_is_a_transformation_with_extra_args(factory):
    build, options = factory
    tx = build(**options)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    parameters = inspect.signature(tx.update).parameters
    assert parameters["grad_fn"].kind is inspect.Parameter.KEYWORD_ONLY


def test_ignores_extra_arguments_and_does_not_recompile(factory):
    build, options = factory
    tx = optax.chain(build(**options), optax.sgd(0.1))
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn, value=1.0, surprise="argument")
        return optax.apply_updates(params, updates), state

    params, state = start(), tx.init(start())
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


def test_converges_inside_scan_with_a_stable_state_type(factory):
    build, options = factory
    tx = optax.chain(build(**options), optax.sgd(0.1, momentum=0.5))

    @jax.jit
    def train(params):
        return jax.lax.scan(lambda carry, _: (step(tx, *carry), None), (params, tx.init(params)), length=300)[0]

    params, state = train(start())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(start()))
    assert int(state[0].count) == 300
    for x, target in zip(params, (3.0, -2.0), strict=True):
        # SAM circles the minimum at a distance below rho.
        np.testing.assert_allclose(x, target, atol=0.06)


def test_state_type_is_stable_in_cond(factory):
    build, options = factory
    tx = build(**options)
    params, state = start(), tx.init(start())

    @jax.jit
    def maybe(flag):
        return jax.lax.cond(flag, lambda: step(tx, params, state)[1], lambda: state)

    assert int(maybe(True).count) == 1
    chex.assert_trees_all_equal(maybe(False), state)


def test_map_params_reaches_every_leaf(factory):
    build, options = factory
    tx = optax.chain(build(**options), optax.sgd(0.1, momentum=0.9))
    state = tx.init(start())
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.parametrize("jit", [True, False])
def test_injected_hyperparameters(factory, jit):
    build, options = factory
    plain, injected = build(**options), optax.inject_hyperparams(build)(**options)
    params = start()
    state, injected_state = plain.init(params), injected.init(params)
    apply = jax.jit if jit else (lambda f: f)
    update = apply(lambda s: plain.update(grad_fn(params), s, params, grad_fn=grad_fn))
    injected_update = apply(lambda s: injected.update(grad_fn(params), s, params, grad_fn=grad_fn))
    for _ in range(2):
        expected, state = update(state)
        actual, injected_state = injected_update(injected_state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    if options.get("gamma") != 0.0:  # an injected gamma is an array: its penalty is computed, and recorded
        chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-6)
    assert set(options) - {"penalty", "product"} <= set(injected_state.hyperparams)


def test_injected_schedule_and_mask(factory):
    build, options = factory
    if "gamma" not in options:
        pytest.skip("sam has neither gamma nor mask")
    schedule = optax.linear_schedule(0.0, 1e-3, 1)
    options = {**options, "gamma": schedule, "mask": lambda p: [True, True]}
    injected, plain = optax.inject_hyperparams(build, static_args="mask")(**options), build(**options)
    params = start()
    s, t = injected.init(params), plain.init(params)
    for _ in range(2):
        actual, s = injected.update(grad_fn(params), s, params, grad_fn=grad_fn)
        expected, t = plain.update(grad_fn(params), t, params, grad_fn=grad_fn)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_injected_hyperparameters_of_sixteen_bit_parameters(factory, dtype):
    # inject_hyperparams rounds eps = 1e-12 to the parameters' type: 0 in float16.
    build, options = factory
    tx = optax.inject_hyperparams(build)(**options)
    params = [jnp.zeros_like(x) for x in start(dtype)]
    with of_type(options, dtype):
        updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda p: [0 * x for x in p])
        chex.assert_tree_all_finite(updates)
        chex.assert_trees_all_equal_dtypes(updates, params)


def test_apply_if_finite_rejects_a_step_and_keeps_the_state(factory):
    build, options = factory
    tx = optax.apply_if_finite(optax.chain(build(**options), optax.sgd(0.1)), max_consecutive_errors=3)
    params = start()
    _, state = step(tx, params, tx.init(params))
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, after = tx.update(bad, state, params, grad_fn=lambda p: bad)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert not after.last_finite


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_preserves_the_type_of_the_parameters(factory, dtype):
    build, options = factory
    tx = build(**options)
    params = start(dtype)
    with of_type(options, dtype):
        updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        chex.assert_trees_all_equal_dtypes(updates, params)


def test_vmap_over_runs_equals_a_loop(factory):
    build, options = factory
    tx = optax.chain(build(**options), optax.sgd(0.1))
    offsets = jnp.array([0.0, 0.3, -0.7])

    @jax.jit
    def train(offset):
        params = [x + offset for x in start()]
        return jax.lax.scan(lambda carry, _: (step(tx, *carry), None), (params, tx.init(params)), length=3)[0]

    together = jax.vmap(train)(offsets)
    for i, offset in enumerate(offsets):
        alone = train(offset)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6)


class TestVariants(chex.TestCase):
    """With jit, without it, and with the arguments on device or not."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_update(self):
        for build, options in FACTORIES.values():
            tx = build(**options)
            state = tx.init(start())
            update = self.variant(functools.partial(tx.update, grad_fn=grad_fn))
            direction, _ = update(grad_fn(start()), state, start())
            expected, _ = tx.update(grad_fn(start()), state, start(), grad_fn=grad_fn)
            chex.assert_trees_all_close(direction, expected, rtol=1e-5)

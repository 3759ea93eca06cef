"""nso and its noise: the definition in float64, the mean over seeds, devices, types, wrappers, edges and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from hero_jax import parallel, quantize
from hero_jax.perturbations import noise
from tests import problems, reference
from tests.test_devices import LAYOUTS, mapped

DEVICES = 4
BIASES = {"hidden": False, "bias": True, "head": False}


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


mean_loss, problem = problems.two_layers_loss, functools.partial(problems.two_layers, 8)
mean_grads = jax.jit(jax.grad(mean_loss))


def uniform(params, key):
    """A distribution of our own: another width for each leaf."""
    keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
    return {k: (1 + x.ndim) * jax.random.uniform(keys[k], x.shape, x.dtype, -1, 1) for k, x in params.items()}


def defined(params, batch, u, symmetric=True):
    """The direction, from its equation."""
    above = mean_grads(reference.add(params, u), batch)
    below = mean_grads(reference.subtract(params, u), batch)
    return reference.scale(0.5, reference.add(above, below)) if symmetric else above


def drawn(params, sigma, seed, count, sample=None, device=None):
    """u of a step, from its definition."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    key = key if device is None else jax.random.fold_in(key, device)
    return noise(params, sigma, key) if sample is None else reference.scale(sigma, sample(params, key))


def updated(tx, params, state=None, **options):
    """One update on the batch of `problem`, whose incoming gradient is not to be used."""
    _, batch = problem(params["bias"].dtype)
    state = tx.init(params) if state is None else state
    incoming = jax.tree.map(jnp.cos, params)
    return tx.update(incoming, state, params, grad_fn=lambda p: mean_grads(p, batch), **options)


def distance(a, b):
    return reference.norm(reference.subtract(a, b))


# --- the definition ---


@pytest.mark.parametrize("sample", [None, uniform])
@pytest.mark.parametrize("symmetric", [True, False])
def test_direction_is_that_of_the_equations(x64, symmetric, sample):
    params, batch = problem()
    tx = hero_jax.nso(0.3, seed=7, sample=sample, symmetric=symmetric)
    state = tx.init(params)
    for count in range(3):
        direction, state = updated(tx, params, state)
        u = drawn(params, 0.3, 7, count, sample)
        problems.assert_close(direction, defined(params, batch, u, symmetric))
        np.testing.assert_allclose(state.noise_norm, reference.norm(u), rtol=1e-6)
        assert int(state.count) == count + 1
        # The noise and the second sign must matter, or the comparison says nothing of them.
        assert distance(direction, mean_grads(params, batch)) > 0.01 * reference.norm(direction)
        assert distance(direction, defined(params, batch, u, not symmetric)) > 0.01 * reference.norm(direction)


def test_value_fn_is_enough(x64):
    params, batch = problem()
    tx = hero_jax.nso(0.3, seed=7)
    direction, _ = tx.update(params, tx.init(params), params, value_fn=lambda p: mean_loss(p, batch))
    problems.assert_close(direction, updated(tx, params)[0])


def test_one_sided_noise_of_rounding_is_the_gradient_at_these_weights(x64):
    params, batch = problem()
    tx = hero_jax.nso(1.0, seed=3, symmetric=False, sample=lambda params, key: quantize.rounding_noise(params, 3, key))
    direction, _ = updated(tx, params)
    u = quantize.rounding_noise(params, 3, jax.random.fold_in(jax.random.key(3), 0))
    problems.assert_close(direction, mean_grads(reference.add(params, u), batch))
    assert distance(direction, mean_grads(params, batch)) > 0.01 * reference.norm(direction)


def test_schedule_of_sigma(x64):
    params, batch = problem()
    tx = hero_jax.nso(optax.linear_schedule(0.3, 0.9, 2), seed=7)
    state = tx.init(params)
    for count, sigma in enumerate((0.3, 0.6, 0.9, 0.9)):
        direction, state = updated(tx, params, state)
        problems.assert_close(direction, defined(params, batch, drawn(params, sigma, 7, count)), rtol=1e-6)


def test_injected_sigma_changes_mid_run(x64):
    params, batch = problem()
    tx = optax.inject_hyperparams(hero_jax.nso, static_args=("seed", "sample"))(0.3, seed=7, sample=uniform)
    direction, state = updated(tx, params)
    problems.assert_close(direction, defined(params, batch, drawn(params, 0.3, 7, 0, uniform)))
    state.hyperparams["sigma"] = jnp.asarray(0.9)
    direction, _ = updated(tx, params, state)
    problems.assert_close(direction, defined(params, batch, drawn(params, 0.9, 7, 1, uniform)))


@pytest.mark.parametrize("mask", [BIASES, lambda params: jax.tree.map(lambda x: x.ndim == 1, params)])
def test_mask(x64, mask):
    params, batch = problem()
    direction, _ = updated(hero_jax.nso(0.3, seed=7, perturb_mask=mask), params)
    u = reference.restrict(drawn(params, 0.3, 7, 0), BIASES)
    problems.assert_close(direction, defined(params, batch, u))
    assert distance(direction, updated(hero_jax.nso(0.3, seed=7), params)[0]) > 0.01 * reference.norm(direction)


def test_step_without_perturbation_is_the_incoming_gradient(x64):
    params, batch = problem()
    tx = hero_jax.nso(0.3, seed=7)
    direction, state = updated(tx, params, perturb=False)
    chex.assert_trees_all_equal(direction, jax.tree.map(jnp.cos, params))
    assert float(state.noise_norm) == 0
    # It counts, so that the next step has the noise of its own count.
    direction, _ = updated(tx, params, state)
    problems.assert_close(direction, defined(params, batch, drawn(params, 0.3, 7, 1)))


def test_seeds_and_steps_have_noise_of_their_own(x64):
    params, _ = problem()
    first, state = updated(hero_jax.nso(0.3, seed=7), params)
    for same in (7, np.int64(7), jax.random.key(7)):
        chex.assert_trees_all_equal(updated(hero_jax.nso(0.3, seed=same), params)[0], first)
    later, _ = updated(hero_jax.nso(0.3, seed=7), params, state)
    other, _ = updated(hero_jax.nso(0.3, seed=8), params)
    for a, b in ((first, later), (first, other), (later, other)):
        assert distance(a, b) > 1e-3 * reference.norm(a)


def test_restored_state_decides_the_noise(x64):
    params, _ = problem()
    _, state = updated(hero_jax.nso(0.3, seed=7), params)
    restored = jax.tree.map(np.asarray, state)
    expected, _ = updated(hero_jax.nso(0.3, seed=7), params, state)
    chex.assert_trees_all_equal(updated(hero_jax.nso(0.3, seed=8), params, restored)[0], expected)


def test_generator_of_the_key_is_kept():
    w, key = jnp.array([2.0, 3.0]), jax.random.key(5, impl="rbg")
    tx = hero_jax.nso(0.3, seed=key, symmetric=False)
    direction, _ = tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    np.testing.assert_allclose(direction, w + noise(w, 0.3, jax.random.fold_in(key, 0)), rtol=1e-6)


# --- the mean ---


@pytest.mark.parametrize(("sample", "symmetric"), [(None, True), (uniform, False)])
def test_mean_is_the_gradient_of_the_loss_and_half_the_trace(x64, sample, symmetric):
    """Exact for a polynomial of degree 4, whose derivatives of order 4 do not depend on the weights."""
    rng = np.random.default_rng(2)
    params = {"a": jnp.asarray(rng.normal(size=2)), "b": jnp.asarray(rng.normal(size=(1, 3)))}
    matrix, _ = problems.symmetric([3.0, 1.5, -1.0, 0.7, 2.0])
    # A variance of `uniform` is (1 + ndim)^2 / 3.
    variances = 0.04 * (np.ones(5) if sample is None else np.array([4, 4, 9, 9, 9]) / 3)
    cubes = jnp.linspace(1.0, -3.0, 5)

    def flat_loss(w):
        return (w @ matrix @ w) ** 2 / 4 + cubes @ w**3 + jnp.sin(cubes) @ w

    def smoothed(w):
        return flat_loss(w) + variances @ jnp.diag(jax.hessian(flat_loss)(w)) / 2

    grad_fn = jax.grad(lambda params: flat_loss(jax.flatten_util.ravel_pytree(params)[0]))

    @jax.jit
    @jax.vmap
    def directions(key):
        tx = hero_jax.nso(0.2, seed=key, sample=sample, symmetric=symmetric)
        direction, _ = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
        return jax.flatten_util.ravel_pytree(direction)[0]

    found = np.asarray(directions(jax.random.split(jax.random.key(1), 5_000)))
    sem = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    w = jax.flatten_util.ravel_pytree(params)[0]
    expected = np.asarray(jax.grad(smoothed)(w))
    assert np.max(np.abs(found.mean(axis=0) - expected) / sem) < 4
    # What is added to the gradient is far larger than the error.
    assert np.max(np.abs(np.asarray(jax.grad(flat_loss)(w)) - expected) / sem) > 6


def test_second_sign_takes_most_of_the_variance(x64):
    params, _ = problem()

    def spread(symmetric):
        def direction(key):
            return updated(hero_jax.nso(0.05, seed=key, sample=uniform, symmetric=symmetric), params)[0]["head"]

        return np.var(jax.jit(jax.vmap(direction))(jax.random.split(jax.random.key(0), 200)), axis=0).sum()

    assert spread(True) < 0.1 * spread(False)


# --- programs and devices ---


def test_scan_has_a_stable_state_and_the_noise_of_a_loop(x64):
    params, batch = problem()
    tx = optax.chain(hero_jax.nso(0.3, seed=7), optax.sgd(0.1, momentum=0.5))

    def body(carry, _):
        params, state = carry
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), state[0].noise_norm

    found, norms = jax.lax.scan(body, (params, tx.init(params)), length=5)
    state = tx.init(params)
    for count in range(5):
        u = drawn(params, 0.3, 7, count)
        np.testing.assert_allclose(norms[count], reference.norm(u), rtol=1e-6)
        updates, state = updated(tx, params, state)
        params = optax.apply_updates(params, updates)
    problems.assert_close(found[0], params)


def test_incoming_gradient_is_not_computed():
    params, batch = problem(jnp.float32)
    batch = jax.tree.map(lambda x: jnp.tile(x, (100, 1)), batch)  # so that most of a step are its gradients
    tx = hero_jax.nso(0.3, seed=7)

    def step(params):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    def gradients(params, signs):
        """The gradients at the same noise."""
        u = drawn(params, 0.3, 7, 0)
        return [jax.grad(mean_loss)(reference.add(params, reference.scale(sign, u)), batch) for sign in signs]

    def flops(function):
        return jax.jit(function).lower(params).compile().cost_analysis()["flops"]

    two, three = (flops(functools.partial(gradients, signs=signs)) for signs in ((1, -1), (1, -1, 0.5)))
    assert abs(flops(step) - two) < (three - two) / 2


@functools.cache
def on_devices(layout, mesh, sync):
    """Two steps at fixed parameters: (direction, state) of every device, stacked."""
    params, batch = problem()
    tx = hero_jax.nso(0.3, seed=7, axis_name="data", sync=sync)

    def step(params, state, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        return tx.update(grad_fn(parallel.vary(params, "data")), state, params, grad_fn=grad_fn)

    step = mapped(layout, step, mesh)
    shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    _, state = step(params, tx.init(params), shards)
    return step(params, jax.tree.map(lambda x: np.asarray(x[0]), state), shards)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_direction_of_devices(x64, mesh, layout, sync):
    params, batch = problem()
    direction, state = on_devices(layout, mesh, sync)
    local, norms = [], []
    for i in range(DEVICES):
        u = drawn(params, 0.3, 7, 1, device=None if sync else i)
        local.append(defined(params, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch), u))
        norms.append(reference.norm(u))
    expected = jax.tree.map(lambda *x: sum(x) / DEVICES, *local)
    for device in range(DEVICES):
        problems.assert_close(jax.tree.map(lambda x, i=device: x[i], direction), expected)
    np.testing.assert_allclose(state.noise_norm, np.full(DEVICES, np.mean(norms)), rtol=1e-6)
    np.testing.assert_array_equal(state.count, np.full(DEVICES, 2))
    if sync:  # with the same noise everywhere it is the direction of the whole batch
        problems.assert_close(expected, defined(params, batch, drawn(params, 0.3, 7, 1)))
    else:
        synced, _ = on_devices(layout, mesh, True)
        assert distance(synced, direction) > 0.01 * reference.norm(direction)


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("sync", [True, False])
def test_step_without_perturbation_is_the_mean_of_devices(x64, mesh, is_local, sync):
    """Also where autodiff has summed the gradient of replicated parameters over the devices."""
    params, batch = problem()
    tx = hero_jax.nso(0.3, seed=7, axis_name="data", sync=sync)

    def step(params, state, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        grads = grad_fn(parallel.vary(params, "data") if is_local else params)
        return tx.update(grads, state, params, grad_fn=grad_fn, perturb=False)

    shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    direction, _ = mapped("shard_map", step, mesh)(params, tx.init(params), shards)
    problems.assert_close(jax.tree.map(lambda x: x[1], direction), mean_grads(params, batch))


# --- types and edges ---


def test_step_without_perturbation_has_the_types_of_the_parameters():
    params, _ = problem(jnp.bfloat16)
    tx = hero_jax.nso(0.3, seed=7)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    direction, _ = tx.update(wide, tx.init(params), params, grad_fn=lambda p: p, perturb=False)
    assert {x.dtype for x in jax.tree.leaves(direction)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("dtype", "sample"), [(jnp.float16, None), (jnp.bfloat16, uniform)])
def test_types(dtype, sample):
    params, batch = problem(dtype)
    tx = hero_jax.nso(0.3, seed=7, sample=sample)
    state = tx.init(params)
    direction, after = jax.jit(lambda state: updated(tx, params, state))(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch))
    expected = defined(*wide, jax.tree.map(lambda x: x.astype(jnp.float32), drawn(params, 0.3, 7, 0, sample)))
    problems.assert_close(jax.tree.map(jnp.float32, direction), expected, rtol=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_noise_it_is_the_gradient(x64, symmetric):
    params, batch = problem()
    direction, state = updated(hero_jax.nso(0.0, seed=7, symmetric=symmetric), params)
    problems.assert_close(direction, mean_grads(params, batch), rtol=1e-14)
    assert float(state.noise_norm) == 0


def test_empty_leaf_and_scalars():
    params = {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2.0)}
    tx = hero_jax.nso(0.5, seed=7)
    direction, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: jax.tree.map(lambda x: x**2, p))
    u = drawn(params, 0.5, 7, 0)["scalar"]
    np.testing.assert_allclose(direction["scalar"], 4 + u**2, rtol=1e-6)
    assert direction["empty"].shape == (0, 3)
    np.testing.assert_allclose(state.noise_norm, jnp.abs(u), rtol=1e-6)


# --- the noise ---


def test_noise_has_the_moments_of_the_normal_distribution():
    like = {"w": jnp.ones((150, 200)), "b": jnp.ones(10_000)}
    u = noise(like, 0.3, jax.random.key(0))
    for x in map(np.ravel, u.values()):
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
            found = (x / 0.3).astype(np.float64) ** power
            assert abs(found.mean() - moment) < 4 * found.std() / np.sqrt(len(found))
    # Leaves and keys are independent of each other.
    other = noise(like, 0.3, jax.random.key(1))
    for x, y in ((u["w"].ravel()[:10_000], u["b"]), (u["w"].ravel(), other["w"].ravel())):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(len(x))


def test_noise_outside_its_mask_is_zero_and_inside_as_without_one(x64):
    params, _ = problem()
    u = noise(params, 0.3, jax.random.key(0), mask=BIASES)
    problems.assert_close(u, reference.restrict(noise(params, 0.3, jax.random.key(0)), BIASES))
    assert float(jnp.min(jnp.abs(u["bias"]))) > 0


def test_noise_of_another_distribution(x64):
    params, _ = problem()
    key = jax.random.key(0)
    u = noise(params, 0.3, key, sample=uniform, mask=BIASES)
    problems.assert_close(u, reference.restrict(reference.scale(0.3, uniform(params, key)), BIASES))


@pytest.mark.parametrize(("dtype", "sample"), [(jnp.float16, None), (jnp.bfloat16, uniform)])
def test_noise_is_wide(dtype, sample):
    u = noise(problem(dtype)[0], 0.3, jax.random.key(0), sample=sample)
    assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": dict.fromkeys(BIASES, False)}, r"^`noise\(mask=...\)` must select at least one leaf; got none of 3"),
        ({"mask": {"other": True}}, r"^`noise\(mask=...\)` must have the structure of `params`;"),
        ({"sample": lambda p, key: p["bias"]}, r"^`sample\(params, key\)` must have the structure of `params`;"),
        ({"sample": lambda p, key: p | {"bias": p["head"]}}, r"^`sample\(params, key\)` must have the shapes of"),
    ],
)
def test_noise_refuses(options, message):
    with pytest.raises(hero_jax.ArgumentError, match=message):
        noise(problem(jnp.float32)[0], 0.3, jax.random.key(0), **options)


# --- errors ---


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"sigma": -0.1}, r"^`nso\(sigma=...\)` must be non-negative and finite; got -0.1.$"),
        (TypeError, {"sigma": "large"}, r"^`nso\(sigma=...\)` must be a real scalar; got 'large'.$"),
        (TypeError, {"seed": 1.5}, r"^`nso\(seed=...\)` must be an integer >= 0; got 1.5.$"),
        (ValueError, {"seed": -1}, r"^`nso\(seed=...\)` must be an integer >= 0; got -1.$"),
        (TypeError, {"seed": True}, r"^`nso\(seed=...\)` must be an integer or a `jax.random.key`; got True.$"),
        (TypeError, {"sample": 3}, r"^`nso\(sample=...\)` must be a function; got 3.$"),
        (TypeError, {"symmetric": 1}, r"^`nso\(symmetric=...\)` must be True or False; got 1.$"),
        (TypeError, {"sync": 0}, r"^`nso\(sync=...\)` must be True or False; got 0.$"),
        (ValueError, {"sync": False}, r"^`nso\(sync=False\)` needs `axis_name`: without one there is no device to be"),
        (TypeError, {"axis_name": 3}, r"^`nso\(axis_name=...\)` must be the name of a mapped axis or a tuple of"),
    ],
)
def test_refuses_arguments(error, options, message):
    with pytest.raises(error, match=message) as caught:
        hero_jax.nso(**{"sigma": 0.3, "seed": 7} | options)
    assert isinstance(caught.value, hero_jax.ArgumentError) == (error is ValueError)


def test_refuses_several_keys():
    with pytest.raises(TypeError, match=r"^`nso\(seed=...\)` must be one key; got an array of shape \(2,\).$"):
        hero_jax.nso(0.3, seed=jax.random.split(jax.random.key(0)))


def test_refuses_parameters_and_masks_at_init():
    params, _ = problem(jnp.float32)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`nso\(perturb_mask=...\)` must select at least one leaf;"):
        hero_jax.nso(0.3, seed=7, perturb_mask=dict.fromkeys(BIASES, False)).init(params)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`nso\(perturb_mask=...\)` must have the structure of"):
        hero_jax.nso(0.3, seed=7, perturb_mask={"other": True}).init(params)
    with pytest.raises(TypeError, match=r"^`params` must have floating-point leaves; at params\['n'\] it has int32.$"):
        hero_jax.nso(0.3, seed=7).init({"n": jnp.arange(3)})
    with pytest.raises(hero_jax.ArgumentError, match=r"^`params` must be the whole tree, .* at params\['head'\] it is"):
        optax.masked(hero_jax.nso(0.3, seed=7), BIASES).init(params)


def test_refuses_updates():
    params, _ = problem(jnp.float32)
    tx = hero_jax.nso(0.3, seed=7)
    state = tx.init(params)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`nso` needs `params`: call .*; got None.$"):
        tx.update(params, state, grad_fn=jnp.sin)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`nso` needs `grad_fn` \(params -> grads on the same batch\)"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=r"^`nso` needs a callable `grad_fn`; got 3.$"):
        tx.update(params, state, params, grad_fn=3)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`updates` must have the structure of `params`; only `params`"):
        tx.update({"bias": params["bias"]}, state, params, grad_fn=jnp.sin)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`grad_fn\(params\)` must have the structure of `params`;"):
        tx.update(params, state, params, grad_fn=lambda p: p["bias"])
    with pytest.raises(TypeError, match=r"^`nso update\(perturb=...\)` must be True or False; got 1.$"):
        updated(tx, params, perturb=1)
    with pytest.raises(TypeError, match=r"^`nso` needs the `NsoState` that .*; got a tuple. Restore a saved state"):
        updated(tx, params, tuple(state))
    scheduled = hero_jax.nso(lambda count: jnp.ones(2), seed=7)
    with pytest.raises(TypeError, match=r"^`nso\(sigma=...\)` must be a real scalar; got an array of shape \(2,\).$"):
        updated(scheduled, params)

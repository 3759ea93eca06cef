"""msam against its equations in float64; then exactness, resuming, devices, types, wrappers, edges and errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hero_jax
from hero_jax import parallel
from tests import problems, reference

DEVICES = 8
# Every value is one of float32, in which Optax computes schedules, so that no compilation rounds it otherwise.
LEARNING_RATE = optax.linear_schedule(0.3125, 0.0625, 16)
BASES = {
    "sgd": optax.chain(optax.add_decayed_weights(0.03), optax.sgd(LEARNING_RATE, momentum=0.7)),
    "adamw": optax.adamw(0.02, weight_decay=0.3),
}
KERNELS = {"hidden": True, "bias": False, "head": True}


mean_loss, problem = problems.two_layers_loss, functools.partial(problems.two_layers, 16)
mean_grads = jax.jit(jax.grad(mean_loss))


def taken(tx, params, num_steps, state=None):
    """`num_steps` of the loop that a user writes, without `jit`: (params, state)."""
    _, batch = problem()
    state = tx.init(params) if state is None else state
    for _ in range(num_steps):
        updates, state = tx.update(mean_grads(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def jitted(tx):
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


def scanned(tx, params, batch, num_steps, grad_fn=jax.grad(mean_loss), mean=lambda tree: tree):
    """The same loop as a `jax.lax.scan`."""

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(mean(grad_fn(params, batch)), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), length=num_steps)[0]


def perturbation(w, m, rho, adaptive, scope, mask, eps):
    """e of every leaf, from its equation, in NumPy."""
    raised = {k: w[k] ** 2 * m[k] if adaptive[k] else m[k] for k in w}
    measured = {k: np.abs(w[k]) * m[k] if adaptive[k] else m[k] for k in w}
    squares = {k: np.sum(measured[k] ** 2) for k in w}
    whole = sum(squares[k] for k in w if mask[k])
    lengths = {k: np.sqrt(whole if scope == "global" else squares[k]) for k in w}
    return {k: rho * raised[k] / (lengths[k] + eps) if mask[k] else 0 * w[k] for k in w}


def defined(base, params, num_steps, rho, *, decay=0.9, adaptive=False, scope="global", perturb_mask=None, eps=1e-12):
    """(w, e) after `num_steps`, from the equations; `rho` is a function of the step, the masks are dicts of bools."""
    _, batch = problem()
    adaptive = adaptive if isinstance(adaptive, dict) else dict.fromkeys(params, adaptive)
    mask = perturb_mask or dict.fromkeys(params, True)
    w = jax.tree.map(np.asarray, params)
    e, m = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    state = base.init(w)
    for t in range(num_steps):
        g = jax.tree.map(np.asarray, mean_grads({k: w[k] + e[k] for k in w}, batch))
        m = {k: decay * m[k] + g[k] for k in w}
        changes, state = base.update(g, state, w)
        w = {k: w[k] + np.asarray(changes[k]) for k in w}
        e = perturbation(w, m, rho(t + 1), adaptive, scope, mask, eps)
    return w, e


def added(w, e):
    return {k: w[k] + e[k] for k in w}


# --- the definition ---

OPTIONS = {
    "sam": {},
    "asam": {"adaptive": True},
    "leaf": {"scope": "leaf"},
    "adaptive leaf": {"adaptive": True, "scope": "leaf"},
    "adaptive kernels": {"adaptive": KERNELS},
    "mask": {"perturb_mask": {"hidden": False, "bias": True, "head": True}},
    "mask leaf": {"perturb_mask": {"hidden": True, "bias": True, "head": False}, "scope": "leaf"},
    "decay": {"decay": 0.3},
    "no decay": {"decay": 0},
    "eps": {"eps": 0.7},
}


@pytest.mark.parametrize(
    ("base", "name"), [*itertools.product(["sgd"], OPTIONS), *itertools.product(["adamw"], ["sam", "adaptive leaf"])]
)
def test_run_is_that_of_the_equations(x64, base, name):
    params, _ = problem()
    found, state = taken(hero_jax.msam(BASES[base], 0.4, **OPTIONS[name]), params, 20)
    w, e = defined(BASES[base], params, 20, lambda t: 0.4, **OPTIONS[name])
    problems.assert_close(found, added(w, e))
    problems.assert_close(hero_jax.msam_eval_params(state, found), w)
    assert int(state.count) == 20
    # The perturbation and the option must matter, or the comparison says nothing of them.
    plain, _ = taken(BASES[base], params, 20)
    assert reference.norm(reference.subtract(plain, w)) > 1e-3
    if OPTIONS[name]:
        other, _ = defined(BASES[base], params, 20, lambda t: 0.4)
        assert reference.norm(reference.subtract(other, w)) > 1e-3


def test_schedule_is_taken_at_the_step_whose_gradient_is_perturbed(x64):
    params, _ = problem()

    def rho(t):
        return 0.2 + 0.05 * t

    found, _ = taken(hero_jax.msam(BASES["sgd"], rho), params, 20)
    w, e = defined(BASES["sgd"], params, 20, rho)
    problems.assert_close(found, added(w, e))
    late, _ = defined(BASES["sgd"], params, 20, lambda t: rho(t - 1))
    assert reference.norm(reference.subtract(late, w)) > 1e-4


def test_masks_may_be_functions_and_prefixes(x64):
    params, _ = problem()
    nested = {"kernels": {k: params[k] for k in ("hidden", "head")}, "bias": params["bias"]}
    grads = jax.tree.map(jnp.sin, nested)
    full = {"kernels": {"hidden": True, "head": True}, "bias": False}
    found = []
    for mask in (full, {"kernels": True, "bias": False}, problems.kernels_mask):
        tx = hero_jax.msam(BASES["sgd"], 0.4, adaptive=mask, perturb_mask=mask)
        found.append(tx.update(grads, tx.init(nested), nested)[0])
    chex.assert_trees_all_equal(*found)


def test_weight_decay_is_that_of_the_weights(x64):
    """SGD written out, at a perturbation that is larger than the weights."""
    params, batch = problem()
    tx = hero_jax.msam(optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.2)), 30.0)
    w = params
    state = tx.init(params)
    for _ in range(5):
        g = mean_grads(params, batch)
        g = reference.scale(1 / reference.norm(g), g)  # the loss is steep so far out
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        w = jax.tree.map(lambda w, g: w - 0.2 * (g + 0.3 * w), w, g)
        problems.assert_close(hero_jax.msam_eval_params(state, params), w)
    assert reference.norm(reference.subtract(params, w)) > 5 * reference.norm(w)


@pytest.mark.parametrize("base", BASES)
def test_rho_0_is_the_base_optimizer(x64, base):
    params, _ = problem()
    expected, _ = taken(BASES[base], params, 20)
    for options in ({}, {"adaptive": True, "scope": "leaf"}):
        found, _ = taken(hero_jax.msam(BASES[base], 0.0, **options), params, 20)
        chex.assert_trees_all_equal(found, expected)


def test_rho_0_is_the_base_optimizer_under_jit(x64):
    """All products of the base are exact: XLA may fuse them into its sums."""
    params, _ = problem()
    base = optax.sgd(0.125, momentum=0.5)
    found, _ = taken(jitted(hero_jax.msam(base, 0.0)), params, 20)
    chex.assert_trees_all_equal(found, taken(base, params, 20)[0])


# --- no digit is lost ---


@pytest.mark.parametrize(
    ("dtype", "jit", "adaptive"),
    [
        *itertools.product((jnp.float16, jnp.bfloat16, jnp.float32), (True,), (True, False)),
        (jnp.bfloat16, False, False),
    ],
)
def test_weights_of_many_small_steps_are_those_of_the_base_in_every_digit(dtype, jit, adaptive):
    """Small weights under a large e, which 200 roundings would move; all products of the base are exact."""
    rng = np.random.default_rng(1)
    scales = {"large": np.ones((30, 7)), "small": np.geomspace(2e-5, 1e-2, 19)}
    params = {k: jnp.asarray(x * rng.normal(size=x.shape), dtype) for k, x in scales.items()}
    gradients = {k: rng.normal(size=(200, *x.shape)).astype(dtype) for k, x in scales.items()}
    base = optax.sgd(2.0**-12, momentum=0.5)

    def run(tx):
        def body(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, tx.init(params)
        if jit:
            return jax.lax.scan(body, carry, gradients)[0]
        for i in range(200):
            carry, _ = body(carry, {k: x[i] for k, x in gradients.items()})
        return carry

    expected, _ = run(base)
    for rho in (2.0, 0.0) if jit else (2.0,):
        found, state = run(hero_jax.msam(base, rho, adaptive=adaptive))
        chex.assert_trees_all_equal_dtypes(found, params)
        weights = hero_jax.msam_eval_params(state, found)
        chex.assert_trees_all_equal_dtypes(weights, params)
        chex.assert_trees_all_equal(weights, expected)
    assert all(bool(jnp.any(expected[k] != params[k])) for k in params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_types(dtype):
    params, batch = problem(dtype)
    tx = hero_jax.msam(optax.sgd(0.1), 0.5, adaptive=True)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(mean_grads(params, batch), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_tree_all_finite(updates)
    assert {x.dtype for x in jax.tree.leaves(after.momentum)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(hero_jax.msam_eval_params(after, updates), params)


# --- one answer in every program ---


@pytest.mark.parametrize("jit", [True, False])
def test_interrupted_run_continues_exactly(x64, jit):
    params, _ = problem()
    tx = hero_jax.msam(BASES["adamw"], lambda t: 0.2 + 0.05 * t, scope="leaf")
    tx = jitted(tx) if jit else tx
    whole = taken(tx, params, 7)
    kept = [np.asarray(x) for x in jax.tree.leaves(taken(tx, params, 4))]
    restored = jax.tree.structure((params, tx.init(params))).unflatten(kept)
    chex.assert_trees_all_equal(taken(tx, restored[0], 3, restored[1]), whole)
    weights = hero_jax.msam_eval_params(restored[1], restored[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(weights, params)


def test_evaluated_weights_outlive_a_step_that_overwrites_its_arguments():
    params, batch = problem(jnp.float32)
    tx = hero_jax.msam(optax.sgd(0.1, momentum=0.5), 0.3)
    step = jax.jit(lambda p, s: tx.update(mean_grads(p, batch), s, p), donate_argnums=(0, 1))
    state = tx.init(params)
    weights = hero_jax.msam_eval_params(state, params)
    before = jax.tree.map(np.array, params)
    step(params, state)
    chex.assert_trees_all_equal(weights, before)


@pytest.mark.parametrize("name", ["sam", "adaptive leaf"])
def test_scan_equals_a_loop(x64, name):
    params, batch = problem()
    tx = hero_jax.msam(BASES["adamw"], 0.4, **OPTIONS[name])
    problems.assert_close(jax.jit(scanned, static_argnums=(0, 3))(tx, params, batch, 5), taken(tx, params, 5))


def test_vmap_over_runs_equals_each_run(x64):
    params, batch = problem()
    rhos, decays = jnp.array([0.1, 0.4, 0.7]), jnp.array([0.3, 0.9, 0.6])

    def run(rho, decay):
        return scanned(hero_jax.msam(BASES["sgd"], rho, decay=decay), params, batch, 4)

    together = jax.jit(jax.vmap(run))(rhos, decays)
    for i, (rho, decay) in enumerate(zip(rhos, decays, strict=True)):
        alone = taken(hero_jax.msam(BASES["sgd"], float(rho), decay=float(decay)), params, 4)
        problems.assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone)


@pytest.mark.parametrize("layout", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
def test_layout_equals_one_device_with_the_whole_batch(x64, layout):
    params, batch = problem()
    tx = hero_jax.msam(BASES["sgd"], 0.4, adaptive=True)
    expected = taken(tx, params, 4)

    def local_grads(params, batch):
        return jax.grad(mean_loss)(parallel.vary(params, "data"), batch)

    def train(params, batch):
        mean = functools.partial(parallel.mean, axis_name="data")
        return scanned(tx, params, batch, 4, local_grads, mean)

    shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    if layout == "vmap":
        found = jax.jit(jax.vmap(train, in_axes=(None, 0), axis_name="data"))(params, shards)
    elif layout == "pmap":
        found = jax.pmap(train, in_axes=(None, 0), axis_name="data")(params, shards)
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
        specs = PartitionSpec(), PartitionSpec("data")
        check_vma = layout == "shard_map"
        # The state does not vary over devices, or the output would be refused.
        train = jax.shard_map(train, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
        problems.assert_close(jax.jit(train)(params, batch), expected)
        return
    for device in range(DEVICES):
        problems.assert_close(jax.tree.map(lambda x, i=device: x[i], found), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_equal_one_device_and_stay_split(x64, axis_type):
    params = {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(8)}
    params = problems.random_like(jax.random.key(0), params)
    tx = hero_jax.msam(BASES["sgd"], 0.4, adaptive=True)

    def train(params):
        def grad_fn(params, _):
            return jax.tree.map(lambda x: jnp.sinh(x - 0.3), params)

        params, state = scanned(tx, params, None, 3, grad_fn)
        return params, state, hero_jax.msam_eval_params(state, params)

    expected = train(params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(train)(split)
        problems.assert_close(found, expected)
        for x in jax.tree.leaves(found):
            if x.ndim:
                assert x.addressable_shards[0].data.size == x.size / 8
        for x in jax.tree.leaves(tx.init(split).weights):
            assert x.addressable_shards[0].data.size == x.size / 8


def test_takes_one_gradient_per_step():
    params, batch = problem(jnp.float32)
    tx = hero_jax.msam(optax.sgd(0.1), 0.4)
    taken = []

    def grad_fn(params):
        taken.append(1)
        return jax.grad(mean_loss)(params, batch)

    @jax.jit
    def step(params, state):
        # The other transformations need `grad_fn`, so a loop may pass it.
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn, value_fn=grad_fn, value=1.0)
        return optax.apply_updates(params, updates), state

    step(*step(params, tx.init(params)))
    assert len(taken) == 1


def test_base_optimizer_gets_the_extra_arguments_of_the_weights():
    got = {}

    def update_fn(updates, state, params, **extra_args):
        got.update(extra_args, params=params)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    tx, w = hero_jax.msam(base, 0.4), jnp.array([2.0, 3.0])
    updates, state = tx.update(w, tx.init(w), w)
    tx.update(w, state, w + updates, grad_fn=jnp.sin, value_fn=jnp.sin, value=7.0)
    assert set(got) == {"value", "params"}
    np.testing.assert_array_equal(got["params"], hero_jax.msam_eval_params(state, w))
    assert not np.allclose(got["params"], w + updates)


# --- inside the wrappers of Optax ---


def test_in_a_chain_after_clipping(x64):
    params, batch = problem()
    chained = optax.chain(optax.clip_by_global_norm(0.05), hero_jax.msam(BASES["adamw"], 0.4))
    alone = hero_jax.msam(BASES["adamw"], 0.4)
    found, state = taken(chained, params, 5)
    expected, alone_state = params, alone.init(params)
    for _ in range(5):
        g = mean_grads(expected, batch)
        assert reference.norm(g) > 0.05
        updates, alone_state = alone.update(reference.scale(0.05 / reference.norm(g), g), alone_state, expected)
        expected = optax.apply_updates(expected, updates)
    problems.assert_close(found, expected)
    w = hero_jax.msam_eval_params(state, found)
    problems.assert_close(w, hero_jax.msam_eval_params(alone_state, expected))


def test_injected_rho_changes_mid_run(x64):
    params, _ = problem()
    tx = optax.inject_hyperparams(hero_jax.msam, static_args=("optimizer", "scope"))(
        optimizer=BASES["sgd"], rho=0.2, scope="leaf"
    )
    found, state = taken(tx, params, 3)
    state.hyperparams["rho"] = jnp.asarray(0.6)
    found, state = taken(tx, found, 3, state)
    # An update makes the e of the step after it.
    w, e = defined(BASES["sgd"], params, 6, lambda t: 0.2 if t <= 3 else 0.6, scope="leaf")
    problems.assert_close(found, added(w, e))
    problems.assert_close(hero_jax.msam_eval_params(state, found), w)
    assert {"rho", "decay", "eps"} <= set(state.hyperparams)


def test_multi_steps_takes_the_mean_gradient_at_one_perturbation(x64):
    params, batch = problem()
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    tx = hero_jax.msam(BASES["adamw"], 0.4)
    tx = jitted(optax.MultiSteps(tx, every_k_schedule=2, accumulator_dtype=jnp.float64))
    state, found = tx.init(params), params
    for i in range(8):
        updates, state = tx.update(mean_grads(found, halves[i % 2]), state, found)
        found = optax.apply_updates(found, updates)
    w, e = defined(BASES["adamw"], params, 4, lambda t: 0.4)
    problems.assert_close(found, added(w, e))
    problems.assert_close(hero_jax.msam_eval_params(state, found), w)


def test_apply_if_finite_skips_a_step(x64):
    params, _ = problem()
    tx = jitted(optax.apply_if_finite(hero_jax.msam(BASES["adamw"], 0.4), max_consecutive_errors=3))
    found, state = taken(tx, params, 3)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, state = tx.update(bad, state, found)
    found = optax.apply_updates(found, updates)
    found, state = taken(tx, found, 3, state)
    w, e = defined(BASES["adamw"], params, 6, lambda t: 0.4)
    problems.assert_close(found, added(w, e))
    problems.assert_close(hero_jax.msam_eval_params(state, found), w)


# --- edges ---


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"scope": "leaf"}, {"eps": 0.0}])
def test_zero_gradients_perturb_nothing(x64, options):
    params, _ = problem()
    tx = hero_jax.msam(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5)), 0.4, **options)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    w = hero_jax.msam_eval_params(state, params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), w)
    problems.assert_close(w, reference.scale(0.95, params))


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_zero_leaf_empty_leaf_and_scalars(scope):
    params = {"zero": jnp.array([2.0, 3.0]), "empty": jnp.zeros((0, 3)), "scalar": jnp.float32(-1.5), "w": jnp.ones(4)}
    grads = params | {"zero": jnp.zeros(2), "scalar": jnp.float32(3.0), "w": jnp.full(4, 2.0)}
    tx = hero_jax.msam(optax.sgd(0.1), 0.5, scope=scope)
    updates, state = tx.update(grads, tx.init(params), params)
    w = hero_jax.msam_eval_params(state, params)
    e = reference.subtract(optax.apply_updates(params, updates), w)
    length = {"scalar": 3.0, "w": 4.0} if scope == "leaf" else {"scalar": 5.0, "w": 5.0}
    np.testing.assert_array_equal(e["zero"], 0)
    assert e["empty"].shape == (0, 3)
    np.testing.assert_allclose(e["scalar"], 0.5 * 3 / length["scalar"], rtol=1e-5)
    np.testing.assert_allclose(e["w"], 0.5 * 2 / length["w"], rtol=1e-5)


def test_parameters_may_be_one_scalar():
    tx, w = hero_jax.msam(optax.sgd(0.1), 0.5, adaptive=True), jnp.float32(2.0)
    updates, state = tx.update(jnp.float32(-3.0), tx.init(w), w)
    np.testing.assert_allclose(hero_jax.msam_eval_params(state, w), 2.3, rtol=1e-6)
    np.testing.assert_allclose(w + updates, 2.3 * (1 - 0.5), rtol=1e-6)


def test_weights_of_leaves_that_optax_masks_are_not_here():
    params = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([5.0])}
    tx = optax.masked(hero_jax.msam(optax.sgd(0.1), 0.5), {"a": True, "b": False})
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"], params["b"])
    with pytest.raises(hero_jax.ArgumentError, match=r"^`state.weights` must have .*; only `params` has params\['b'"):
        hero_jax.msam_eval_params(state, params)


# --- errors ---


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"rho": -0.1}, r"^`msam\(rho=...\)` must be non-negative and finite; got -0.1.$"),
        (ValueError, {"rho": np.nan}, r"^`msam\(rho=...\)` must be non-negative and finite; got nan.$"),
        (TypeError, {"rho": "large"}, r"^`msam\(rho=...\)` must be a real scalar; got 'large'.$"),
        (ValueError, {"decay": 1.1}, r"^`msam\(decay=...\)` must be between 0 and 1; got 1.1.$"),
        (ValueError, {"decay": -0.1}, r"^`msam\(decay=...\)` must be between 0 and 1; got -0.1.$"),
        (ValueError, {"scope": "leafs"}, r"^`msam\(scope=...\)` must be one of .*; got 'leafs'. Did you mean"),
        (ValueError, {"eps": -1.0}, r"^`msam\(eps=...\)` must be non-negative and finite; got -1.0.$"),
        (TypeError, {"adaptive": 1}, r"^`msam\(adaptive=...\)` must hold Python bools; at params it has 1.$"),
        (TypeError, {"optimizer": 0.1}, r"^`msam\(optimizer=...\)` must be an Optax optimizer; got 0.1.$"),
        (TypeError, {"optimizer": optax.sgd}, r"^`msam\(optimizer=...\)` must be .*; got a function \(sgd\).$"),
    ],
)
def test_refuses_arguments(error, options, message):
    with pytest.raises(error, match=message) as caught:
        hero_jax.msam(**{"optimizer": optax.sgd(0.1), "rho": 0.5} | options)
    assert isinstance(caught.value, hero_jax.ArgumentError) == (error is ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturb_mask": dict.fromkeys(KERNELS, False)}, r"^`msam\(perturb_mask=...\)` must select at least one"),
        ({"perturb_mask": {"other": True}}, r"^`msam\(perturb_mask=...\)` must have the structure of `params`;"),
        ({"adaptive": {"other": True}}, r"^`msam\(adaptive=...\)` must have the structure of `params`;"),
    ],
)
def test_refuses_masks_at_init(options, message):
    with pytest.raises(hero_jax.ArgumentError, match=message):
        hero_jax.msam(optax.sgd(0.1), 0.5, **options).init(problem(jnp.float32)[0])


def test_refuses_parameters():
    tx = hero_jax.msam(optax.sgd(0.1), 0.5)
    with pytest.raises(TypeError, match=r"^`params` must have floating-point leaves; at params\['n'\] it has int32.$"):
        tx.init({"n": jnp.arange(3)})


def test_refuses_updates():
    params, _ = problem(jnp.float32)
    tx = hero_jax.msam(optax.sgd(0.1), 0.5)
    state = tx.init(params)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`msam` needs `params`: call .*; got None.$"):
        tx.update(params, state)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`updates` must have the structure of `params`; only `params`"):
        tx.update({"bias": params["bias"]}, state, params)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`updates` must have the shapes of `params`; at params\['bias'"):
        tx.update(params | {"bias": jnp.ones(3)}, state, params)
    with pytest.raises(TypeError, match=r"^`msam` needs the `MsamState` that .*; got a tuple. Restore a saved state"):
        tx.update(params, tuple(state), params)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`state.weights` must have the structure of `params`; only"):
        tx.update(params, tx.init({"bias": params["bias"]}), params)
    scheduled = hero_jax.msam(optax.sgd(0.1), lambda t: jnp.ones(3))
    with pytest.raises(TypeError, match=r"^`msam\(rho=...\)` must be a real scalar; got an array of shape \(3,\).$"):
        scheduled.update(params, state, params)


@pytest.mark.parametrize("base", [hero_jax.sam(0.1), optax.chain(hero_jax.sam(0.1), optax.sgd(0.1))])
def test_cannot_wrap_what_needs_a_gradient_of_its_own(base):
    params, batch = problem(jnp.float32)
    tx = hero_jax.msam(base, 0.5)
    with pytest.raises(hero_jax.ArgumentError, match=r"^`sam` needs `grad_fn`"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: mean_grads(p, batch))


def test_eval_params_needs_one_state():
    params, _ = problem(jnp.float32)
    tx = hero_jax.msam(optax.sgd(0.1), 0.5)
    two = optax.partition({"a": tx, "b": tx}, {"hidden": "a", "bias": "b", "head": "b"}).init(params)
    for state, found in ((optax.adam(0.1).init(params), "0 in a tuple"), (two, "2 in a PartitionState")):
        with pytest.raises(hero_jax.ArgumentError, match=rf"\(state=...\)` must have one MsamState .*; got {found}.$"):
            hero_jax.msam_eval_params(state, params)
    with pytest.raises(hero_jax.ArgumentError, match=r"got 0 in a dict: the state comes first, then the parameters.$"):
        hero_jax.msam_eval_params(params, tx.init(params))
    with pytest.raises(hero_jax.ArgumentError, match=r"^`state.weights` must have the shapes of `params`; at params\["):
        hero_jax.msam_eval_params(tx.init(params), params | {"bias": jnp.ones(3)})

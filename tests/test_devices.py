"""One answer on every device layout: vmap axis, pmap, both shard_maps, sharded jit; and m-sharpness."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hero_jax
from hero_jax import parallel
from tests import problems, reference

DEVICES = 4
LAYOUTS = ("vmap", "pmap", "shard_map", "shard_map_unchecked")
# pmap is shard_map without its check, which one test shows for every transformation.
DISTINCT = ("vmap", "pmap", "shard_map")
# Every penalty that `hero` knows, its other options, and the other two transformations.
TRANSFORMATIONS = {
    **{
        penalty: functools.partial(hero_jax.hero, 0.3, 20.0, penalty=penalty)
        for penalty in ("detached", "difference", "hvp", "eigenvalue")
    },
    "by differences": functools.partial(hero_jax.hero, 0.3, 20.0, product="difference", suppress=0.5),
    "sam": functools.partial(hero_jax.sam, 0.3),
    "grad_l1": functools.partial(hero_jax.grad_l1, 0.3),
}
# Every transformation on the layout whose types say what varies, and a penalty on the others: a transformation knows
# its axis alone, whatever the layout, as `test_layout_equals_one_device_with_the_whole_batch` shows for all pairs.
PAIRS = [(name, "shard_map") for name in TRANSFORMATIONS] + [("detached", "pmap"), ("detached", "vmap")]
# Of directions, where it is not that of rounding.
RTOL = {"by differences": 1e-6}


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


def problem():
    """Parameters of a network of two layers, and a batch of 8: a small one, as each layout compiles it anew."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "head": rng.normal(size=(4, 2)),
    }
    return jax.tree.map(jnp.asarray, (params, (rng.normal(size=(8, 3)), rng.normal(size=(8, 2)))))


def mean_loss(params, batch):
    """Its third derivative is nowhere zero; the mean over devices is the mean over the batch."""
    x, y = batch
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean(jnp.cosh(x @ params["head"] - y))


def shards(batch):
    """The batch with a leading device axis."""
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def mapped(layout, step, mesh):
    """`step(params, state, batch)` of one device, mapped over the leading axis of `shards(batch)`.

    Returns direction and state of every device, stacked.
    """
    spec = PartitionSpec
    if layout == "vmap":
        return jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="data", axis_size=DEVICES))
    if layout == "pmap":
        return jax.pmap(step, in_axes=(None, None, 0), axis_name="data", devices=jax.devices()[:DEVICES])

    def one_shard(params, state, batch):
        result = step(params, state, jax.tree.map(lambda x: x[0], batch))
        return jax.tree.map(lambda x: x[None], result)

    check_vma = layout == "shard_map"
    in_specs = (spec(), spec(), spec("data"))
    return jax.jit(jax.shard_map(one_shard, mesh=mesh, in_specs=in_specs, out_specs=spec("data"), check_vma=check_vma))


@functools.cache
def run(layout, name, mesh, updates="local", sync=True):
    """Two steps at fixed parameters on 4 devices: (direction, state) of every device, stacked."""
    tx = TRANSFORMATIONS[name](axis_name="data", sync=sync)
    params, batch = problem()

    def step(params, state, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        grads = grad_fn(parallel.vary(params, "data")) if updates == "local" else grad_fn(params)
        return tx.update(grads, state, params, grad_fn=grad_fn)

    step = mapped(layout, step, mesh)
    _, state = step(params, tx.init(params), shards(batch))
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # identical on every device
    # On no device, as the first state: else it is compiled once more.
    return step(params, jax.tree.map(lambda x: np.asarray(x[0]), state), shards(batch))


def run_one(name, batch):
    """The same two steps on one device."""
    tx = TRANSFORMATIONS[name]()
    params, _ = problem()
    grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
    _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)


def assert_everywhere(stacked, expected, rtol=1e-10):
    for device in range(DEVICES):
        problems.assert_close(jax.tree.map(lambda x, i=device: x[i], stacked), expected, rtol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_layout_equals_one_device_with_the_whole_batch(x64, mesh, layout, name):
    direction, state = run(layout, name, mesh)
    expected, expected_state = run_one(name, problem()[1])
    assert_everywhere(direction, expected, RTOL.get(name, 1e-10))
    assert_everywhere(state, expected_state, rtol=1e-5)  # metrics are float32


@pytest.mark.parametrize("name", ["detached", "eigenvalue"])
def test_gradient_that_shard_map_has_summed_is_not_mistaken_for_a_local_one(x64, mesh, name):
    direction, _ = run("shard_map", name, mesh, updates="summed")
    assert_everywhere(direction, run_one(name, problem()[1])[0])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_sharded_jit_equals_one_device(x64, mesh, name):
    _, batch = problem()
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    direction, state = jax.jit(run_one, static_argnums=0)(name, sharded)
    expected, expected_state = run_one(name, batch)
    problems.assert_close(direction, expected, RTOL.get(name, 1e-10))
    problems.assert_close(state, expected_state, rtol=1e-5)


@pytest.mark.parametrize(("name", "layout"), [pair for pair in PAIRS if pair[0] != "eigenvalue"])
def test_without_sync_the_direction_is_the_mean_of_per_device_ones(x64, mesh, layout, name):
    direction, state = run(layout, name, mesh, sync=False)
    batches = shards(problem()[1])
    local = [run_one(name, jax.tree.map(lambda x, i=i: x[i], batches)) for i in range(DEVICES)]
    mean = jax.tree.map(lambda *x: sum(x) / DEVICES, *[d for d, _ in local])
    assert_everywhere(direction, mean, RTOL.get(name, 1e-10))
    metrics = jax.tree.map(lambda *x: sum(x) / DEVICES, *[s.metrics for _, s in local])
    assert_everywhere(state.metrics, metrics, rtol=1e-5)
    synced, _ = run(layout, name, mesh)
    assert reference.norm(reference.subtract(synced, direction)) > 1e-4 * reference.norm(direction)


@pytest.mark.parametrize("layout", DISTINCT)
def test_without_sync_the_eigenvector_follows_the_mean_product(x64, mesh, layout):
    params, batch = problem()
    batches = shards(batch)
    mask = problems.kernels_mask(params)
    v = reference.restrict(problems.random_like(jax.random.key(5), params), mask)
    v = reference.scale(1 / reference.norm(v), v)
    tx = TRANSFORMATIONS["eigenvalue"](axis_name="data", sync=False)
    state = tx.init(params)._replace(eigenvector=v)

    def step(params, state, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        return tx.update(grad_fn(parallel.vary(params, "data")), state, params, grad_fn=grad_fn)

    direction, state = mapped(layout, step, mesh)(params, state, batches)
    directions, products = [], []
    for i in range(DEVICES):
        loss_fn = functools.partial(mean_loss, batch=jax.tree.map(lambda x, i=i: x[i], batches))
        options = {"penalty": "eigenvalue", "adaptive": True, "mask": mask, "eigenvector": v}
        directions.append(reference.direction(loss_fn, params, 0.3, 20.0, **options))
        e = reference.perturbation(params, jax.grad(loss_fn)(params), 0.3, adaptive=True)
        products.append(reference.restrict(reference.hessian_vector(loss_fn, reference.add(params, e), v), mask))
    assert_everywhere(direction, jax.tree.map(lambda *x: sum(x) / DEVICES, *directions))
    product = jax.tree.map(lambda *x: sum(x), *products)
    assert_everywhere(state.eigenvector, reference.scale(1 / reference.norm(product), product))


def test_vary_is_the_identity_and_keeps_gradients_local(mesh):
    batch = jnp.arange(8.0)

    def step(w, x):
        varied = parallel.vary(w, "data")
        again = parallel.vary(varied, "data")
        return jax.grad(lambda w: w * x.mean())(again)[None], (again - w)[None]

    spec = PartitionSpec
    for check_vma in (True, False):
        grads, change = jax.shard_map(
            step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"), check_vma=check_vma
        )(jnp.float32(3.0), batch)
        np.testing.assert_allclose(grads, batch.reshape(DEVICES, -1).mean(axis=1))
        np.testing.assert_array_equal(change, 0)


def test_several_axis_names(x64):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("host", "chip"))
    params, batch = problem()
    tx = hero_jax.hero(0.3, 20.0, axis_name=("host", "chip"))

    def step(params, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    spec = PartitionSpec
    step = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec(("host", "chip"))), out_specs=spec())
    grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
    one = hero_jax.hero(0.3, 20.0)
    expected, _ = one.update(grad_fn(params), one.init(params), params, grad_fn=grad_fn)
    chex.assert_trees_all_close(jax.jit(step)(params, batch), expected, rtol=1e-9, atol=1e-12)


def test_state_does_not_vary_so_it_can_be_scanned_inside_shard_map(x64, mesh):
    params, batch = problem()
    tx = hero_jax.hero(0.3, 0.1, penalty="eigenvalue", axis_name="data")

    def train(params, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(grad_fn(parallel.vary(params, "data")), state, params, grad_fn=grad_fn)
            return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), state.metrics.penalty

        return jax.lax.scan(body, (params, tx.init(params)), length=5)

    spec = PartitionSpec
    train = jax.shard_map(train, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    (_, state), penalties = jax.jit(train)(params, batch)
    assert int(state.count) == 5
    assert np.isfinite(penalties).all()


# --- what else a step is given ---


def part_of(batch):
    """Every second example of a device."""
    return jax.tree.map(lambda x: x[::2], batch)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("layout", DISTINCT)
def test_suppression_with_a_part_of_the_batch_and_an_ascent(x64, mesh, layout, sync):
    params, batch = problem()
    batches = shards(batch)
    tx = hero_jax.hero(0.3, 20.0, suppress=0.5, axis_name="data", sync=sync)

    def momentum(batch):
        return jax.grad(mean_loss)(jax.tree.map(jnp.sin, parallel.vary(params, "data")), batch)

    def step(params, state, batch):
        grad_fn, part_fn = (functools.partial(jax.grad(mean_loss), batch=x) for x in (batch, part_of(batch)))
        grads = part_fn(parallel.vary(params, "data"))
        functions = {"grad_fn": grad_fn, "part_grad_fn": part_fn}
        return tx.update(grads, state, params, ascent=momentum(batch), **functions)

    direction, state = mapped(layout, step, mesh)(params, tx.init(params), batches)

    def defined(batch, part):
        return reference.direction(
            functools.partial(mean_loss, batch=batch),
            params,
            0.3,
            20.0,
            adaptive=True,
            mask=problems.kernels_mask(params),
            suppress=0.5,
            part_loss_fn=functools.partial(mean_loss, batch=part),
            ascent=jax.grad(mean_loss)(jax.tree.map(jnp.sin, params), batch),
        )

    devices = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(DEVICES)]
    local = [defined(batch, part_of(batch)) for batch in devices]
    mean = jax.tree.map(lambda *x: sum(x) / DEVICES, *local)
    whole = defined(batch, jax.tree.map(lambda *x: jnp.concatenate(x), *map(part_of, devices)))
    assert reference.norm(reference.subtract(mean, whole)) > 1e-2 * reference.norm(whole)
    assert_everywhere(direction, whole if sync else mean)
    assert state.metrics.penalty_grad_norm[0] > 0.01 * state.metrics.perturbed_grad_norm[0]


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("layout", DISTINCT)
def test_unperturbed_step_is_the_mean_gradient(x64, mesh, layout, sync):
    params, batch = problem()
    tx = TRANSFORMATIONS["eigenvalue"](axis_name="data", sync=sync)
    state = tx.init(params)._replace(eigenvector=params)

    def step(params, state, batch):
        grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
        grads = grad_fn(parallel.vary(params, "data"))
        return tx.update(grads, state, params, grad_fn=grad_fn, perturb=False)

    direction, state = mapped(layout, step, mesh)(params, state, shards(batch))
    assert_everywhere(direction, jax.grad(mean_loss)(params, batch))
    assert_everywhere(state.eigenvector, params)
    np.testing.assert_array_equal(state.count, 1)


# --- what is sent ---

# All-reduces of a step, smallest first, each as the number of vectors of all parameters in it and of leaves outside R
# alone: what depends on a mean waits for it. No product depends on those leaves, which may go with a later one.
REDUCED = {
    "detached": [(1, -1), (1, 0), (1, 1)],  # g* on R, g, H(w*) D d with the rest of g*
    "difference": [(1, -1), (1, 0), (1, 1)],  # g* on R, g, [H(w*) - H(w)] D d with the rest of g*
    "hvp": [(1, -1), (1, 0), (2, 0)],  # H(w) e on R, g, g* with T[e, D H(w) e]
    "eigenvalue": [(1, 0), (3, 0)],  # g, all of one nest
    "by differences": [(1, 0), (1, 0), (1, 0)],  # g, g*, H(w*) D d
    "sam": [(1, 0), (1, 0)],  # g, g*
    "grad_l1": [(1, -1), (1, 1)],  # g on R, H(w) sign(g) with the rest of g
}


def all_reduces(compiled):
    """The number of float32 entries in each all-reduce of a compiled program, smallest first."""
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text())
    shapes = [re.findall(r"f32\[([\d,]*)\]", result) for result in found]
    return sorted(sum(math.prod(int(n) for n in dims.split(",") if n) for dims in result) for result in shapes)


@pytest.mark.parametrize(("name", "layout"), [pair for pair in PAIRS if pair[1] != "vmap"])
def test_all_reduces_of_a_step(mesh, layout, name):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), problem())
    size = sum(x.size for x in jax.tree.leaves(params))
    num_metrics = len(hero_jax.Metrics._fields)
    for sync in (True, False):
        tx = TRANSFORMATIONS[name](axis_name="data", sync=sync)

        def step(params, state, batch, tx=tx):
            grad_fn = functools.partial(jax.grad(mean_loss), batch=batch)
            return tx.update(grad_fn(parallel.vary(params, "data")), state, params, grad_fn=grad_fn)

        compiled = mapped(layout, step, mesh).lower(params, tx.init(params), shards(batch)).compile()
        if sync:
            outside = sum(x.size for x in jax.tree.leaves(params) if x.ndim < 2)
            assert all_reduces(compiled) == [n * size + m * outside for n, m in REDUCED[name]]
        else:
            (sent,) = all_reduces(compiled)
            # A metric that is zero by definition is not sent.
            assert 0 <= (2 if name == "eigenvalue" else 1) * size + num_metrics - sent <= 1

"""Curvature products against dense matrices and closed forms, over every way to hand in the data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from hero_jax import Examples, Stream, curvature, sharpness, spectrum
from tests import problems, reference


def test_equals_the_dense_hessian(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    hessian = jax.jit(lambda p: reference.dense_hessian(lambda q: problems.convnet_loss(q, batch), p))(params)
    for seed in range(3):
        vector = problems.random_like(jax.random.key(seed), params)
        product = jax.jit(lambda v: curvature.hvp(problems.convnet_loss, params, v, batch))(vector)
        np.testing.assert_allclose(ravel_pytree(product)[0], hessian @ ravel_pytree(vector)[0], rtol=1e-9, atol=1e-12)


def test_equals_the_closed_form_of_logistic_regression(x64):
    x = jax.random.normal(jax.random.key(0), (11, 4))
    y = jnp.arange(11) % 2
    w, v = jnp.linspace(-1, 2, 4), jnp.linspace(1, 3, 4)

    def loss_fn(w, x, y):
        return optax.sigmoid_binary_cross_entropy(x @ w, y).mean()

    p = jax.nn.sigmoid(x @ w)
    expected = x.T @ ((p * (1 - p))[:, None] * x) @ v / 11
    np.testing.assert_allclose(curvature.hvp(loss_fn, w, v, x, y), expected, rtol=1e-12)


def test_is_linear_and_symmetric(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    u, v = (problems.random_like(jax.random.key(i), params) for i in (1, 2))

    @jax.jit
    def product(vector):
        return curvature.hvp(problems.convnet_loss, params, vector, batch)

    np.testing.assert_allclose(reference.dot(u, product(v)), reference.dot(v, product(u)), rtol=1e-10)
    combined = product(reference.add(reference.scale(2.0, u), v))
    problems.assert_close(combined, reference.add(reference.scale(2.0, product(u)), product(v)))


def test_solves_a_linear_system_through_its_transpose(x64):
    # jax.scipy's CG asks for a matvec that can be transposed.
    loss_fn, params, hessian = problems.quadratic()
    damped = jax.scipy.sparse.linalg.cg(
        lambda v: reference.add(curvature.hvp(loss_fn, params, v), reference.scale(3.0, v)), params, tol=1e-12
    )[0]
    flat, unravel = ravel_pytree(params)
    problems.assert_close(damped, unravel(np.linalg.solve(hessian + 3 * np.eye(14), flat)), rtol=1e-9)


def test_keeps_the_type_of_the_parameters():
    params = jnp.ones((3, 2), jnp.bfloat16)
    product = curvature.hvp(lambda w: jnp.sum(w**3), params, jnp.ones((3, 2)))
    assert product.dtype == jnp.bfloat16
    np.testing.assert_array_equal(product, 6)


def test_vector_that_does_not_match():
    with pytest.raises(ValueError, match=r"`vector` must have the shapes of `params`; at params\['w'\] it is \(3,\)"):
        curvature.hvp(lambda p: p["w"].sum(), {"w": jnp.ones(2)}, {"w": jnp.ones(3)})


def test_grad_product_is_the_product_of_its_gradient(x64):
    loss_fn, params, hessian = problems.quadratic()
    vector = problems.random_like(jax.random.key(0), params)
    product = curvature.grad_product(jax.grad(loss_fn), params, vector)
    np.testing.assert_allclose(ravel_pytree(product)[0], hessian @ ravel_pytree(vector)[0], rtol=1e-12)
    with pytest.raises(ValueError, match="`vector` must have the shapes of `params`"):
        curvature.grad_product(jax.grad(loss_fn), params, jax.tree.map(lambda x: x[:1], params))


def test_integer_parameters():
    with pytest.raises(TypeError, match="`params` must have floating-point leaves; at params it has int32"):
        curvature.hvp(lambda p: p.sum(), jnp.arange(2), jnp.arange(2))


# --- operators over data ---

N = 12
SHAPES = {"hidden": {"kernel": (4, 5), "bias": (5,)}, "head": [(5, 3), (3,)]}
MASKS = {
    "tree": {"hidden": {"kernel": True, "bias": False}, "head": [True, False]},
    "prefix": {"hidden": False, "head": True},
    "callable": problems.kernels_mask,
}
DRIVERS = ("whole", "dividing", "remainder", "larger", "one by one", "uneven", "generator", "single batches")
OPERATORS = ("hessian", "ggn", "fisher")


def net_params(dtype=jnp.float64):
    zeros = jax.tree.map(lambda s: jnp.zeros(s, dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.map(lambda x: 0.6 * x, problems.random_like(jax.random.key(4), zeros))


def net_batch(size=N, dtype=jnp.float64):
    """Inputs, labels in 0..2 and the weight of each example, some of them zero: a padded token."""
    keys = jax.random.split(jax.random.key(5), 3)
    return {
        "x": jax.random.normal(keys[0], (size, 4), dtype),
        "label": jax.random.randint(keys[1], (size,), 0, 3),
        "weight": jax.random.randint(keys[2], (size,), 0, 4).astype(dtype),
    }


def net(params, batch):
    kernel, bias = params["head"]
    return jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ kernel + bias


def cross_entropies(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]


def head_loss(logits, batch):
    return cross_entropies(logits, batch).mean()


def net_losses(params, batch):
    return cross_entropies(net(params, batch), batch)


def net_loss(params, batch):
    return net_losses(params, batch).mean()


def token_loss(params, batch):
    """The mean over valid tokens."""
    return (batch["weight"] * net_losses(params, batch)).sum() / batch["weight"].sum()


def token_head_loss(logits, batch):
    return (batch["weight"] * cross_entropies(logits, batch)).sum() / batch["weight"].sum()


def token_weight(batch):
    return batch["weight"].sum()


def make(kind, params, batch=None, *, mask=None, coupled=False, **data):
    """The operator of the small network, over what `problems.given` makes of `batch` and `data`."""
    arguments, options = (params, problems.given(batch, **data)), {"mask": mask, "coupled": coupled}
    if kind == "hessian":
        return curvature.hessian_operator(net_loss, *arguments, **options)
    if kind == "ggn":
        return curvature.ggn_operator(net, head_loss, *arguments, **options)
    return curvature.empirical_fisher_operator(net_losses, *arguments, **options)


@jax.jit
def compiled(operator, vector):
    return operator(vector)


def rows(batch, start, stop):
    return jax.tree.map(lambda x: x[start:stop], batch)


def drive(driver, batch):
    """How `batch` is handed to an operator: arguments of `problems.given`."""
    cuts = {"uneven": [0, 5, 6, 12], "generator": [0, 4, 8, 12], "single batches": list(range(13))}.get(driver)
    if cuts is None:
        size = {"whole": None, "dividing": 4, "remainder": 5, "larger": 40, "one by one": 1}[driver]
        return {"batch": batch, "microbatch_size": size}
    batches = [rows(batch, a, b) for a, b in itertools.pairwise(cuts)]
    return {"batches": (lambda: (b for b in batches)) if driver == "generator" else batches}


def dense_operator(operator, params):
    """Its matrix, in the order of ravel_pytree(params)."""
    flat, unravel = ravel_pytree(params)
    product = jax.jit(jax.vmap(lambda e: ravel_pytree(operator(unravel(e)))[0]))
    return np.asarray(product(jnp.eye(len(flat), dtype=flat.dtype))).T


def dense_reference(kind, params, batch):
    """H by jax.hessian; J^T (d^2 l / df^2) J and the mean of g g^T by dense Jacobians, example by example."""
    flat, unravel = ravel_pytree(params)
    if kind == "hessian":
        return np.asarray(jax.jit(lambda p: reference.dense_hessian(lambda q: net_loss(q, batch), p))(params))
    if kind == "fisher":
        grads = np.asarray(jax.jit(jax.jacobian(lambda w: net_losses(unravel(w), batch)))(flat))
        return sum(np.outer(g, g) for g in grads) / len(grads)
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda w: net(unravel(w), batch)))(flat))
    p = np.asarray(jax.nn.softmax(net(params, batch)))
    blocks = [j.T @ (np.diag(q) - np.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)]
    return sum(blocks) / len(blocks)


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_equal_dense_matrices(x64, kind):
    params, batch = net_params(), net_batch()
    expected = dense_reference(kind, params, batch)
    matrix = dense_operator(make(kind, params, batch), params)
    np.testing.assert_allclose(matrix, expected, atol=1e-13)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(matrix)
    if kind == "hessian":
        assert eigenvalues[0] < -1e-3
    else:
        assert eigenvalues[0] > -1e-13
    for other in set(OPERATORS) - {kind}:
        assert np.abs(expected - dense_reference(other, params, batch)).max() > 0.01 * np.abs(expected).max()


def test_convolutional_network(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch(6)
    vector = problems.random_like(jax.random.key(0), params)
    hessian = jax.jit(lambda p: reference.dense_hessian(lambda q: problems.separable_loss(q, batch), p))(params)
    operator = curvature.hessian_operator(problems.separable_loss, params, Examples(batch, microbatch_size=4))
    np.testing.assert_allclose(ravel_pytree(operator(vector))[0], hessian @ ravel_pytree(vector)[0], atol=1e-12)


def test_linear_regression(x64):
    # L = sum_c (x w - y)_c^2 / 2: H = G = I x X^T X / N.
    x, y = jax.random.normal(jax.random.key(0), (11, 4)), jax.random.normal(jax.random.key(1), (11, 2))
    w = jax.random.normal(jax.random.key(2), (4, 2))
    v = jax.random.normal(jax.random.key(3), (4, 2))

    def losses_fn(outputs, batch):
        return 0.5 * ((outputs - batch[1]) ** 2).sum(1)

    operators = [
        curvature.hessian_operator(lambda w, b: losses_fn(b[0] @ w, b).mean(), w, (x, y)),
        curvature.ggn_operator(lambda w, b: b[0] @ w, lambda f, b: losses_fn(f, b).mean(), w, (x, y)),
    ]
    for operator in operators:
        np.testing.assert_allclose(operator(v), x.T @ x @ v / 11, rtol=1e-12)
    # g_n = x_n r_n^T
    residuals = x @ w - y
    fisher = curvature.empirical_fisher_operator(lambda w, b: losses_fn(b[0] @ w, b), w, (x, y))
    inner = np.einsum("ni,nc,ic->n", x, residuals, v)
    np.testing.assert_allclose(fisher(v), np.einsum("ni,nc,n->ic", x, residuals, inner) / 11, rtol=1e-12)


def test_logistic_regression(x64):
    x, y = jax.random.normal(jax.random.key(0), (11, 4)), (jnp.arange(11) % 3 > 0) * 1.0
    w, v = jnp.linspace(-1, 2, 4), jnp.linspace(1, 3, 4)

    def losses_fn(logits, batch):
        return optax.sigmoid_binary_cross_entropy(logits, batch[1])

    p = jax.nn.sigmoid(x @ w)
    hessian = x.T @ ((p * (1 - p))[:, None] * x) / 11
    operator = curvature.hessian_operator(
        lambda w, b: losses_fn(b[0] @ w, b).mean(), w, Examples((x, y), microbatch_size=3)
    )
    np.testing.assert_allclose(operator(v), hessian @ v, rtol=1e-12)
    operator = curvature.ggn_operator(lambda w, b: b[0] @ w, lambda f, b: losses_fn(f, b).mean(), w, (x, y))
    np.testing.assert_allclose(operator(v), hessian @ v, rtol=1e-12)
    fisher = curvature.empirical_fisher_operator(
        lambda w, b: losses_fn(b[0] @ w, b), w, Examples((x, y), microbatch_size=3)
    )
    np.testing.assert_allclose(fisher(v), x.T @ (((p - y) ** 2)[:, None] * x) @ v / 11, rtol=1e-12)


def test_softmax_regression(x64):
    batch = net_batch(11)
    x, labels = np.asarray(batch["x"]), np.asarray(batch["label"])
    w, v = jax.random.normal(jax.random.key(2), (4, 3)), jax.random.normal(jax.random.key(3), (4, 3))
    p = np.asarray(jax.nn.softmax(x @ w))
    hessian = sum(np.kron(np.outer(xn, xn), np.diag(pn) - np.outer(pn, pn)) for xn, pn in zip(x, p, strict=True)) / len(
        x
    )
    expected = (hessian @ np.asarray(v).ravel()).reshape(4, 3)

    def model_fn(w, batch):
        return batch["x"] @ w

    operator = curvature.hessian_operator(lambda w, b: head_loss(model_fn(w, b), b), w, batch)
    np.testing.assert_allclose(operator(v), expected, rtol=1e-11)
    np.testing.assert_allclose(curvature.ggn_operator(model_fn, head_loss, w, batch)(v), expected, rtol=1e-11)
    errors = p - np.eye(3)[labels]
    inner = np.einsum("ni,nc,ic->n", x, errors, v)
    fisher = curvature.empirical_fisher_operator(lambda w, b: cross_entropies(model_fn(w, b), b), w, batch)
    np.testing.assert_allclose(fisher(v), np.einsum("ni,nc,n->ic", x, errors, inner) / 11, rtol=1e-11)


def test_outputs_may_be_a_tree(x64):
    params, batch = net_params(), net_batch()

    def model_fn(params, batch):
        return {"logits": net(params, batch), "norm": (params["head"][0] ** 2).sum()[None]}

    def loss_fn(outputs, batch):
        return head_loss(outputs["logits"], batch) + jnp.exp(outputs["norm"].sum())

    operator = curvature.ggn_operator(model_fn, loss_fn, params, batch)
    flat, unravel = ravel_pytree(params)

    def outputs(w):
        return ravel_pytree(model_fn(unravel(w), batch))[0]

    _, unravel_outputs = ravel_pytree(model_fn(params, batch))
    jacobian = jax.jit(jax.jacobian(outputs))(flat)
    middle = jax.jit(jax.hessian(lambda f: loss_fn(unravel_outputs(f), batch)))(outputs(flat))
    np.testing.assert_allclose(dense_operator(operator, params), jacobian.T @ middle @ jacobian, atol=1e-10)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_drivers_equal_the_single_batch(x64, kind, driver):
    params, batch = net_params(), net_batch()
    vector = problems.random_like(jax.random.key(0), params)
    expected = make(kind, params, batch)(vector)
    operator = make(kind, params, **drive(driver, batch))
    problems.assert_close(operator(vector), expected)
    problems.assert_close(operator(vector), expected)  # a second pass
    assert isinstance(operator, curvature.HostOperator) == (driver in DRIVERS[5:])


@pytest.mark.parametrize("driver", DRIVERS[1:7])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_weights_of_batches(x64, kind, driver):
    params, batch = net_params(), net_batch()
    batch["weight"] = 0.5 * batch["weight"] + 0.25  # no batch without a valid token
    vector = problems.random_like(jax.random.key(0), params)
    if kind == "hessian":
        make_token = functools.partial(curvature.hessian_operator, token_loss, params)
    else:
        make_token = functools.partial(curvature.ggn_operator, net, token_head_loss, params)
    expected = make_token(batch)(vector)
    problems.assert_close(make_token(problems.given(**drive(driver, batch), weight_fn=token_weight))(vector), expected)
    if driver != "larger":
        # By the numbers of examples it is another matrix.
        unweighted = make_token(problems.given(**drive(driver, batch)), coupled=True)(vector)
        assert reference.norm(reference.subtract(unweighted, expected)) > 1e-3 * reference.norm(expected)
        with pytest.raises(ValueError, match="needs a loss whose batches can be split"):
            make_token(problems.given(**drive(driver, batch)))


def test_weights_that_float32_rounds(x64):
    params, batch = net_params(), net_batch()
    batch["weight"] = 0.37 * batch["weight"] + 0.1
    vector = problems.random_like(jax.random.key(0), params)
    expected = curvature.hessian_operator(token_loss, params, batch)(vector)
    operator = curvature.hessian_operator(
        token_loss, params, Examples(batch, microbatch_size=5, weight_fn=token_weight)
    )
    problems.assert_close(operator(vector), expected)


@pytest.mark.parametrize(
    ("kind", "name", "driver"),
    [
        ("hessian", "tree", "whole"),
        ("hessian", "prefix", "uneven"),
        ("hessian", "callable", "remainder"),
        ("ggn", "tree", "remainder"),
        ("ggn", "prefix", "whole"),
        ("fisher", "tree", "uneven"),
        ("fisher", "callable", "whole"),
    ],
)
def test_mask_is_a_block_of_the_whole(x64, kind, name, driver):
    params, batch = net_params(), net_batch()
    mask = MASKS[name]
    kept = curvature.restrict(params, mask)
    full = jax.tree.broadcast(mask(params) if callable(mask) else mask, params)
    index = np.asarray(ravel_pytree(jax.tree.map(lambda k, x: jnp.full(x.shape, k * 1.0), full, params))[0]) > 0
    assert 0 < index.sum() < len(index)
    expected = dense_reference(kind, params, batch)[np.ix_(index, index)]
    vector = problems.random_like(jax.random.key(0), kept)
    result = make(kind, params, **drive(driver, batch), mask=mask)(vector)
    assert jax.tree.structure(result) == jax.tree.structure(kept) != jax.tree.structure(params)
    np.testing.assert_allclose(ravel_pytree(result)[0], expected @ ravel_pytree(vector)[0], atol=1e-12)


def test_mask_lets_integer_leaves_stay(x64):
    params, batch = net_params(), net_batch()
    with_step = {"net": params, "step": jnp.arange(2)}
    operator = curvature.hessian_operator(
        lambda p, b: net_loss(p["net"], b) * p["step"][1], with_step, batch, mask={"net": True, "step": False}
    )
    vector = problems.random_like(jax.random.key(0), params)
    result = operator({"net": vector, "step": None})
    problems.assert_close(result["net"], make("hessian", params, batch)(vector))
    assert result["step"] is None


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("activation", [problems.smooth, problems.smoother])
@pytest.mark.parametrize("kind", OPERATORS)
def test_custom_vjp_changes_nothing(x64, kind, activation, jit):
    """Layers with rules of their own have no forward mode; J v comes from two reverse passes."""
    params, batch = net_params(), net_batch()
    vector = problems.random_like(jax.random.key(0), params)
    expected = make(kind, params, batch)(vector)

    def model_fn(params, batch):
        kernel, bias = params["head"]
        return activation(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ kernel + bias

    def losses_fn(params, batch):
        return cross_entropies(model_fn(params, batch), batch)

    operator = {
        "hessian": lambda: curvature.hessian_operator(lambda p, b: losses_fn(p, b).mean(), params, batch),
        "ggn": lambda: curvature.ggn_operator(model_fn, head_loss, params, batch),
        "fisher": lambda: curvature.empirical_fisher_operator(losses_fn, params, batch),
    }[kind]()
    problems.assert_close((compiled(operator, vector) if jit else operator(vector)), expected)
    direction = jax.tree.map(lambda x: 0.1 * x, vector)
    found = sharpness.increase_along(lambda p: losses_fn(p, batch).mean(), params, direction)
    problems.assert_close(found, sharpness.increase_along(lambda p: net_loss(p, batch), params, direction))


# --- devices ---


def one_device(kind, batch, weight_fn=None, **options):
    params = net_params()
    vector = problems.random_like(jax.random.key(0), params)
    if weight_fn is not None:
        return curvature.hessian_operator(token_loss, params, Examples(batch, weight_fn=weight_fn, **options))(vector)
    return make(kind, params, batch, **options)(vector)


@pytest.mark.parametrize(
    ("layout", "microbatch_size"),
    [
        ("vmap", 2),
        ("pmap", None),
        ("pmap", 3),
        ("shard_map", None),
        ("shard_map", 2),
        ("shard_map", 3),
        ("shard_map_unchecked", 2),
    ],
)
def test_axis_name_equals_one_device(x64, layout, microbatch_size):
    params, batch = net_params(), net_batch(16)
    batch["weight"] = batch["weight"] + 0.25
    vector = problems.random_like(jax.random.key(0), params)
    shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
    options = {"axis_name": "data", "microbatch_size": microbatch_size}

    def products(params, vector, batch):
        token = curvature.hessian_operator(token_loss, params, Examples(batch, weight_fn=token_weight, **options))
        return [*(make(kind, params, batch, **options)(vector) for kind in OPERATORS), token(vector)]

    if layout == "vmap":
        mapped = jax.jit(jax.vmap(products, in_axes=(None, None, 0), axis_name="data"))
    elif layout == "pmap":
        mapped = jax.pmap(products, in_axes=(None, None, 0), axis_name="data", devices=jax.devices()[:4])
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
        spec = PartitionSpec
        mapped = jax.jit(
            jax.shard_map(
                lambda p, v, b: products(p, v, rows_of_shard(b)),
                mesh=mesh,
                in_specs=(spec(), spec(), spec("data")),
                out_specs=spec(),
                check_vma=layout == "shard_map",
            )
        )
    results = mapped(params, vector, shards)
    expected = [*(one_device(kind, batch) for kind in OPERATORS), one_device("hessian", batch, token_weight)]
    for result, one in zip(results, expected, strict=True):
        stacked = jax.tree.map(lambda x: x[None], result) if layout.startswith("shard_map") else result
        for device in range(len(jax.tree.leaves(stacked)[0])):
            problems.assert_close(jax.tree.map(lambda x, i=device: x[i], stacked), one)


def rows_of_shard(batch):
    return jax.tree.map(lambda x: x[0], batch)


@pytest.mark.parametrize(
    ("kind", "microbatch_size"), [("hessian", None), ("hessian", 8), ("hessian", 5), ("ggn", 8), ("fisher", 8)]
)
def test_sharded_batch_under_jit(x64, kind, microbatch_size):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    batch = net_batch(32)
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    problems.assert_close(one_device(kind, sharded, microbatch_size=microbatch_size), one_device(kind, batch))


def test_microbatches_of_a_sharded_batch_stay_sharded():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    params, batch = net_params(jnp.float32), net_batch(64, jnp.float32)
    params, batch = jax.device_put(
        (params, batch), (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))
    )

    def collectives(microbatch_size):
        operator = make("hessian", params, batch, microbatch_size=microbatch_size)
        text = compiled.lower(operator, params).compile().as_text()
        return [op for op in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if op in text]

    assert collectives(16) == ["all-reduce"]
    assert collectives(24) != ["all-reduce"]  # not dividing: in order, so across devices


# --- types, memory, compilation ---


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_small_vectors_do_not_vanish_in_16_bits(kind, dtype):
    params = net_params(dtype)
    operator = make(kind, params, net_batch(dtype=dtype))
    vector = jax.tree.map(lambda x: x.astype(jnp.float32), problems.random_like(jax.random.key(0), params))
    small, normal = operator(reference.scale(1e-9, vector)), operator(vector)
    problems.assert_close(small, reference.scale(1e-9, normal), rtol=1e-5)
    assert ravel_pytree(normal)[0].any()


@pytest.mark.parametrize(("dtype", "driver"), [(jnp.float32, "uneven"), (jnp.bfloat16, "remainder")])
def test_results_are_wide(dtype, driver):
    params, batch = net_params(dtype), net_batch(dtype=dtype)
    vector = problems.random_like(jax.random.key(0), params)
    wide = {**jax.tree.map(lambda x: x.astype(jnp.float32), batch), "label": batch["label"]}
    exact = [make(kind, jax.tree.map(lambda x: x.astype(jnp.float32), params), wide) for kind in OPERATORS]
    for kind, one in zip(OPERATORS, exact, strict=True):
        result = make(kind, params, coupled=True, **drive(driver, batch))(vector)
        assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}
        expected = ravel_pytree(one(jax.tree.map(lambda x: x.astype(jnp.float32), vector)))[0]
        error = np.linalg.norm(ravel_pytree(result)[0] - expected) / np.linalg.norm(expected)
        assert error < (1e-5 if dtype == jnp.float32 else 0.05)


# Dividing the number of examples, or not.
@pytest.mark.parametrize(("kind", "microbatch_size"), [("hessian", 64), ("hessian", 60), ("ggn", 64), ("fisher", 64)])
def test_memory_is_that_of_one_microbatch(kind, microbatch_size):
    params = net_params(jnp.float32)
    params["hidden"] = {"kernel": jnp.ones((4, 300)), "bias": jnp.ones(300)}
    params["head"][0] = jnp.ones((300, 3))

    def temporaries(size, microbatch_size):
        batch = net_batch(size, jnp.float32)
        operator = make(kind, params, batch, microbatch_size=microbatch_size)
        return compiled.lower(operator, params).compile().memory_analysis().temp_size_in_bytes

    one = temporaries(64, None)
    assert temporaries(64 * 64, None) > 20 * one
    # The data themselves (24 bytes an example) may be copied once.
    assert temporaries(64 * 64, microbatch_size) < 2.5 * one + 24 * 64 * 64


def test_checkpoint_inside_the_loss(x64):
    params, batch = net_params(), net_batch()
    vector = problems.random_like(jax.random.key(0), params)
    checkpointed = jax.checkpoint(net_loss)
    expected = make("hessian", params, batch)(vector)
    for driver in ("dividing", "uneven"):
        operator = curvature.hessian_operator(checkpointed, params, problems.given(**drive(driver, batch)))
        problems.assert_close(operator(vector), expected)


def test_operators_are_compiled_once_for_new_parameters():
    traces = []

    def counted_loss(params, batch):
        traces.append(1)
        return net_loss(params, batch)

    call = jax.jit(lambda operator, vector: operator(vector))
    batch = net_batch(dtype=jnp.float32)
    counts, results = [], []
    for scale in (1.0, 0.5, 0.25):
        params = jax.tree.map(lambda x, s=scale: s * x, net_params(jnp.float32))
        results.append(call(curvature.hessian_operator(counted_loss, params, batch), params))
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]
    assert not np.allclose(results[0]["head"][0], results[1]["head"][0])
    # Streamed: once a size of batch.
    counts = []
    for scale in (1.0, 0.5, 0.25):
        params = jax.tree.map(lambda x, s=scale: s * x, net_params(jnp.float32))
        operator = curvature.hessian_operator(counted_loss, params, problems.given(**drive("uneven", batch)))
        operator(params), operator(params)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]


def test_solvers_take_every_driver(x64):
    params, batch = net_params(), net_batch()
    mask = {"hidden": {"kernel": False, "bias": True}, "head": [False, True]}
    kept = curvature.restrict(params, mask)
    eigenvalues = []
    for driver in ("whole", "remainder", "uneven"):
        operator = make("hessian", params, **drive(driver, batch), mask=mask)
        pairs = spectrum.top_eigenpairs(operator, jax.random.key(0), k=2, rtol=1e-8)
        krylov = spectrum.lanczos(operator, kept, num_steps=6)
        trace = spectrum.trace(operator, jax.random.key(0), num_probes=12)
        assert pairs.converged.all()
        eigenvalues.append(np.concatenate([pairs.eigenvalues, krylov.eigenvalues, trace.mean[None], trace.sem[None]]))
    for other in eigenvalues[1:]:
        np.testing.assert_allclose(other, eigenvalues[0], rtol=1e-8)
    flat = np.asarray(ravel_pytree(jax.tree.map(lambda k, x: jnp.full(x.shape, k * 1.0), mask, params))[0]) > 0
    truth = np.linalg.eigvalsh(dense_reference("hessian", params, batch)[np.ix_(flat, flat)])
    np.testing.assert_allclose(eigenvalues[0][:2], truth[np.argsort(-np.abs(truth))][:2], rtol=1e-8)
    np.testing.assert_allclose(eigenvalues[0][2 + 6], truth.sum(), atol=5 * eigenvalues[0][-1])


def test_operator_made_inside_jit(x64):
    params, batch = net_params(), net_batch()
    vector = problems.random_like(jax.random.key(0), params)

    @jax.jit
    def run(params, batch, vector):
        return [make(kind, params, batch, microbatch_size=4)(vector) for kind in OPERATORS]

    for result, kind in zip(run(params, batch, vector), OPERATORS, strict=True):
        problems.assert_close(result, make(kind, params, batch)(vector))


# --- misuse ---


def batch_norm_loss(params, batch):
    x = batch["x"] @ params
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 0.1)
    return jnp.mean(x[:, 0] * jnp.sin(batch["label"] + x[:, 1]))


@jax.jit
def whole_product(params, vector, batch):
    return curvature.hvp(batch_norm_loss, params, vector, batch)


@pytest.mark.parametrize("driver", ["dividing", "remainder", "one by one", "uneven", "generator"])
def test_loss_that_couples_its_batch(x64, driver):
    batch = net_batch()
    params, vector = jnp.linspace(-1, 2, 8).reshape(4, 2), jnp.linspace(1, 2, 8).reshape(4, 2)
    with pytest.raises(
        ValueError, match="`hessian_operator` needs a loss whose batches can be split, or `coupled=True`"
    ):
        curvature.hessian_operator(batch_norm_loss, params, problems.given(**drive(driver, batch)))
    if driver in ("dividing", "remainder"):
        # The mean over the batches of their Hessians, not that of the whole.
        operator = curvature.hessian_operator(
            batch_norm_loss, params, problems.given(**drive(driver, batch)), coupled=True
        )
        parts = (
            [jax.tree.map(lambda x, i=i: x[i::3], batch) for i in range(3)]
            if driver == "dividing"
            else [rows(batch, 0, 5), rows(batch, 5, 10), rows(batch, 10, 12)]
        )
        sizes = [len(part["x"]) for part in parts]
        products = [whole_product(params, vector, part) for part in parts]
        expected = sum(s * p for s, p in zip(sizes, products, strict=True)) / 12
        np.testing.assert_allclose(operator(vector), expected, rtol=1e-11)
        assert not np.allclose(expected, whole_product(params, vector, batch), rtol=1e-2)


def test_loss_whose_mean_cancels_is_not_coupled():
    x = jnp.array([[1.0], [-1.0], [3.0], [-3.0], [1.0]]) * jnp.array([0.1, 0.7])

    def loss_fn(w, x):
        return jnp.mean(x @ w**3)

    operator = curvature.hessian_operator(loss_fn, jnp.array([0.3, 0.9]), Examples(x, microbatch_size=2))
    np.testing.assert_allclose(operator(jnp.ones(2)), 6 * jnp.array([0.3, 0.9]) * x.mean(0), rtol=1e-4)


def test_no_weight_at_all_is_an_error():
    batch = net_batch(dtype=jnp.float32) | {"weight": jnp.zeros(N)}
    params = net_params(jnp.float32)
    operator = curvature.hessian_operator(token_loss, params, Stream([batch, batch], weight_fn=token_weight))
    with pytest.raises(ValueError, match=r"`Stream\(batches=...\)` must have a total weight other than 0"):
        operator(params)


@pytest.mark.parametrize("driver", ["whole", "larger"])
def test_coupled_loss_of_a_batch_that_is_not_split(x64, driver):
    params, vector, batch = jnp.linspace(-1, 2, 8).reshape(4, 2), jnp.linspace(1, 2, 8).reshape(4, 2), net_batch()
    operator = curvature.hessian_operator(batch_norm_loss, params, problems.given(**drive(driver, batch)))
    problems.assert_close(operator(vector), whole_product(params, vector, batch))


def test_coupled_models_of_the_other_operators(x64):
    batch, params = net_batch(), jnp.linspace(-1, 2, 12).reshape(4, 3)

    def model_fn(params, batch):
        x = batch["x"] @ params
        return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 0.1)

    def losses_fn(params, batch):
        return cross_entropies(model_fn(params, batch), batch)

    with pytest.raises(ValueError, match="`ggn_operator` needs a loss whose batches can be split"):
        curvature.ggn_operator(model_fn, head_loss, params, Examples(batch, microbatch_size=4))
    with pytest.raises(ValueError, match="`empirical_fisher_operator` needs a loss whose batches can be split"):
        curvature.empirical_fisher_operator(losses_fn, params, Examples(batch, microbatch_size=4))
    curvature.ggn_operator(model_fn, head_loss, params, Examples(batch, microbatch_size=4), coupled=True)
    curvature.empirical_fisher_operator(losses_fn, params, Examples(batch, microbatch_size=4), coupled=True)


def test_iterator_handed_out_twice_is_an_error(x64):
    params, batch = net_params(), net_batch()
    vector = problems.random_like(jax.random.key(0), params)
    expected = make("hessian", params, batch)(vector)
    for coupled in (False, True):
        once = iter([rows(batch, 0, 6), rows(batch, 6, 12)])
        errors, products = [], []
        # The first product may be refused; it must not be that of a part of the data.
        for _ in range(2):
            try:
                operator = make("hessian", params, batches=lambda once=once: once, coupled=coupled)
                products.append(operator(vector))
            except ValueError as error:
                errors.append(str(error))
        assert errors
        assert all("`Stream(batches=...)` must give" in error for error in errors)
        for result in products:
            problems.assert_close(result, expected)


def test_data_that_change_from_pass_to_pass():
    params, batch = net_params(jnp.float32), net_batch(dtype=jnp.float32)
    passes = []

    def batches():
        passes.append(1)
        return [rows(batch, 0, 8 if len(passes) < 3 else 7)]

    operator = make("hessian", params, batches=batches)
    operator(params)
    message = "must give the same data on every pass; the first had a total weight of 8, a later one 7"
    with pytest.raises(ValueError, match=message):
        operator(params)


def test_host_operator_is_not_traced():
    params, batch = net_params(jnp.float32), net_batch(dtype=jnp.float32)
    operator = make("hessian", params, batches=[batch])
    with pytest.raises(TypeError, match="A `HostOperator` runs on the host and cannot be traced"):
        jax.jit(operator)(params)


@pytest.mark.parametrize("driver", ["whole", "uneven"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_vector_of_another_structure(kind, driver):
    params, batch = net_params(jnp.float32), net_batch(dtype=jnp.float32)
    operator = make(kind, params, **drive(driver, batch))
    with pytest.raises(ValueError, match="`vector` must have the structure of `like`"):
        operator({"hidden": params["hidden"]})
    with pytest.raises(ValueError, match="`vector` must have the shapes of `like`"):
        operator({**params, "head": [jnp.ones((3, 5)), jnp.ones(3)]})
    masked = make(kind, params, **drive(driver, batch), mask=MASKS["tree"])
    with pytest.raises(ValueError, match="`vector` must have the structure of `like`"):
        masked(params)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": None}, ValueError, r"`{}\(data=...\)` must have at least one array; got None"),
        ({"batches": []}, ValueError, r"`Stream\(batches=...\)` must give at least one batch; got none"),
        ({"batches": iter([1])}, TypeError, r"`Stream\(batches=...\)` must be iterable more than once"),
        (
            {"batches": (x for x in [1])},
            TypeError,
            r"`Stream\(batches=...\)` must be iterable more than once, .*; got a generator",
        ),
        ({"batches": 3}, TypeError, r"`Stream\(batches=...\)` must be an iterable, or a function .*; got 3"),
        ({"batches": lambda: 3}, TypeError, r"`Stream\(batches=...\)` must return an iterable; it returned 3"),
        ({"batch": {}}, ValueError, r"`{}\(data=...\)` must have at least one array; got \{{\}}"),
        ({"batch": {"x": jnp.ones((0, 4))}}, ValueError, r"`{}\(data=...\)` must have at least one example; got none"),
        (
            {"batches": [{"x": jnp.ones((0, 4))}]},
            ValueError,
            r"`Stream\(batches=...\)` must have at least one example; got none",
        ),
        (
            {"batch": {"x": jnp.ones((3, 4)), "label": jnp.ones(2)}},
            ValueError,
            r"`{}\(data=...\)` must have the examples along the first axis .*batch\['label'\]: 2, batch\['x'\]: 3",
        ),
        (
            {"batch": {"x": jnp.ones((3, 4)), "label": jnp.ones(())}, "microbatch_size": 2},
            ValueError,
            r"`Examples\(batch=...\)` must have the examples along the first axis .*batch\['label'\]: a scalar",
        ),
        ({"microbatch_size": 0}, ValueError, r"`Examples\(microbatch_size=...\)` must be an integer >= 1; got 0"),
        ({"microbatch_size": 2.0}, TypeError, r"`Examples\(microbatch_size=...\)` must be an integer >= 1; got 2.0"),
        ({"axis_name": 0}, TypeError, r"`Examples\(axis_name=...\)` must be the name of a mapped axis or a tuple .* 0"),
        ({"weight_fn": 2.0}, TypeError, r"`Examples\(weight_fn=...\)` must be a function; got 2.0"),
        ({"coupled": 1}, TypeError, r"`{}\(coupled=...\)` must be True or False; got 1"),
        ({"mask": {"hidden": True}}, ValueError, r"`{}\(mask=...\)` must have the structure of `params`"),
        ({"mask": False}, ValueError, r"`{}\(mask=...\)` must select at least one leaf"),
        ({"mask": 1.0}, TypeError, r"`{}\(mask=...\)` must hold Python bools"),
        ({"params": jnp.arange(2)}, TypeError, "`params` must have floating-point leaves; at params it has int32"),
    ],
)
def test_bad_arguments(kind, arguments, error, message):
    batch = {} if "batches" in arguments else {"batch": net_batch(dtype=jnp.float32)}
    arguments = {"params": net_params(jnp.float32)} | batch | arguments
    name = {"hessian": "hessian_operator", "ggn": "ggn_operator", "fisher": "empirical_fisher_operator"}[kind]
    with pytest.raises(error, match=message.format(name)):
        make(kind, arguments.pop("params"), **arguments)


@pytest.mark.parametrize("driver", ["whole", "dividing", "uneven"])
def test_losses_that_are_no_vector_of_examples(driver):
    params, batch = net_params(jnp.float32), net_batch(dtype=jnp.float32)
    for losses_fn in (net_loss, lambda p, b: net_losses(p, b)[:, None]):
        operator = curvature.empirical_fisher_operator(losses_fn, params, problems.given(**drive(driver, batch)))
        with pytest.raises(ValueError, match=r"`empirical_fisher_operator\(losses_fn=...\)` must return one loss an"):
            operator(params)


def test_restrict():
    params = {"a": [1.0, 2.0], "b": 3.0}
    assert curvature.restrict(params, {"a": [False, True], "b": True}) == {"a": [None, 2.0], "b": 3.0}
    assert curvature.restrict(params, {"a": True, "b": False}) == {"a": [1.0, 2.0], "b": None}
    assert curvature.restrict(params, lambda tree: {"a": False, "b": True}) == {"a": [None, None], "b": 3.0}
    with pytest.raises(ValueError, match="`mask` must select at least one leaf"):
        curvature.restrict(params, False)
    with pytest.raises(TypeError, match="`mask` must hold Python bools"):
        curvature.restrict(params, {"a": 1.0, "b": True})

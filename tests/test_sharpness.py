"""Sharpness against the exact maximum over a ball, autodiff and dense Hessians, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from hero_jax import MeanLoss, curvature, landscape, sharpness
from tests import problems, reference

KEY = jax.random.key(3)


def quadratic_loss(params, batch):
    """w^T A w / 2 + b^T w, averaged over examples that scale b: the quadratic of `problems` for the mean example 1."""
    _, _, matrix = problems.quadratic()
    flat = ravel_pytree(params)[0]
    return flat @ matrix @ flat / 2 + jnp.mean(batch) * (jnp.linspace(-1.0, 2.0, 14) @ flat)


def exact_worst_case(params, rho, scales):
    """The trust-region problem solved by its secular equation: max g^T e + e^T A e / 2 over ||e / scales|| <= rho."""
    _, _, matrix = problems.quadratic()
    flat = ravel_pytree(params)[0]
    gradient = scales * (matrix @ flat + jnp.linspace(-1.0, 2.0, 14))
    values, vectors = np.linalg.eigh(scales[:, None] * matrix * scales)
    along = vectors.T @ gradient

    def excess(shift):
        return np.linalg.norm(along / (shift - values)) - rho

    shift = scipy.optimize.brentq(excess, values[-1] + 1e-9, values[-1] + 1e6, xtol=1e-14)
    u = along / (shift - values)
    return along @ u + u @ (values * u) / 2


def mean_loss(loss_fn, batch=None, *, coupled=False, **data):
    """The mean loss over what `problems.given` makes of `batch` and `data`."""
    return MeanLoss(loss_fn, problems.given(batch, **data), coupled=coupled)


def worst_case(loss_fn, params, batch=None, *, coupled=False, batches=None, microbatch_size=None, **options):
    """`sharpness.worst_case` of `mean_loss`."""
    data = {} if microbatch_size is None else {"microbatch_size": microbatch_size}
    loss = mean_loss(loss_fn, batch, coupled=coupled, batches=batches, **data)
    return sharpness.worst_case(loss, params, KEY, **options)


@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (1.0, False), (0.05, True), (1.0, True)])
def test_worst_case_reaches_the_maximum_over_the_ball(x64, rho, adaptive):
    _, params, _ = problems.quadratic()
    scales = np.abs(ravel_pytree(params)[0]) if adaptive else np.ones(14)
    exact = exact_worst_case(params, rho, scales)
    batch = jnp.array([0.5, 1.5])
    result = worst_case(quadratic_loss, params, batch, rho=rho, adaptive=adaptive, num_steps=60)
    assert result.increase <= exact * (1 + 1e-9)
    np.testing.assert_allclose(result.increase, exact, rtol=2e-3)
    np.testing.assert_allclose(result.loss, quadratic_loss(params, batch), rtol=1e-12)
    e = ravel_pytree(result.perturbation)[0]
    assert np.linalg.norm(e / scales) <= rho * (1 + 1e-9)
    moved = jax.tree.map(jnp.add, params, result.perturbation)
    np.testing.assert_allclose(quadratic_loss(moved, batch) - result.loss, result.increase, rtol=1e-9)
    assert result.num_grads == 2 * 61
    assert result.increases.max() == result.increase


def test_first_start_is_at_least_the_increase_at_the_sam_point(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    grads = jax.grad(problems.convnet_loss)(params, batch)
    length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    sam = jax.tree.map(lambda w, g: w + 0.1 * g / length, params, grads)
    least = problems.convnet_loss(sam, batch) - problems.convnet_loss(params, batch)
    kwargs = {"rho": 0.1, "num_starts": 1, "coupled": True}
    one = worst_case(problems.convnet_loss, params, batch, num_steps=1, **kwargs)
    np.testing.assert_allclose(one.increase, least, rtol=1e-9)
    many = worst_case(problems.convnet_loss, params, batch, num_steps=20, **kwargs)
    assert many.increase > one.increase * 1.0001


def test_random_starts_leave_a_stationary_point(x64):
    """At a minimum the gradient is zero and only the random starts move."""
    diagonal = jnp.array([1.0, 4.0, 0.5])

    def loss_fn(w, x):
        return x.mean() * (diagonal * w**2).sum() / 2

    params, batch = jnp.zeros(3), jnp.ones(2)
    result = worst_case(loss_fn, params, batch, rho=0.5, num_starts=4, num_steps=40)
    assert result.increases[0] == 0
    np.testing.assert_allclose(result.increase, 4 * 0.25 / 2, rtol=1e-3)
    alone = worst_case(loss_fn, params, batch, rho=0.5, num_starts=1)
    assert alone.increase == 0
    assert jax.tree.all(jax.tree.map(lambda e: (e == 0).all(), alone.perturbation))


def test_no_radius_and_nan(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    none = worst_case(problems.separable_loss, params, batch, rho=0.0, num_steps=3)
    assert none.increase == 0

    def cliff(w, x):
        return x.mean() * jnp.where(w.sum() > 3.2, jnp.nan, (w**2).sum())

    inside = worst_case(cliff, jnp.array([1.0, 2.0]), jnp.ones(2), rho=0.1, num_steps=30)
    np.testing.assert_allclose(inside.increase, (np.hypot(1, 2) + 0.1) ** 2 - 5, rtol=1e-3)
    outside = worst_case(cliff, jnp.array([2.0, 2.0]), jnp.ones(2), rho=0.1, num_steps=3)
    assert jnp.isnan(outside.increase)
    assert jnp.isnan(outside.loss)


def test_increase_along_is_the_taylor_expansion(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    direction = jax.tree.map(lambda x: 0.05 * x, problems.random_like(jax.random.key(5), params))
    flat, unravel = ravel_pytree(params)
    d = ravel_pytree(direction)[0]

    def loss(flat):
        return problems.convnet_loss(unravel(flat), batch)

    result = sharpness.increase_along(mean_loss(problems.convnet_loss, batch, coupled=True), params, direction)
    np.testing.assert_allclose(result.loss, loss(flat), rtol=1e-12)
    np.testing.assert_allclose(result.measured, loss(flat + d) - loss(flat), rtol=1e-9)
    np.testing.assert_allclose(result.gradient_term, jax.grad(loss)(flat) @ d, rtol=1e-9)
    np.testing.assert_allclose(result.curvature_term, d @ jax.hessian(loss)(flat) @ d / 2, rtol=1e-9)
    # The error of the prediction is of third order: halving d divides it by about eight.
    halved = jax.tree.map(lambda x: x / 2, direction)
    half = sharpness.increase_along(mean_loss(problems.convnet_loss, batch, coupled=True), params, halved)
    errors = [r.measured - r.gradient_term - r.curvature_term for r in (result, half)]
    assert 6 < errors[0] / errors[1] < 10


@pytest.mark.parametrize("function", ["worst_case", "average_case", "increase_along", "mean_loss"])
def test_every_driver_gives_the_same(x64, function):
    params, batch = problems.convnet_params(), problems.convnet_batch(10)
    direction = jax.tree.map(lambda x: 0.05 * x, problems.random_like(jax.random.key(5), params))
    loss_fn = problems.separable_loss

    def run(params, *batch, **data):
        loss = mean_loss(loss_fn, *batch, **data)
        if function == "worst_case":
            return sharpness.worst_case(loss, params, KEY, rho=0.3, num_steps=5)
        if function == "average_case":
            return sharpness.average_case(loss, params, KEY, sigma=0.1, num_probes=3)
        if function == "increase_along":
            return sharpness.increase_along(loss, params, direction)
        return loss(params)

    expected = run(params, batch)
    batches = [jax.tree.map(lambda x: x[:7], batch), jax.tree.map(lambda x: x[7:], batch)]
    problems.assert_close(run(params, batches=batches), expected, rtol=1e-9)
    problems.assert_close(run(params, batch, microbatch_size=4), expected, rtol=1e-9)
    problems.assert_close(jax.jit(run)(params, batch), expected, rtol=1e-9)
    weighted = run(params, batches=batches, weight_fn=lambda b: jnp.where(len(b[1]) == 7, 7.0, 0.0))
    problems.assert_close(weighted, run(params, batches[0]), rtol=1e-9)
    spec = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:5]), ("data",))
    for check_vma in (True, False):
        mapped = jax.shard_map(
            lambda params, batch: run(params, batch, axis_name="data"),
            mesh=mesh,
            in_specs=(spec(), spec("data")),
            out_specs=spec(),
            check_vma=check_vma,
        )
        problems.assert_close(mapped(params, batch), expected, rtol=1e-9)


def test_sixteen_bits_give_wide_numbers():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problems.convnet_params(jnp.float32))
    batch = problems.convnet_batch(dtype=jnp.bfloat16)
    worst = worst_case(problems.separable_loss, params, batch, rho=0.5, num_steps=3)
    along = sharpness.increase_along(mean_loss(problems.separable_loss, batch), params, params)
    assert {x.dtype for x in jax.tree.leaves((worst._replace(perturbation=(), num_grads=()), along))} == {
        jnp.dtype(jnp.float32)
    }
    assert {x.dtype for x in jax.tree.leaves(worst.perturbation)} == {jnp.dtype(jnp.bfloat16)}
    assert worst.increase > 0


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"rho": -0.5}, ValueError, r"`worst_case\(rho=...\)` must be non-negative and finite; got -0.5"),
        ({"num_steps": 0}, ValueError, r"`worst_case\(num_steps=...\)` must be an integer >= 1; got 0"),
        ({"num_starts": 0}, ValueError, r"`worst_case\(num_starts=...\)` must be an integer >= 1; got 0"),
        ({"adaptive": 1}, TypeError, r"`worst_case\(adaptive=...\)` must be True or False; got 1"),
        ({"rho": lambda count: 0.1}, TypeError, r"`worst_case\(rho=...\)` must be a real scalar; got a function"),
        ({"coupled": None}, TypeError, r"`MeanLoss\(coupled=...\)` must be True or False; got None"),
        ({"batches": []}, ValueError, r"`Stream\(batches=...\)` must give at least one batch; got none"),
        ({"microbatch_size": 2, "batch": problems.convnet_batch(8, jnp.float32)}, None, None),
    ],
)
def test_bad_arguments(change, kind, message):
    params = problems.convnet_params(jnp.float32)
    batch = {} if "batches" in change else {"batch": problems.convnet_batch(8, jnp.float32)}
    arguments = {**batch, "rho": 0.1, "num_steps": 1} | change
    if kind is None:
        # The network of `convnet_loss` normalises over its batch.
        with pytest.raises(
            ValueError, match=r"`worst_case` needs a loss whose batches can be split, or `coupled=True`"
        ):
            worst_case(problems.convnet_loss, params, **arguments)
        return
    with pytest.raises(kind, match=message):
        worst_case(problems.separable_loss, params, **arguments)


def test_direction_must_match():
    params = problems.convnet_params(jnp.float32)
    batch = problems.convnet_batch(8, jnp.float32)
    with pytest.raises(ValueError, match=r"`direction` must have the structure of `params`"):
        sharpness.increase_along(mean_loss(problems.separable_loss, batch), params, params["conv"])


def test_quadratic_model_of_a_masked_direction_matches_the_operator(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    direction = problems.random_like(jax.random.key(5), params)
    matvec = curvature.hessian_operator(problems.separable_loss, params, batch)
    result = sharpness.increase_along(mean_loss(problems.separable_loss, batch), params, direction)
    quadratic = sum(jnp.vdot(d, h) for d, h in zip(*map(jax.tree.leaves, (direction, matvec(direction))), strict=True))
    np.testing.assert_allclose(result.curvature_term, quadratic / 2, rtol=1e-9)


def test_function_of_the_weights_alone_is_a_mean_loss(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()

    def loss(params):
        return problems.separable_loss(params, batch)

    found = sharpness.worst_case(loss, params, KEY, rho=0.3, num_steps=3)
    problems.assert_close(found, worst_case(problems.separable_loss, params, batch, rho=0.3, num_steps=3), rtol=1e-9)
    direction = problems.random_like(jax.random.key(5), params)
    expected = sharpness.increase_along(mean_loss(problems.separable_loss, batch), params, direction)
    problems.assert_close(sharpness.increase_along(loss, params, direction), expected, rtol=1e-9)
    with pytest.raises(TypeError, match=r"`worst_case\(mean_loss=...\)` must be a function; got 1.0"):
        sharpness.worst_case(1.0, params, KEY, rho=0.3)


def test_mean_loss_over_a_stream_is_an_eval_fn(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch(10)
    batches = [jax.tree.map(lambda x: x[:7], batch), jax.tree.map(lambda x: x[7:], batch)]
    direction = problems.random_like(jax.random.key(5), params)
    found = landscape.line(mean_loss(problems.separable_loss, batches=batches), params, direction, [0.0, 0.1])
    moved = jax.tree.map(lambda w, d: w + 0.1 * d, params, direction)
    expected = [problems.separable_loss(w, batch) for w in (params, moved)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_case_is_half_the_trace_of_a_quadratic(x64, adaptive):
    loss_fn, params, matrix = problems.quadratic()
    found = sharpness.average_case(loss_fn, params, KEY, sigma=0.1, adaptive=adaptive, num_probes=400)
    scales = np.abs(ravel_pytree(params)[0]) if adaptive else np.ones(14)
    expected = 0.1**2 * np.sum(np.diag(matrix) * scales**2) / 2
    # e and -e: the gradient term, fifty times as large, has no part in the error.
    variance = 0.1**4 / 2 * np.sum((matrix * np.outer(scales, scales)) ** 2)
    np.testing.assert_allclose(found.sem, np.sqrt(variance / 400), rtol=0.2)
    assert abs(found.increase - expected) < 4 * found.sem
    np.testing.assert_allclose(found.loss, loss_fn(params), rtol=1e-12)
    np.testing.assert_allclose(found.increase, found.increases.mean(), rtol=1e-12)
    assert found.num_evals == 801
    assert found.increases.shape == (400,)


def test_average_case_edges():
    loss_fn, params, _ = problems.quadratic(jnp.float32)
    one = sharpness.average_case(loss_fn, params, KEY, sigma=0.1, num_probes=1)
    assert np.isinf(one.sem)
    none = sharpness.average_case(loss_fn, params, KEY, sigma=0.0, num_probes=3)
    assert none.increase == none.sem == 0
    for change, message in (
        ({"sigma": -1.0}, r"`average_case\(sigma=...\)` must be non-negative and finite; got -1.0"),
        ({"num_probes": 0}, r"`average_case\(num_probes=...\)` must be an integer >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sharpness.average_case(loss_fn, params, KEY, **({"sigma": 0.1} | change))


def test_eigenvalues_of_single_batches_are_those_of_dense_hessians(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch(12)
    batches = [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in ((0, 5), (5, 7), (7, 12))]
    mask = problems.kernels_mask(params)
    found = sharpness.batch_eigenvalues(problems.convnet_loss, params, batches, KEY, rtol=1e-8)
    masked = sharpness.batch_eigenvalues(
        problems.convnet_loss, params, lambda: iter(batches), KEY, mask=mask, rtol=1e-8
    )
    for i, part in enumerate(batches):
        loss_fn = functools.partial(problems.convnet_loss, batch=part)
        for result, hessian in (
            (found, jax.jit(functools.partial(reference.dense_hessian, loss_fn))(params)),
            (masked, jax.jit(functools.partial(reference.restricted_hessian, loss_fn, mask=mask))(params)),
        ):
            values = np.linalg.eigvalsh(hessian)
            np.testing.assert_allclose(result.eigenvalues[i], values[np.argmax(np.abs(values))], rtol=1e-8)
            assert result.residuals[i] <= 1e-8
            assert result.converged[i]
    assert found.num_matvecs > 3
    with pytest.raises(ValueError, match=r"`batch_eigenvalues\(batches=...\)` must give at least one batch; got none"):
        sharpness.batch_eigenvalues(problems.convnet_loss, params, [], KEY)

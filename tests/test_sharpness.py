"""Sharpness against the exact maximum over a ball, autodiff and dense Hessians, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, sharpness
from tests import problems

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


@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (1.0, False), (0.05, True), (1.0, True)])
def test_worst_case_reaches_the_maximum_over_the_ball(x64, rho, adaptive):
    _, params, _ = problems.quadratic()
    scales = np.abs(ravel_pytree(params)[0]) if adaptive else np.ones(14)
    exact = exact_worst_case(params, rho, scales)
    batch = jnp.array([0.5, 1.5])
    result = sharpness.worst_case(quadratic_loss, params, batch, key=KEY, rho=rho, adaptive=adaptive, num_steps=60)
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
    kwargs = {"key": KEY, "rho": 0.1, "num_starts": 1, "coupled": True}
    one = sharpness.worst_case(problems.convnet_loss, params, batch, num_steps=1, **kwargs)
    np.testing.assert_allclose(one.increase, least, rtol=1e-9)
    many = sharpness.worst_case(problems.convnet_loss, params, batch, num_steps=20, **kwargs)
    assert many.increase > one.increase * 1.0001


def test_random_starts_leave_a_stationary_point(x64):
    """At a minimum the gradient is zero and only the random starts move."""
    diagonal = jnp.array([1.0, 4.0, 0.5])

    def loss_fn(w, x):
        return x.mean() * (diagonal * w**2).sum() / 2

    params, batch = jnp.zeros(3), jnp.ones(2)
    result = sharpness.worst_case(loss_fn, params, batch, key=KEY, rho=0.5, num_starts=4, num_steps=40)
    assert result.increases[0] == 0
    np.testing.assert_allclose(result.increase, 4 * 0.25 / 2, rtol=1e-3)
    alone = sharpness.worst_case(loss_fn, params, batch, key=KEY, rho=0.5, num_starts=1)
    assert alone.increase == 0
    assert jax.tree.all(jax.tree.map(lambda e: (e == 0).all(), alone.perturbation))


def test_no_radius_and_nan(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    none = sharpness.worst_case(problems.separable_loss, params, batch, key=KEY, rho=0.0, num_steps=3)
    assert none.increase == 0

    def cliff(w, x):
        return x.mean() * jnp.where(w.sum() > 3.2, jnp.nan, (w**2).sum())

    inside = sharpness.worst_case(cliff, jnp.array([1.0, 2.0]), jnp.ones(2), key=KEY, rho=0.1, num_steps=30)
    np.testing.assert_allclose(inside.increase, (np.hypot(1, 2) + 0.1) ** 2 - 5, rtol=1e-3)
    outside = sharpness.worst_case(cliff, jnp.array([2.0, 2.0]), jnp.ones(2), key=KEY, rho=0.1, num_steps=3)
    assert jnp.isnan(outside.increase)
    assert jnp.isnan(outside.loss)


def test_increase_along_is_the_taylor_expansion(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    direction = jax.tree.map(lambda x: 0.05 * x, problems.random_like(jax.random.key(5), params))
    flat, unravel = ravel_pytree(params)
    d = ravel_pytree(direction)[0]

    def loss(flat):
        return problems.convnet_loss(unravel(flat), batch)

    result = sharpness.increase_along(problems.convnet_loss, params, direction, batch, coupled=True)
    np.testing.assert_allclose(result.loss, loss(flat), rtol=1e-12)
    np.testing.assert_allclose(result.measured, loss(flat + d) - loss(flat), rtol=1e-9)
    np.testing.assert_allclose(result.gradient_term, jax.grad(loss)(flat) @ d, rtol=1e-9)
    np.testing.assert_allclose(result.curvature_term, d @ jax.hessian(loss)(flat) @ d / 2, rtol=1e-9)
    # The error of the prediction is of third order: halving d divides it by about eight.
    halved = jax.tree.map(lambda x: x / 2, direction)
    half = sharpness.increase_along(problems.convnet_loss, params, halved, batch, coupled=True)
    errors = [r.measured - r.gradient_term - r.curvature_term for r in (result, half)]
    assert 6 < errors[0] / errors[1] < 10


@pytest.mark.parametrize("function", ["worst_case", "increase_along"])
def test_every_driver_gives_the_same(x64, function):
    params, batch = problems.convnet_params(), problems.convnet_batch(10)
    direction = jax.tree.map(lambda x: 0.05 * x, problems.random_like(jax.random.key(5), params))
    loss_fn = problems.separable_loss

    def run(params, *data, **kwargs):
        if function == "worst_case":
            return sharpness.worst_case(loss_fn, params, *data, key=KEY, rho=0.3, num_steps=5, **kwargs)
        return sharpness.increase_along(loss_fn, params, direction, *data, **kwargs)

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
    worst = sharpness.worst_case(problems.separable_loss, params, batch, key=KEY, rho=0.5, num_steps=3)
    along = sharpness.increase_along(problems.separable_loss, params, params, batch)
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
        ({"coupled": None}, TypeError, r"`worst_case\(coupled=...\)` must be True or False; got None"),
        ({"batches": []}, TypeError, r"`worst_case` needs one of `batch` and `batches`; got both"),
        ({"microbatch_size": 2, "batch": problems.convnet_batch(8, jnp.float32)}, None, None),
    ],
)
def test_bad_arguments(change, kind, message):
    params = problems.convnet_params(jnp.float32)
    arguments = {"batch": problems.convnet_batch(8, jnp.float32), "key": KEY, "rho": 0.1, "num_steps": 1} | change
    if kind is None:
        # The network of `convnet_loss` normalises over its batch.
        with pytest.raises(
            ValueError, match=r"`worst_case` needs a loss whose batches can be split, or `coupled=True`"
        ):
            sharpness.worst_case(problems.convnet_loss, params, **arguments)
        return
    with pytest.raises(kind, match=message):
        sharpness.worst_case(problems.separable_loss, params, **arguments)


def test_direction_must_match():
    params = problems.convnet_params(jnp.float32)
    batch = problems.convnet_batch(8, jnp.float32)
    with pytest.raises(ValueError, match=r"`direction` must have the structure of `params`"):
        sharpness.increase_along(problems.separable_loss, params, params["conv"], batch)


def test_quadratic_model_of_a_masked_direction_matches_the_operator(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    direction = problems.random_like(jax.random.key(5), params)
    matvec = curvature.hessian_operator(problems.separable_loss, params, batch)
    result = sharpness.increase_along(problems.separable_loss, params, direction, batch)
    quadratic = sum(jnp.vdot(d, h) for d, h in zip(*map(jax.tree.leaves, (direction, matvec(direction))), strict=True))
    np.testing.assert_allclose(result.curvature_term, quadratic / 2, rtol=1e-9)

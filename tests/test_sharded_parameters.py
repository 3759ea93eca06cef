"""Curvature of parameters that are split over devices: the numbers of one device, and no vector whole on any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hero_jax
from hero_jax import Examples, MeanLoss, curvature, sharpness, spectrum
from tests import problems

KEY = jax.random.key(3)


def loss_fn(params, batch):
    """Products and sums, since explicit types leave a matrix product over a split axis to its caller."""
    x, y = batch
    hidden = jnp.tanh(jnp.sum(x[:, :, None] * params["hidden"], 1) + params["bias"])
    return jnp.mean((jnp.sum(hidden[:, :, None] * params["head"], 1) - y) ** 2)


def problem():
    params = {"hidden": jnp.zeros((16, 24)), "bias": jnp.zeros(24), "head": jnp.zeros((24, 3))}
    params = jax.tree.map(lambda x: 0.4 * x, problems.random_like(jax.random.key(0), params))
    x = jax.random.normal(jax.random.key(1), (32, 16))
    return params, (x, jnp.sin(3 * x[:, :3]))


def split(tree, mesh):
    """Every leaf over its first axis."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def solve(params, batch, microbatch_size=None):
    """What solvers that draw, keep and average vectors say."""
    operator = curvature.hessian_operator(loss_fn, params, Examples(batch, microbatch_size=microbatch_size))
    return {
        "top": spectrum.top_eigenpairs(operator, KEY, k=2, rtol=1e-4),
        "sketch": spectrum.trace(operator, KEY, num_probes=3, sketch_size=2),
        "diagonal": spectrum.diagonal(operator, KEY, num_probes=3),
        "density": spectrum.spectral_density(operator, KEY, num_probes=2, num_steps=4, num_points=30),
        "worst": sharpness.worst_case(MeanLoss(loss_fn, batch), params, KEY, rho=0.1, num_steps=2),
    }


def train(params, batch):
    """A step of hero with what it has besides products, and without."""
    grad_fn = jax.grad(lambda p: loss_fn(p, batch))
    tx = hero_jax.hero(0.3, 1.0, product="difference", suppress=0.5)
    keywords = {"grad_fn": grad_fn, "ascent": jax.tree.map(jnp.sin, params)}
    grads, state = grad_fn(params), tx.init(params)
    return {
        "product": curvature.grad_difference(grad_fn, params, jax.tree.map(jnp.cos, params)),
        "direction": tx.update(grads, state, params, **keywords),
        "unperturbed": tx.update(grads, state, params, perturb=False, **keywords),
    }


@functools.cache
def on_one_device():
    """(Called under x64.)"""
    return solve(*problem())


@pytest.mark.parametrize("which", ["params", "batch"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_every_solver_equals_one_device(x64, axis_type, which):
    expected, (params, batch) = on_one_device(), problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        found = solve(split(params, mesh), batch) if which == "params" else solve(params, split(batch, mesh), 8)
    for name in expected:
        # The same random numbers, so that only orders of summation differ.
        for x, y in zip(*map(jax.tree.leaves, (found[name], expected[name])), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_step_equals_one_device(x64, axis_type):
    (params, batch), mesh = problem(), jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    expected = jax.jit(train)(params, batch)
    with jax.set_mesh(mesh):
        found = jax.jit(train)(split(params, mesh), batch)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Each way rounds the differences its own way.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    for x in jax.tree.leaves((found["product"], found["direction"][0])):
        assert x.addressable_shards[0].data.size == x.size / 8


def test_vectors_are_split_as_the_parameters_are():
    params, batch = problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = split(params, mesh)
    seen = []

    def host_product(vector):
        seen.append(vector)
        return product(vector)

    product = jax.jit(lambda vector: curvature.hvp(loss_fn, params, vector, batch))
    operator = curvature.HostOperator(host_product, params)
    top = spectrum.top_eigenpairs(operator, KEY, k=2, max_matvecs=3, basis_size=3)
    spectrum.trace(operator, KEY, num_probes=2, sketch_size=2)
    diagonal = spectrum.diagonal(operator, KEY, num_probes=2)
    assert len(seen) == 3 + 4 + 2 + 2
    for vector in [*seen, diagonal.mean, diagonal.sem, jax.tree.map(lambda x: x[0], top.eigenvectors)]:
        for x in jax.tree.leaves(vector):
            assert x.addressable_shards[0].data.size == x.size / 8

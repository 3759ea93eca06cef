"""Hessian-vector products against dense Hessians and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature
from tests import problems, reference


def test_equals_the_dense_hessian(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    hessian = reference.dense_hessian(lambda p: problems.convnet_loss(p, batch), params)
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


def test_integer_parameters():
    with pytest.raises(TypeError, match="`params` must have floating-point leaves; at params it has int32"):
        curvature.hvp(lambda p: p.sum(), jnp.arange(2), jnp.arange(2))

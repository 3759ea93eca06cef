"""Perturbations: closed forms, lengths, scopes and edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax.perturbations import ascent
from tests import problems, reference


@pytest.fixture
def point(x64):
    params = problems.convnet_params()
    return params, problems.random_like(jax.random.key(3), params)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_equals_reference(point, adaptive, scope):
    params, grads = point
    e = ascent(params, grads, 0.7, adaptive=adaptive, scope=scope)
    problems.assert_close(e, reference.perturbation(params, grads, 0.7, adaptive=adaptive, scope=scope), rtol=1e-12)


def test_length_in_its_own_metric_is_rho(point):
    params, grads = point
    np.testing.assert_allclose(reference.norm(ascent(params, grads, 0.7, adaptive=False)), 0.7, rtol=1e-10)
    e = ascent(params, grads, 0.7, adaptive=True)
    relative = jax.tree.map(lambda x, w: x / jnp.abs(w), e, params)
    np.testing.assert_allclose(reference.norm(relative), 0.7, rtol=1e-10)
    for leaf, w in zip(
        jax.tree.leaves(ascent(params, grads, 0.7, adaptive=True, scope="leaf")),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_allclose(jnp.linalg.norm((leaf / jnp.abs(w)).ravel()), 0.7, rtol=1e-10)


def test_adaptive_perturbation_does_not_depend_on_the_scale_of_the_network(point):
    # ASAM: (c w, g / c) describes the same function for a scale-invariant layer; e must scale with c.
    params, grads = point
    e = ascent(params, grads, 0.7, adaptive=True)
    scaled = ascent(reference.scale(3.0, params), reference.scale(1 / 3.0, grads), 0.7, adaptive=True)
    problems.assert_close(scaled, reference.scale(3.0, e), rtol=1e-10)


def test_zero_leaf_of_a_leaf_scope_is_zero_and_the_others_move():
    params = {"a": jnp.ones((2, 3)), "b": jnp.full((4,), 2.0)}
    grads = {"a": jnp.zeros((2, 3)), "b": jnp.ones(4)}
    e = ascent(params, grads, 0.5, adaptive=False, scope="leaf")
    np.testing.assert_array_equal(e["a"], 0)
    np.testing.assert_allclose(e["b"], 0.25)


def test_zero_weights_stay_zero_under_the_adaptive_rule():
    e = ascent(jnp.array([0.0, 2.0]), jnp.array([5.0, 1.0]), 0.5, adaptive=True)
    np.testing.assert_allclose(e, [0.0, 1.0], rtol=1e-6)


def test_eps_enters_the_denominator():
    e = ascent(jnp.array([1.0]), jnp.array([3.0]), 1.0, adaptive=False, eps=1.0)
    np.testing.assert_allclose(e, [0.75])

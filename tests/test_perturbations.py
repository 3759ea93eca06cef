"""Perturbations: closed forms, lengths, scopes and edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax.perturbations import ascent, noise, suppressed
from tests import problems, reference

W, KEY = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, jax.random.key(0)


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


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_suppressed_equals_reference(point, share):
    params, grads = point
    others = problems.random_like(jax.random.key(4), params)
    problems.assert_close(suppressed(params, grads, share), reference.suppressed(params, grads, share))
    expected = reference.suppressed(params, grads, share, others)
    problems.assert_close(suppressed(params, grads, share, others), expected)
    if share:
        assert reference.norm(reference.subtract(expected, grads)) > 0.1
        assert reference.norm(reference.subtract(expected, reference.suppressed(params, grads, share))) > 0.1


def test_suppressed_at_the_ends_of_the_interval():
    g = jnp.array([2.0, 2.0, 2.0, -2.0, -2.0, 0.0, 0.0, 2.0])
    g_star = jnp.array([2.0, 0.0, 1.999, -1.0, 1.0, 1.0, 0.0, 5.0])
    found = suppressed(g, g_star, 0.5)
    np.testing.assert_allclose(found, [2.0, 0.0, 0.9995, -0.5, 1.0, 1.0, 0.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "large", "small"),
    [(jnp.float16, 1e-6, 1e-7), (jnp.float16, 6e4, 1e-6), (jnp.bfloat16, 1e30, 1e-30), (jnp.float32, 1e-30, 1e-31)],
)
def test_suppressed_decides_by_no_quotient_or_product_that_could_be_lost(dtype, large, small):
    g, g_star = jnp.array([large, small, large], dtype), jnp.array([small, large, -small], dtype)
    # The quotients are smaller than 1, larger than 1 and negative.
    np.testing.assert_array_equal(suppressed(g, g_star, 1.0), np.array([0, g_star[1], g_star[2]], np.float32))
    assert suppressed(g, g_star, 1.0).dtype == jnp.float32
    assert (g_star != 0).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: noise(W, -1.0, KEY), ValueError, r"`noise\(sigma=...\)` must be non-negative and finite"),
        (lambda: noise(W, 0.1, KEY, sample=3), TypeError, r"`noise\(sample=...\)` must be a function; got 3"),
        (lambda: noise({"w": 3}, 0.1, KEY), TypeError, r"`params` must have floating-point leaves"),
        (
            lambda: noise(W, 0.1, KEY, sample=lambda params, key: {}),
            ValueError,
            r"`sample\(params, key\)` must have the structure of `params`; only `params` has params\['w'\]",
        ),
        (lambda: suppressed(W, W, 2.0), ValueError, r"`suppressed\(share=...\)` must be between 0 and 1"),
        (lambda: suppressed(W, {}, 0.5), ValueError, r"`perturbed_grads` must have the structure of `grads`"),
        (lambda: suppressed(W, W, 0.5, {}), ValueError, r"`compared` must have the structure of `grads`"),
    ],
)
def test_errors_of_noise_and_suppression(call, kind, message):
    with pytest.raises(kind, match=message):
        call()

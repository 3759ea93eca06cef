"""Products by a difference of two gradients: their error, edges, and the steps of hero that take them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hero_jax
from hero_jax import curvature
from tests import problems, reference

PENALTIES = ("detached", "difference")
# In units of the exact product: ten times what is measured here.
FLOAT64 = 3e-6


def difference(a, b):
    """||a - b|| relative to ||b||."""
    return float(reference.norm(reference.subtract(a, b)) / reference.norm(b))


@pytest.fixture
def net(x64):
    """Parameters, a smooth loss of them, and a vector."""
    params = problems.dense_params()
    return params, problems.dense_loss(), problems.random_like(jax.random.key(7), params)


def deep(activation):
    """The gradient function and parameters of a network of six hidden layers, in float32."""
    sizes = [10, *[64] * 6, 5]
    key, key_x = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(key_x, (2048, 10)), jnp.arange(2048) % 5
    params = [jnp.zeros(shape) for shape in itertools.pairwise(sizes)]
    params = [(2 / len(w)) ** 0.5 * w for w in problems.random_like(key, params)]

    def loss_fn(params):
        hidden = functools.reduce(lambda h, w: activation(h @ w), params[:-1], x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden @ params[-1]), y[:, None], axis=1))

    return jax.jit(jax.grad(loss_fn)), params


def product_error(grad_fn, params, seed):
    vector = problems.random_like(jax.random.key(seed), params)
    return difference(
        curvature.grad_difference(grad_fn, params, vector), curvature.grad_product(grad_fn, params, vector)
    )


class TestError:
    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_hessian_product_in_float64(self, net, seed):
        params, loss_fn, _ = net
        vector = problems.random_like(jax.random.key(seed), params)
        found = curvature.grad_difference(jax.grad(loss_fn), params, vector)
        assert difference(found, reference.hessian_vector(loss_fn, params, vector)) < FLOAT64

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_hessian_product_of_a_smooth_network_in_float32(self, seed):
        assert product_error(*deep(jnp.tanh), seed) < 1e-2

    @pytest.mark.parametrize("seed", range(3))
    def test_is_not_the_hessian_product_of_a_relu_network(self, seed):
        """What the docstring warns of."""
        assert product_error(*deep(jax.nn.relu), seed) > 0.5

    @pytest.mark.parametrize("scale", [1.0, 300.0])
    def test_leading_term_of_the_error(self, net, scale):
        """t/2 T[u, u], with the step of float32, as the coarsest leaf has it, and the rounding of float64."""
        params, loss_fn, vector = net
        params = {"net": params, "rest": jnp.ones(3, jnp.float32)}
        vector = {"net": reference.scale(scale, vector), "rest": jnp.zeros(3, jnp.float32)}
        grad_fn = jax.grad(lambda p: loss_fn(p["net"]))

        def product(p):
            return jax.jvp(grad_fn, (p,), (vector,))[1]

        exact, third = jax.jvp(product, (params,), (vector,))
        error = reference.subtract(curvature.grad_difference(grad_fn, params, vector), exact)
        t = 0.1 * np.sqrt(np.finfo(np.float32).eps) * reference.norm(params) / reference.norm(vector)
        expected = reference.scale(t / 2, third)
        assert difference(error["net"], expected["net"]) < 0.01
        assert reference.norm(expected) > 1e-6 * reference.norm(exact)

    def test_quadratic_has_rounding_errors_alone(self, x64):
        loss_fn, params, _ = problems.quadratic()
        params = {"net": params, "rest": jnp.ones(3, jnp.float32)}
        vector = {"net": problems.random_like(jax.random.key(0), params["net"]), "rest": jnp.zeros(3, jnp.float32)}
        grad_fn = jax.grad(lambda p: loss_fn(p["net"]))
        found = curvature.grad_difference(grad_fn, params, vector)
        problems.assert_close(found, curvature.grad_product(grad_fn, params, vector), rtol=1e-10)


class TestProduct:
    @pytest.mark.parametrize("power", [-90, -1, 90])
    def test_scale_of_the_vector_is_that_of_the_product(self, power):
        grad_fn = jax.grad(lambda w: jnp.sum(jnp.cosh(w)))
        params, vector = jnp.linspace(-1, 2, 6).reshape(2, 3), jnp.linspace(2, 5, 6).reshape(2, 3)
        expected = 2.0**power * curvature.grad_difference(grad_fn, params, vector)
        np.testing.assert_array_equal(curvature.grad_difference(grad_fn, params, 2.0**power * vector), expected)
        assert (expected > 0).all()

    def test_zero_vector_gives_zero(self):
        params = jnp.linspace(-1, 2, 6).reshape(2, 3)
        grad_fn = jax.grad(lambda w: jnp.sum(jnp.cosh(w)))
        for grads in (None, grad_fn(params) * (1 + 1e-6)):
            found = curvature.grad_difference(grad_fn, params, jnp.zeros((2, 3)), grads)
            np.testing.assert_array_equal(found, 0)

    def test_zero_parameters_take_a_step_of_their_own(self, x64):
        loss_fn, params, hessian = problems.quadratic()
        vector = problems.random_like(jax.random.key(0), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        flat, unravel = jax.flatten_util.ravel_pytree(vector)
        found = curvature.grad_difference(jax.grad(loss_fn), zeros, vector)
        problems.assert_close(found, unravel(hessian @ flat), rtol=1e-5)

    def test_gradient_that_is_given_is_not_evaluated(self, net):
        params, loss_fn, vector = net
        calls = []

        def grad_fn(params):
            calls.append(1)
            return jax.grad(loss_fn)(params)

        found = curvature.grad_difference(grad_fn, params, vector)
        assert len(calls) == 2
        grads = jax.grad(loss_fn)(params)
        problems.assert_close(curvature.grad_difference(grad_fn, params, vector, grads), found, rtol=1e-12)
        assert len(calls) == 3
        other = curvature.grad_difference(grad_fn, params, vector, reference.scale(1.001, grads))
        assert difference(other, found) > 1

    def test_maps_over_parameters_and_vectors(self, net):
        params, loss_fn, vector = net
        several = [
            jax.tree.map(lambda *x: jnp.stack(x), *[reference.scale(c, tree) for c in (0.5, 1.0, 1.5)])
            for tree in (params, vector)
        ]
        found = jax.jit(jax.vmap(functools.partial(curvature.grad_difference, jax.grad(loss_fn))))(*several)
        for i in range(3):
            w, u = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in several)
            exact = reference.hessian_vector(loss_fn, w, u)
            assert difference(jax.tree.map(lambda x, i=i: x[i], found), exact) < FLOAT64

    def test_is_wide_and_has_the_structure_of_the_parameters(self, x64):
        params = {"a": jnp.ones((2, 3), jnp.float32), "b": [jnp.ones(4, jnp.float64)]}
        grad_fn = jax.grad(lambda p: jnp.sum(p["a"] ** 3) + jnp.sum(p["b"][0] ** 3))
        found = curvature.grad_difference(grad_fn, params, jax.tree.map(lambda x: x.astype(jnp.float16), params))
        assert jax.tree.map(lambda x: x.dtype, found) == {"a": jnp.float32, "b": [jnp.float64]}
        np.testing.assert_allclose(found["b"][0], 6, rtol=1e-2)


class TestSteps:
    @staticmethod
    def exact_and_by_difference(params, grads, penalty, gamma=30.0, **keywords):
        found = []
        for product in ("exact", "difference"):
            tx = hero_jax.hero(0.6, gamma, penalty=penalty, product=product)
            found.append(tx.update(grads, tx.init(params), params, **keywords))
        return found

    @pytest.mark.parametrize("given", ["", "part_grad_fn", "penalty_grad_fn", "part_grad_fn penalty_grad_fn"])
    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_direction_is_that_of_exact_products(self, net, penalty, given):
        params, loss_fn, _ = net
        parts = {"part_grad_fn": slice(0, None, 2), "penalty_grad_fn": slice(1, 4)}
        parts = {name: jax.grad(problems.dense_loss(rows)) for name, rows in parts.items()}
        parts = {name: parts[name] for name in given.split()}
        grads = parts.get("part_grad_fn", jax.grad(loss_fn))(params)
        found = self.exact_and_by_difference(params, grads, penalty, grad_fn=jax.grad(loss_fn), **parts)
        (exact, _), (direction, state) = found
        assert state.metrics.penalty_grad_norm > 0.01 * state.metrics.perturbed_grad_norm
        # Of `difference` the penalty is a difference of two products.
        assert difference(direction, exact) < FLOAT64
        assert difference(direction, exact) > 1e-12, "the products are exact"

    def test_direction_in_float32(self):
        grad_fn, params = deep(jnp.tanh)
        (exact, _), (direction, state) = self.exact_and_by_difference(
            params, grad_fn(params), "detached", 300.0, grad_fn=grad_fn
        )
        assert state.metrics.penalty_grad_norm > 0.1 * state.metrics.perturbed_grad_norm
        assert difference(direction, exact) < 1e-2

    @pytest.mark.parametrize(
        ("penalty", "given", "whole", "part", "of_penalty"),
        [  # g, g*, and what d and the products are differences of; the suppression needs no other
            ("detached", "", 3, 0, 0),
            ("difference", "", 4, 0, 0),
            ("detached", "part_grad_fn", 1, 3, 0),
            ("difference", "part_grad_fn", 1, 4, 0),
            ("detached", "penalty_grad_fn", 2, 0, 2),
            ("difference", "penalty_grad_fn", 2, 0, 4),
        ],
    )
    def test_gradients_of_a_step(self, penalty, given, whole, part, of_penalty):
        calls = {"grad_fn": 0, "part_grad_fn": 0, "penalty_grad_fn": 0}

        def counted(name, params):
            calls[name] += 1
            return jax.grad(lambda w: jnp.sum(jnp.cosh(w)))(params)

        functions = {name: functools.partial(counted, name) for name in calls if name in ("grad_fn", given)}
        tx = hero_jax.hero(0.1, 1.0, penalty=penalty, product="difference", suppress=0.5)

        @jax.jit
        def step(params):
            grads = functions["part_grad_fn" if given == "part_grad_fn" else "grad_fn"](params)
            return tx.update(grads, tx.init(params), params, **functions)

        step(jnp.ones((2, 3)))
        assert list(calls.values()) == [whole, part, of_penalty]

    def test_step_without_the_penalty_takes_no_product(self):
        calls = []

        def grad_fn(params):
            calls.append(1)
            return jax.grad(lambda w: jnp.sum(jnp.cosh(w)))(params)

        tx, params = hero_jax.hero(0.1, 1.0, product="difference"), jnp.ones((2, 3))
        tx.update(params, tx.init(params), params, grad_fn=grad_fn, penalize=False)
        assert len(calls) == 1


class TestErrors:
    @pytest.mark.parametrize("penalty", ["hvp", "eigenvalue"])
    def test_penalties_of_third_derivatives(self, penalty):
        message = (
            rf"`hero\(product='difference'\)` needs penalty 'detached' or 'difference': .* got penalty '{penalty}'"
        )
        with pytest.raises(ValueError, match=message):
            hero_jax.hero(0.1, 1.0, penalty=penalty, product="difference")

    def test_product_of_another_name(self):
        with pytest.raises(ValueError, match=r"`hero\(product=...\)` must be one of 'exact', 'difference'"):
            hero_jax.hero(0.1, 1.0, product="exactly")

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_sixteen_bit_parameters(self, dtype):
        params = {"v": jnp.ones((2, 3)), "w": jnp.ones((2, 3), dtype)}
        tx = hero_jax.hero(0.1, 1.0, product="difference")
        name = jnp.dtype(dtype).name
        message = (
            rf"`params` must be float32 or wider: `hero\(product='difference'\)` has no .* params\['w'\] .* {name}"
        )
        with pytest.raises(ValueError, match=message):
            tx.init(params)
        state = tx.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
        with pytest.raises(ValueError, match=message):
            tx.update(params, state, params, grad_fn=lambda p: p)
        with pytest.raises(ValueError, match="must be float32 or wider: a difference of 16-bit gradients has"):
            curvature.grad_difference(lambda p: p, params, params)

    def test_trees_that_do_not_match(self):
        params = {"w": jnp.ones((2, 3))}
        with pytest.raises(ValueError, match="`vector` must have the shapes of `params`"):
            curvature.grad_difference(lambda p: p, params, {"w": jnp.ones(3)})
        with pytest.raises(ValueError, match="`grads` must have the structure of `params`"):
            curvature.grad_difference(lambda p: p, params, params, {"v": jnp.ones((2, 3))})

    def test_integer_parameters(self):
        with pytest.raises(TypeError, match="`params` must have floating-point leaves; at params it has int32"):
            curvature.grad_difference(lambda p: p, jnp.arange(2), jnp.arange(2))

"""hero, sam and grad_l1 against independent definitions, in float64; then dtypes, structures, edges and errors."""

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import hero_jax
from hero_jax import perturbations
from tests import problems, reference

PENALTIES = ("detached", "difference", "hvp", "eigenvalue")
# Leaves of `problems.convnet_params`.
PERTURBED = {"conv": {"kernel": False, "bias": True}, "norm": {"scale": True}, "head": [True, False]}


def updated(tx, params, loss_fn, state=None):
    """One update of `tx` at `params`: (direction, new state).

    Not jitted: the operations of one network are compiled once for all tests, a jitted update for each of them.
    """
    grad_fn = jax.grad(loss_fn)
    return tx.update(grad_fn(params), tx.init(params) if state is None else state, params, grad_fn=grad_fn)


@pytest.fixture
def net(x64):
    batch = problems.convnet_batch()
    return problems.convnet_params(), lambda params: problems.convnet_loss(params, batch)


class TestExactness:
    @pytest.mark.parametrize(
        ("penalty", "scope", "reduction", "adaptive"),
        [  # the defaults, and every pair of values
            ("detached", "global", "mean", True),
            ("detached", "leaf", "mean", False),
            ("detached", "global", "sum", False),
            ("difference", "global", "mean", False),
            ("difference", "leaf", "sum", True),
            ("hvp", "leaf", "mean", False),
            ("hvp", "global", "sum", True),
        ],
    )
    def test_direction_is_autodiff_of_the_penalty_and_metrics_are_as_stated(
        self, net, penalty, scope, reduction, adaptive
    ):
        params, loss_fn = net
        options = {"penalty": penalty, "scope": scope, "reduction": reduction, "adaptive": adaptive}
        mask = problems.kernels_mask(params)
        direction, state = updated(hero_jax.hero(0.3, 700.0, **options), params, loss_fn)
        expected = reference.direction(loss_fn, params, 0.3, 700.0, mask=mask, **options)
        problems.assert_close(direction, expected)
        # The penalty must matter here, or the comparison says nothing of it.
        assert state.metrics.penalty_grad_norm > 0.01 * state.metrics.perturbed_grad_norm
        g = jax.grad(loss_fn)(params)
        e = reference.perturbation(params, g, 0.3, adaptive=adaptive, scope=scope)
        perturbed = jax.grad(loss_fn)(reference.add(params, e))
        metrics = hero_jax.Metrics(
            grad_norm=reference.norm(g),
            perturbed_grad_norm=reference.norm(perturbed),
            perturbation_norm=reference.norm(e),
            penalty=reference.penalty_value(loss_fn, params, e, penalty=penalty, reduction=reduction, mask=mask),
            penalty_grad_norm=reference.norm(reference.subtract(direction, perturbed)),
        )
        for name in hero_jax.Metrics._fields:
            np.testing.assert_allclose(getattr(state.metrics, name), getattr(metrics, name), rtol=1e-5, err_msg=name)
            assert getattr(state.metrics, name).dtype == jnp.float32

    @pytest.mark.parametrize("adaptive", [True, False])
    def test_eigenvalue_direction_is_autodiff_of_the_rayleigh_quotient(self, net, adaptive):
        params, loss_fn = net
        mask = problems.kernels_mask(params)
        tx = hero_jax.hero(0.3, 0.7, penalty="eigenvalue", adaptive=adaptive)
        v = reference.restrict(problems.random_like(jax.random.key(5), params), mask)
        v = reference.scale(1 / reference.norm(v), v)
        direction, state = updated(tx, params, loss_fn, tx.init(params)._replace(eigenvector=v))
        expected = reference.direction(
            loss_fn, params, 0.3, 0.7, adaptive=adaptive, penalty="eigenvalue", mask=mask, eigenvector=v
        )
        problems.assert_close(direction, expected)
        assert state.metrics.penalty_grad_norm > 0.01 * state.metrics.perturbed_grad_norm
        e = reference.perturbation(params, jax.grad(loss_fn)(params), 0.3, adaptive=adaptive)
        follows = reference.next_eigenvector(loss_fn, params, e, v, mask)
        sign = jnp.sign(reference.dot(follows, state.eigenvector))
        problems.assert_close(reference.scale(sign, state.eigenvector), follows)

    @pytest.mark.parametrize("name", [*PENALTIES, "grad_l1"])
    def test_step_without_the_penalty(self, net, name):
        params, loss_fn = net
        grad_fn = jax.grad(loss_fn)
        is_hero = name != "grad_l1"
        tx = hero_jax.hero(0.3, 700.0, penalty=name) if is_hero else hero_jax.grad_l1(0.3)
        _, state = updated(tx, params, loss_fn)
        other = reference.scale(0.9, params)
        direction, after = tx.update(grad_fn(other), state, other, grad_fn=grad_fn, penalize=False)
        expected, plain = updated(hero_jax.sam(0.3 if is_hero else 0.0, adaptive=True), other, loss_fn)
        problems.assert_close(direction, expected)
        problems.assert_close(after.metrics, plain.metrics, rtol=1e-6)
        # What follows an eigenvector goes on from where it was.
        assert int(after.count) == 2
        chex.assert_trees_all_equal(after[2:], state[2:])
        penalized, _ = updated(tx, other, loss_fn, state)
        assert reference.norm(reference.subtract(penalized, direction)) > 1e-3 * reference.norm(direction)

    @pytest.mark.parametrize("name", [*PENALTIES, "grad_l1"])
    def test_penalty_of_a_part_of_the_batch(self, net, name):
        """Derivatives of the penalty are those of the part; g, e, g* and d are those of the whole."""
        params, loss_fn = net
        mask, gamma = problems.kernels_mask(params), 0.3 if name in ("eigenvalue", "grad_l1") else 700.0
        batch = jax.tree.map(lambda x: x[::2], problems.convnet_batch())

        def part_loss(params):
            return problems.convnet_loss(params, batch)

        grad_fn, part_fn = jax.grad(loss_fn), jax.grad(part_loss)
        g = grad_fn(params)
        is_hero = name != "grad_l1"
        tx = hero_jax.hero(0.3, gamma, penalty=name) if is_hero else hero_jax.grad_l1(gamma)
        _, state = updated(tx, params, loss_fn)
        direction, after = tx.update(g, state, params, grad_fn=grad_fn, penalty_grad_fn=part_fn)
        e = reference.perturbation(params, g, 0.3 if is_hero else 0.0, adaptive=True)
        perturbed = reference.add(params, e)
        added = reference.subtract(direction, grad_fn(perturbed))
        d = reference.subtract(grad_fn(perturbed), g)
        along = jax.tree.map(lambda x, keep: 2 * x * keep / x.size, d, mask)
        expected = {
            "detached": lambda: reference.hessian_vector(part_loss, perturbed, along),
            "difference": lambda: reference.subtract(
                reference.hessian_vector(part_loss, perturbed, along),
                reference.hessian_vector(part_loss, params, along),
            ),
            "grad_l1": lambda: reference.hessian_vector(
                part_loss, params, reference.restrict(jax.tree.map(jnp.sign, g), mask)
            ),
        }.get(
            name,
            lambda: jax.grad(
                lambda p: reference.penalty_value(
                    part_loss, p, e, penalty=name, reduction="mean", mask=mask, eigenvector=state.eigenvector
                )
            )(params),
        )
        problems.assert_close(added, reference.scale(gamma, expected()))
        whole, _ = updated(tx, params, loss_fn, state)
        assert reference.norm(reference.subtract(whole, direction)) > 0.01 * reference.norm(added)
        if name == "eigenvalue":
            follows = reference.next_eigenvector(part_loss, params, e, state.eigenvector, mask)
            sign = jnp.sign(reference.dot(follows, after.eigenvector))
            problems.assert_close(reference.scale(sign, after.eigenvector), follows)

    def test_eigenvalue_penalty_of_a_negative_eigenvalue_has_the_other_sign(self, net):
        params, loss_fn = net
        tx = hero_jax.hero(0.0, 1.0, penalty="eigenvalue")
        state = tx.init(params)._replace(eigenvector=problems.random_like(jax.random.key(5), params))

        @jax.jit
        def direction(sign):
            grad_fn = jax.grad(lambda p: sign * loss_fn(p))
            return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]

        positive, negative = direction(1.0), direction(-1.0)
        g = jax.grad(loss_fn)(params)
        added = reference.subtract(positive, g)
        problems.assert_close(reference.subtract(negative, reference.scale(-1, g)), added)

    def test_tracked_vector_converges_to_the_dominant_eigenvector(self, net):
        params, loss_fn = net
        mask = problems.kernels_mask(params)
        grad_fn = jax.grad(loss_fn)

        @jax.jit
        def followed(rho):
            tx = hero_jax.hero(rho, 0.1, penalty="eigenvalue")

            def step(_, state):
                return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[1]

            return jax.lax.fori_loop(0, 400, step, tx.init(params))

        @jax.jit
        def hessian(rho):
            e = reference.perturbation(params, grad_fn(params), rho, adaptive=True)
            return reference.restricted_hessian(loss_fn, reference.add(params, e), mask)

        for rho in (0.0, 0.4):
            state = followed(rho)
            eigenvalues, eigenvectors = np.linalg.eigh(hessian(rho))
            dominant = np.argmax(np.abs(eigenvalues))
            v, _ = jax.flatten_util.ravel_pytree(state.eigenvector)
            assert abs(abs(v @ eigenvectors[:, dominant]) - 1) < 1e-8
            assert abs(float(state.metrics.penalty) - abs(eigenvalues[dominant])) < 1e-5 * abs(eigenvalues[dominant])

    def test_grad_l1_is_autodiff_of_the_gradient_l1_norm(self, net):
        params, loss_fn = net
        direction, state = updated(hero_jax.grad_l1(0.3), params, loss_fn)
        problems.assert_close(
            direction, reference.grad_l1_direction(loss_fn, params, 0.3, mask=problems.kernels_mask(params))
        )
        expected = sum(jnp.abs(g).sum() for g in jax.tree.leaves(jax.grad(loss_fn)(params)) if g.ndim > 1)
        np.testing.assert_allclose(state.metrics.penalty, expected, rtol=1e-6)

    @pytest.mark.parametrize("penalty", PENALTIES[1:])
    def test_quadratic_adds_exactly_nothing(self, x64, penalty):
        loss_fn, params, _ = problems.quadratic()
        direction, _ = updated(hero_jax.hero(0.3, 700.0, penalty=penalty), params, loss_fn)
        plain, _ = updated(hero_jax.hero(0.3, 0.0), params, loss_fn)
        problems.assert_close(direction, plain, rtol=1e-13)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_quadratic_detached_adds_two_gamma_h_d_h_e(self, x64, reduction):
        loss_fn, params, hessian = problems.quadratic()
        direction, _ = updated(hero_jax.hero(0.3, 700.0, reduction=reduction), params, loss_fn)
        plain, _ = updated(hero_jax.hero(0.3, 0.0), params, loss_fn)
        e, unravel = jax.flatten_util.ravel_pytree(perturbations.ascent(
            params, jax.grad(loss_fn)(params), 0.3, adaptive=True
        ))  # fmt: skip
        # Tree order: bias (2 entries, not penalised), then kernel (12).
        diagonal = jnp.array([0.0] * 2 + [1 / 12 if reduction == "mean" else 1.0] * 12)
        expected = unravel(2 * 700.0 * hessian @ (diagonal * (hessian @ e)))
        problems.assert_close(reference.subtract(direction, plain), expected, rtol=1e-12)

    def test_metrics_of_sam_and_grad_l1(self, net):
        params, loss_fn = net
        g = jax.grad(loss_fn)(params)
        _, state = updated(hero_jax.sam(0.3), params, loss_fn)
        np.testing.assert_allclose(state.metrics.perturbation_norm, 0.3, rtol=1e-6)
        assert state.metrics.penalty == state.metrics.penalty_grad_norm == 0
        direction, state = updated(hero_jax.grad_l1(0.3), params, loss_fn)
        np.testing.assert_allclose(state.metrics.perturbed_grad_norm, reference.norm(g), rtol=1e-6)
        added = reference.norm(reference.subtract(direction, g))
        np.testing.assert_allclose(state.metrics.penalty_grad_norm, added, rtol=1e-5)
        assert state.metrics.perturbation_norm == 0

    @pytest.mark.parametrize(
        ("tx", "adaptive"), [(hero_jax.hero(0.3, 0, eps=1.0), True), (hero_jax.sam(0.3, eps=1.0), False)]
    )
    def test_eps_enters_the_perturbation(self, net, tx, adaptive):
        params, loss_fn = net
        _, state = updated(tx, params, loss_fn)
        e = reference.perturbation(params, jax.grad(loss_fn)(params), 0.3, adaptive=adaptive, eps=1.0)
        np.testing.assert_allclose(state.metrics.perturbation_norm, reference.norm(e), rtol=1e-5)

    def test_mask_of_grad_l1(self, net):
        params, loss_fn = net
        mask = {"conv": {"kernel": False, "bias": True}, "norm": {"scale": False}, "head": [True, False]}
        direction, _ = updated(hero_jax.grad_l1(0.3, mask=mask), params, loss_fn)
        problems.assert_close(direction, reference.grad_l1_direction(loss_fn, params, 0.3, mask=mask))

    def test_eigenvector_starts_from_the_gradient_on_the_penalised_leaves(self, net):
        params, loss_fn = net
        mask = problems.kernels_mask(params)
        _, state = updated(hero_jax.hero(0.3, 0.7, penalty="eigenvalue"), params, loss_fn)
        g = jax.grad(loss_fn)(params)
        v = reference.restrict(g, mask)
        v = reference.scale(1 / reference.norm(v), v)
        e = reference.perturbation(params, g, 0.3, adaptive=True)
        product = reference.restrict(reference.hessian_vector(loss_fn, reference.add(params, e), v), mask)
        problems.assert_close(state.eigenvector, reference.scale(1 / reference.norm(product), product))
        rayleigh = reference.dot(v, product)
        error = reference.norm(reference.subtract(product, reference.scale(rayleigh, v))) / jnp.abs(rayleigh)
        np.testing.assert_allclose(state.eigenvector_residual, error, rtol=1e-5)
        np.testing.assert_allclose(state.metrics.penalty, jnp.abs(rayleigh), rtol=1e-5)

    def test_sam_equals_optax_over_ten_steps(self, x64):
        batch = problems.convnet_batch()
        grad_fn = jax.grad(lambda p: problems.convnet_loss(p, batch))
        ours = optax.chain(hero_jax.hero(rho=0.2, gamma=0, adaptive=False), optax.sgd(0.1, momentum=0.9))
        theirs = optax.contrib.sam(
            optax.sgd(0.1, momentum=0.9),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.2)),
            sync_period=2,
            opaque_mode=True,
        )
        p = q = problems.convnet_params()
        s, t = ours.init(p), theirs.init(q)
        for _ in range(10):
            u, s = ours.update(grad_fn(p), s, p, grad_fn=grad_fn)
            p = optax.apply_updates(p, u)
            u, t = theirs.update(grad_fn(q), t, q, grad_fn=lambda x, _: grad_fn(x))
            q = optax.apply_updates(q, u)
        problems.assert_close(p, q)
        assert reference.norm(reference.subtract(p, problems.convnet_params())) > 0.1

    def test_sam_and_asam_are_hero_without_penalty(self, net):
        params, loss_fn = net
        for adaptive, scope in itertools.product((True, False), ("global", "leaf")):
            ours, _ = updated(hero_jax.sam(0.2, adaptive=adaptive, scope=scope), params, loss_fn)
            same, _ = updated(hero_jax.hero(0.2, 0.0, adaptive=adaptive, scope=scope), params, loss_fn)
            chex.assert_trees_all_equal(ours, same)
            expected = reference.direction(
                loss_fn, params, 0.2, 0, adaptive=adaptive, scope=scope, mask=problems.kernels_mask(params)
            )
            problems.assert_close(ours, expected)

    def test_mask_names_the_penalised_leaves(self, net):
        params, loss_fn = net
        mask = {"conv": {"kernel": False, "bias": True}, "norm": {"scale": False}, "head": [True, False]}
        expected = reference.direction(loss_fn, params, 0.3, 700.0, adaptive=True, mask=mask)
        prefix = {"conv": {"kernel": False, "bias": True}, "norm": False, "head": [True, False]}
        for given in (mask, prefix, lambda p: mask):
            direction, _ = updated(hero_jax.hero(0.3, 700.0, mask=given), params, loss_fn)
            problems.assert_close(direction, expected)
        default, _ = updated(hero_jax.hero(0.3, 700.0), params, loss_fn)
        assert reference.norm(reference.subtract(direction, default)) > 1e-3

    def test_value_fn_takes_the_place_of_grad_fn(self, net):
        params, loss_fn = net
        tx = hero_jax.hero(0.3, 700.0)
        direction, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params, value_fn=loss_fn)
        problems.assert_close(direction, updated(tx, params, loss_fn)[0])

    def test_jitted_and_rematerialised_grad_fn(self, net):
        params, loss_fn = net
        tx = hero_jax.hero(0.3, 700.0)
        grad_fn = jax.jit(jax.grad(jax.checkpoint(loss_fn)))
        direction, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        problems.assert_close(direction, updated(tx, params, loss_fn)[0])

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_microbatched_grad_fn_gives_the_full_batch_direction(self, x64, penalty):
        x = jax.random.normal(jax.random.key(0), (8, 3))
        params = {"kernel": jax.random.normal(jax.random.key(1), (3, 2)), "bias": jnp.array([0.3, -0.4])}

        def loss_fn(p, x):
            return jnp.mean(jnp.cosh(x @ p["kernel"] + p["bias"]))

        def accumulated(p):
            def body(total, batch):
                return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(p, batch)), None

            total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, p), x.reshape(4, 2, 3))
            return jax.tree.map(lambda g: g / 4, total)

        tx = hero_jax.hero(0.3, 2.0, penalty=penalty)
        direction, state = tx.update(accumulated(params), tx.init(params), params, grad_fn=accumulated)
        whole, _ = updated(tx, params, lambda p: loss_fn(p, x))
        problems.assert_close(direction, whole)
        assert state.metrics.penalty_grad_norm > 0.01 * state.metrics.perturbed_grad_norm


def layers_loss(params, x):
    return jnp.mean(functools.reduce(lambda h, w: jnp.tanh(h @ w), params, x) ** 2)


@functools.cache
def operations(tx=None, fraction=None, given="penalty_grad_fn", **options):
    """The compiled floating-point operations of one step of `tx`, or of one gradient."""

    def step(params, x):
        grad_fn = functools.partial(jax.grad(layers_loss), x=x)
        part = {given: functools.partial(jax.grad(layers_loss), x=x[::fraction])} if fraction else {}
        grads = part.get("part_grad_fn", grad_fn)(params)
        return grads if tx is None else tx.update(grads, tx.init(params), params, grad_fn=grad_fn, **part, **options)

    params, x = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * 4, jax.ShapeDtypeStruct((64, 32), jnp.float32)
    return jax.jit(step).lower(params, x).compile().cost_analysis()["flops"]


class TestCost:
    """Operations as compiled, by XLA's own count, in units of one gradient."""

    @pytest.mark.parametrize(
        ("tx", "low", "high"),
        [
            (hero_jax.sam(0.1), 1.9, 2.2),
            (hero_jax.hero(0.1, 0), 1.9, 2.2),
            (hero_jax.grad_l1(0.1), 2.8, 3.2),
            (hero_jax.grad_l1(0), 0.9, 1.1),
            (hero_jax.hero(0.1, 1.0), 3.8, 4.3),
            (hero_jax.hero(0.1, 1.0, penalty="difference"), 5.5, 6.4),
            (hero_jax.hero(0.1, 1.0, product="difference"), 2.8, 3.3),
            (hero_jax.hero(0.1, 1.0, penalty="difference", product="difference"), 3.8, 4.4),
            (hero_jax.hero(0.1, 1.0, suppress=0.5), 3.8, 4.3),
            (hero_jax.sam(0.1, suppress=0.5), 1.9, 2.2),
            (hero_jax.hero(0.1, 1.0, penalty="eigenvalue"), 4.0, 8.2),
            (hero_jax.hero(0.1, 1.0, penalty="hvp"), 4.0, 11.2),
        ],
    )
    def test_step_costs_its_floor(self, tx, low, high):
        assert low < operations(tx) / operations() < high

    def test_step_without_the_penalty_costs_that_of_sam(self):
        assert operations(hero_jax.hero(0.1, 1.0), penalize=False) / operations() < 2.2
        assert operations(hero_jax.grad_l1(0.1), penalize=False) / operations() < 1.1

    def test_penalty_of_a_quarter_of_the_batch(self):
        assert operations(hero_jax.hero(0.1, 1.0), fraction=4) / operations() < 2 + 3 / 4 + 0.2
        assert operations(hero_jax.grad_l1(0.1), fraction=4) / operations() < 1 + 3 / 4 + 0.2

    @pytest.mark.parametrize(
        ("tx", "gradients"),
        [  # g* of the batch; g, and what the penalty and the suppression need, of a quarter
            (hero_jax.sam(0.1), 1 + 1 / 4),
            (hero_jax.sam(0.1, suppress=0.5), 1 + 2 / 4),
            (hero_jax.hero(0.1, 1.0), 1 + 4 / 4),
            (hero_jax.hero(0.1, 1.0, suppress=0.5), 1 + 4 / 4),
            (hero_jax.hero(0.1, 1.0, product="difference", suppress=0.5), 1 + 3 / 4),
        ],
    )
    def test_gradient_of_a_quarter_of_the_batch(self, tx, gradients):
        found = operations(tx, fraction=4, given="part_grad_fn") / operations()
        assert gradients - 0.1 < found < gradients + 0.3

    @pytest.mark.parametrize("tx", [hero_jax.sam(0.1, suppress=0.5), hero_jax.hero(0.1, 1.0), hero_jax.grad_l1(0.1)])
    def test_unperturbed_step_costs_the_gradient(self, tx):
        assert operations(tx, perturb=False) / operations() < 1.1


class TestSchedules:
    def test_rho_and_gamma_follow_the_steps_of_the_transformation(self, net):
        params, loss_fn = net
        rho = optax.linear_schedule(0.1, 0.4, 2)
        gamma = optax.linear_schedule(0.0, 800.0, 2)
        tx = hero_jax.hero(rho, gamma)
        state = tx.init(params)
        for step in range(4):
            direction, state = updated(tx, params, loss_fn, state)
            expected, _ = updated(hero_jax.hero(float(rho(step)), float(gamma(step))), params, loss_fn)
            problems.assert_close(direction, expected, rtol=1e-6)  # the schedules are float32
            assert int(state.count) == step + 1

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_scheduled_gamma_of_zero_adds_nothing_to_a_product_that_is_not_finite(self, penalty):
        def loss_fn(w):
            return jnp.sum(jnp.abs(w) ** 1.5)

        tx = hero_jax.hero(0.1, optax.linear_schedule(0.0, 5.0, 10), penalty=penalty)
        direction, _ = updated(tx, jnp.zeros((2, 3)), loss_fn)
        plain, _ = updated(hero_jax.hero(0.1, 0), jnp.zeros((2, 3)), loss_fn)
        chex.assert_trees_all_equal(direction, plain)

    def test_schedule_that_gives_no_scalar(self, net):
        params, loss_fn = net
        with pytest.raises(TypeError, match=r"`hero\(rho=...\)` must be a real scalar; got an array of shape \(3,\)"):
            updated(hero_jax.hero(lambda count: jnp.ones(3), 1.0), params, loss_fn)

    def test_traced_hyperparameters(self, net):
        params, loss_fn = net
        traced = jax.jit(lambda rho, gamma: updated(hero_jax.hero(rho, gamma), params, loss_fn)[0])
        problems.assert_close(traced(0.3, 700.0), updated(hero_jax.hero(0.3, 700.0), params, loss_fn)[0])
        problems.assert_close(traced(0.3, 0.0), updated(hero_jax.hero(0.3, 0), params, loss_fn)[0])


class TestTypesAndStructures:
    @pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.float16, 0.01), (jnp.bfloat16, 0.05)])
    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_emits_the_type_of_the_parameters_close_to_float64(self, x64, dtype, rtol, penalty):
        def run(dtype):
            # The 16-bit parameters are the truth in both runs: only the arithmetic differs.
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), problems.convnet_params())
            images, labels = problems.convnet_batch()
            batch = images.astype(jnp.bfloat16).astype(dtype), labels
            tx = hero_jax.hero(0.3, 0.5, penalty=penalty)
            return *updated(tx, params, lambda p: problems.convnet_loss(p, batch)), params

        (exact, _, _), (direction, state, params) = run(jnp.float64), run(dtype)
        chex.assert_trees_all_equal_dtypes(direction, params)
        chex.assert_tree_all_finite((direction, state))
        assert all(m.dtype == jnp.float32 for m in state.metrics)
        error = reference.norm(reference.subtract(exact, jax.tree.map(lambda x: x.astype(jnp.float64), direction)))
        assert error < rtol * reference.norm(exact)

    @pytest.mark.parametrize("penalty", ["detached", "hvp", "eigenvalue"])
    def test_float16_penalty_does_not_underflow(self, penalty):
        # D d, or the square of an entry of v, is below the smallest float16 number here.
        def loss_fn(w):
            return jnp.sum(jnp.sin(w)) * w.dtype.type(1e-3)

        def added(dtype):
            params = jnp.full((300, 300), 0.5, dtype)
            tx = hero_jax.hero(30.0, 1e6, adaptive=False, penalty=penalty)
            return float(updated(tx, params, loss_fn)[1].metrics.penalty_grad_norm)

        assert added(jnp.float32) > 0
        np.testing.assert_allclose(added(jnp.float16), added(jnp.float32), rtol=0.1)

    def test_perturbation_that_sixteen_bits_round_away_shows_in_the_metrics(self):
        params = jnp.ones((300, 300), jnp.bfloat16)
        _, state = updated(hero_jax.sam(0.05), params, lambda w: jnp.sum(w**2))
        assert state.metrics.perturbation_norm == 0

    def test_large_and_small_gradients_neither_overflow_nor_underflow(self):
        for size in (1e25, 1e-25):
            _, state = updated(hero_jax.sam(0.5), jnp.ones((2, 3)), lambda w, size=size: size * jnp.sum(w))
            np.testing.assert_allclose(state.metrics.grad_norm, size * 6**0.5, rtol=1e-5)

    def test_float16_norm_does_not_overflow(self):
        params = jnp.full((1000, 1), 20.0, jnp.float16)
        _, state = updated(hero_jax.sam(0.1), params, lambda w: jnp.sum(w.astype(jnp.float32) ** 2) / 2)
        np.testing.assert_allclose(state.metrics.grad_norm, 20 * np.sqrt(1000), rtol=1e-3)

    def test_structure_does_not_matter(self, x64):
        kernels = [jax.random.normal(jax.random.key(i), (3, 4)) for i in range(3)]
        x = jax.random.normal(jax.random.key(7), (5, 3))

        def value(a, b, c):
            return jnp.mean(jnp.tanh(x @ a) * jnp.sin(x @ b) + (x @ c) ** 3)

        pack = {
            "tuple": lambda a, b, c: (a, (b, c)),
            "list": lambda a, b, c: [a, [b], c],
            "dict": lambda a, b, c: {"z": a, "y": {"x": b}, "w": c},
            "none": lambda a, b, c: {"z": a, "y": [None, b], "w": c},
            "nnx": lambda a, b, c: nnx.State({"z": nnx.Param(a), "y": nnx.Param(b), "w": nnx.Param(c)}),
        }
        results = {}
        for name, build in pack.items():
            order = jax.tree.leaves(build(0, 1, 2))

            def loss_fn(params, order=order):
                leaves = jax.tree.leaves(params)
                return value(*(leaves[order.index(i)] for i in range(3)))

            direction, _ = updated(hero_jax.hero(0.3, 5.0), build(*kernels), loss_fn)
            assert jax.tree.structure(direction) == jax.tree.structure(build(*kernels))
            leaves = jax.tree.leaves(direction)
            results[name] = [leaves[order.index(i)] for i in range(3)]
        for result in results.values():
            problems.assert_close(result, results["tuple"], rtol=1e-13)

    def test_trains_a_linen_network(self):
        model = linen.Sequential([linen.Dense(8), jnp.tanh, linen.Dense(3)])
        x, y = jax.random.normal(jax.random.key(0), (20, 5)), jnp.arange(20) % 3
        params = model.init(jax.random.key(1), x)

        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

        tx = optax.chain(hero_jax.hero(0.1, 0.1), optax.adam(0.05))
        step = jax.jit(functools.partial(updated, tx, loss_fn=loss_fn))
        state, before = tx.init(params), loss_fn(params)
        for _ in range(30):
            updates, state = step(params, state=state)
            params = optax.apply_updates(params, updates)
        assert loss_fn(params) < 0.6 * before

    def test_trains_an_nnx_network_through_its_optimizer(self):
        model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.chain(hero_jax.hero(0.1, 0.1), optax.sgd(0.3)), wrt=nnx.Param)
        x, y = jax.random.normal(jax.random.key(0), (20, 5)), jnp.arange(20) % 3
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params):
            logits = nnx.merge(graph, params, rest)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        params = nnx.state(model, nnx.Param)
        before = loss_fn(params)
        for _ in range(20):
            params = nnx.state(model, nnx.Param)
            optimizer.update(model, jax.grad(loss_fn)(params), grad_fn=jax.grad(loss_fn))
        assert loss_fn(nnx.state(model, nnx.Param)) < 0.9 * before


class TestEdges:
    @pytest.mark.parametrize("penalty", PENALTIES)
    @pytest.mark.parametrize("adaptive", [True, False])
    @pytest.mark.parametrize("scope", ["global", "leaf"])
    def test_zero_gradient_gives_zero_not_nan(self, penalty, adaptive, scope):
        params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        tx = hero_jax.hero(0.5, 5.0, penalty=penalty, adaptive=adaptive, scope=scope)
        direction, state = updated(tx, params, lambda p: 0.0 * sum(x.sum() for x in jax.tree.leaves(p)))
        chex.assert_trees_all_equal(direction, jax.tree.map(jnp.zeros_like, params))
        assert state.metrics.perturbation_norm == 0

    def test_eigenvector_survives_a_product_that_is_not_finite(self):
        params = jnp.ones((2, 3))
        tx = hero_jax.hero(0.0, 1.0, penalty="eigenvalue")
        v = jnp.eye(2, 3)
        state = tx.init(params)._replace(eigenvector=v)
        _, state = updated(tx, params, lambda w: jnp.sum(w**2) * jnp.nan, state)
        chex.assert_trees_all_equal(state.eigenvector, v)

    def test_one_by_one_parameter(self):
        params = jnp.array([[2.0]])
        direction, _ = updated(hero_jax.hero(0.5, 1.0, adaptive=False), params, lambda w: jnp.sum(w**3))
        # w* = 2.5, g* = 18.75, d = 6.75, H(w*) = 15, added 2 * 15 * 6.75.
        np.testing.assert_allclose(direction, [[18.75 + 202.5]], rtol=1e-6)


class TestCustomDerivatives:
    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("activation", [problems.smooth, problems.smoother])
    @pytest.mark.parametrize("name", [*PENALTIES, "grad_l1"])
    def test_custom_vjp_changes_nothing(self, x64, name, activation, jit):
        x = problems.random_like(jax.random.key(0), jnp.zeros((7, 3)))
        params = {"kernel": problems.random_like(jax.random.key(1), jnp.zeros((3, 4))), "bias": jnp.linspace(-1, 1, 4)}

        def loss(activation, params):
            return jnp.mean(activation(x @ params["kernel"] + params["bias"]) ** 3)

        tx = hero_jax.grad_l1(0.3) if name == "grad_l1" else hero_jax.hero(0.3, 2.0, penalty=name)
        expected, _ = updated(tx, params, functools.partial(loss, jnp.tanh))
        run = functools.partial(updated, tx, loss_fn=functools.partial(loss, activation))
        direction, _ = (jax.jit(run) if jit else run)(params)
        problems.assert_close(direction, expected, rtol=1e-9)


class TestWhatIsPerturbed:
    """`perturb_mask` and a mask as `adaptive`, by their formulas, written out."""

    @staticmethod
    def perturbation(params, g, rho, scaled, moved, scope):
        """e = rho s^2 g / ||s g|| with s = |w| on scaled leaves, 0 outside `moved`, norms over `moved` leaves."""
        s = jax.tree.map(lambda w, is_scaled: jnp.abs(w) if is_scaled else jnp.ones_like(w), params, scaled)
        lengths = jax.tree.map(lambda s, g, keep: keep * jnp.sum((s * g) ** 2), s, g, moved)
        whole = jnp.sqrt(sum(jax.tree.leaves(lengths)))
        norms = jax.tree.map(lambda n: jnp.sqrt(n) if scope == "leaf" else whole, lengths)
        return jax.tree.map(lambda s, g, n, keep: rho * s**2 * g / n if keep else jnp.zeros_like(g), s, g, norms, moved)

    @pytest.mark.parametrize("scope", ["global", "leaf"])
    @pytest.mark.parametrize("adaptive", [True, False, "kernels"])
    @pytest.mark.parametrize("mask", [None, PERTURBED])
    def test_direction_is_the_gradient_at_the_stated_point(self, net, adaptive, mask, scope):
        params, loss_fn = net
        everything = jax.tree.map(lambda _: True, params)
        kernels = problems.kernels_mask(params)
        scaled = kernels if adaptive == "kernels" else jax.tree.map(lambda _: adaptive, params)
        chosen = problems.kernels_mask if adaptive == "kernels" else adaptive
        g = jax.grad(loss_fn)(params)
        e = self.perturbation(params, g, 0.3, scaled, mask or everything, scope)
        perturbed = reference.add(params, e)
        options = {"adaptive": chosen, "perturb_mask": mask, "scope": scope}
        direction, state = updated(hero_jax.sam(0.3, **options), params, loss_fn)
        problems.assert_close(direction, jax.grad(loss_fn)(perturbed))
        np.testing.assert_allclose(state.metrics.perturbation_norm, reference.norm(e), rtol=1e-5)
        direction, _ = updated(hero_jax.hero(0.3, 50.0, **options), params, loss_fn)
        d = reference.subtract(jax.grad(loss_fn)(perturbed), g)
        along = jax.tree.map(lambda x, keep: 2 * x * keep / x.size, d, kernels)
        product = reference.hessian_vector(loss_fn, perturbed, along)
        problems.assert_close(direction, reference.add(jax.grad(loss_fn)(perturbed), reference.scale(50.0, product)))

    def test_every_choice_is_another_point(self, net):
        params, loss_fn = net
        found = [
            updated(hero_jax.sam(0.3, adaptive=adaptive, perturb_mask=mask), params, loss_fn)[0]
            for adaptive in (True, False, problems.kernels_mask)
            for mask in (None, PERTURBED)
        ]
        for a, b in itertools.combinations(found, 2):
            assert reference.norm(reference.subtract(a, b)) > 1e-3 * reference.norm(a)

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_every_penalty_takes_a_perturb_mask_inside_shard_map(self, net, penalty):
        params, loss_fn = net
        tx = hero_jax.hero(0.3, 0.5, penalty=penalty, perturb_mask=PERTURBED, axis_name="data")
        one = hero_jax.hero(0.3, 0.5, penalty=penalty, perturb_mask=PERTURBED)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        spec = jax.sharding.PartitionSpec

        def step(params, factor):
            grad_fn = jax.grad(lambda p: factor[0] * loss_fn(p))
            return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

        mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
        expected, _ = updated(one, params, loss_fn)
        problems.assert_close(jax.jit(mapped)(params, jnp.array([0.5, 1.5])), expected, rtol=1e-9)

    def test_numpy_bools_are_bools(self):
        params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}
        for adaptive in (True, False):
            found = perturbations.ascent(params, grads, 0.5, adaptive=np.bool_(adaptive))
            problems.assert_close(found, perturbations.ascent(params, grads, 0.5, adaptive=adaptive))

    def test_bias_of_zero_moves_where_it_is_not_scaled(self):
        params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        grad_fn = jax.grad(lambda p: jnp.sum(jnp.ones(2) @ p["kernel"] + p["bias"]))
        for adaptive, moves in ((True, False), ({"kernel": True, "bias": False}, True)):
            e = perturbations.ascent(params, grad_fn(params), 0.5, adaptive=adaptive)
            assert bool((e["bias"] != 0).all()) == moves


class TestErrors:
    @pytest.mark.parametrize(
        ("build", "kind", "message"),
        [
            (lambda: hero_jax.hero(0.1, 1.0, eps=lambda count: 1.0), TypeError, r"`hero\(eps=...\)` must be a real sc"),
            (lambda: hero_jax.sam(0.1, eps=lambda count: 1.0), TypeError, r"`sam\(eps=...\)` must be a real scalar"),
            (
                lambda: hero_jax.hero(0.1, 1.0, penalty="eigenvalue", reduction="sum"),
                ValueError,
                r"`hero\(reduction=...\)` must be left out with penalty='eigenvalue', .*; got 'sum'",
            ),
            (
                lambda: hero_jax.sam(0.1, adaptive=1),
                TypeError,
                r"`sam\(adaptive=...\)` must hold Python bools; at params it has 1",
            ),
            (
                lambda: hero_jax.sam(0.1, adaptive=None),
                TypeError,
                r"`sam\(adaptive=...\)` must hold Python bools; .* None",
            ),
            (
                lambda: hero_jax.sam(0.1, adaptive={"w": 2}),
                TypeError,
                r"`sam\(adaptive=...\)` must hold .*; at params\['w'\] it has 2",
            ),
            (
                lambda: hero_jax.sam(0.1, perturb_mask=3).init({"w": jnp.ones(2)}),
                TypeError,
                r"`sam\(perturb_mask=...\)` must hold Python bools; at params it has 3",
            ),
            (
                lambda: hero_jax.sam(0.1, perturb_mask=False).init({"w": jnp.ones(2)}),
                ValueError,
                r"`sam\(perturb_mask=...\)` must select at least one leaf",
            ),
            (
                lambda: hero_jax.sam(0.1, perturb_mask={"v": True}).init({"w": jnp.ones(2)}),
                ValueError,
                r"`sam\(perturb_mask=...\)` must have the structure of `params`",
            ),
            (
                lambda: hero_jax.hero(0.1, 1.0, perturb_mask=lambda p: {"w": False}).init({"w": jnp.ones((2, 2))}),
                ValueError,
                r"`hero\(perturb_mask=...\)` must select at least one leaf",
            ),
        ],
    )
    def test_options_that_cannot_be(self, build, kind, message):
        with pytest.raises(kind, match=message):
            build()

    @pytest.mark.parametrize("name", ["hero", "sam", "grad_l1"])
    def test_state_that_came_back_as_something_else(self, case, name):
        params, grad_fn = case
        tx = {"hero": hero_jax.hero(0.1, 1.0), "sam": hero_jax.sam(0.1), "grad_l1": hero_jax.grad_l1(0.1)}[name]
        for state in (tx.init(params)._asdict(), tuple(tx.init(params)), None):
            kind = type(state).__name__
            with pytest.raises(
                TypeError, match=rf"`{name}` needs the `HeroState` that `init` .* got a {kind}\. Restore"
            ):
                tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    def test_penalize_is_static(self):
        tx, params = hero_jax.hero(0.1, 1.0), jnp.ones((2, 3))
        with pytest.raises(TypeError, match=r"`hero update\(penalize=...\)` must be True or False; got 1"):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p, penalize=1)

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: hero_jax.hero(-0.1, 1.0), r"`hero\(rho=...\)` must be non-negative and finite; got -0.1"),
            (lambda: hero_jax.hero(0.1, float("nan")), r"`hero\(gamma=...\)` must be non-negative and finite; got nan"),
            (lambda: hero_jax.hero(0.1, np.float32("inf")), r"`hero\(gamma=...\)` .* got inf"),
            (lambda: hero_jax.hero(0.1, 1.0, penalty="detach"), r"`hero\(penalty=...\)` .* Did you mean 'detached'"),
            (lambda: hero_jax.hero(0.1, 1.0, scope="layer"), r"`hero\(scope=...\)` must be one of 'global', 'leaf'"),
            (lambda: hero_jax.hero(0.1, 1.0, reduction="avg"), r"`hero\(reduction=...\)` must be one of"),
            (lambda: hero_jax.hero(0.1, 1.0, eps=-1.0), r"`hero\(eps=...\)` must be non-negative and finite; got -1.0"),
            (lambda: hero_jax.hero(0.1, 1.0, sync=False), r"`hero\(sync=False\)` needs `axis_name`"),
            (lambda: hero_jax.sam(float("inf")), r"`sam\(rho=...\)` must be non-negative and finite; got inf"),
            (lambda: hero_jax.sam(0.1, scope="x"), r"`sam\(scope=...\)` must be one of"),
            (lambda: hero_jax.grad_l1(-1), r"`grad_l1\(gamma=...\)` must be non-negative and finite; got -1.0"),
        ],
    )
    def test_bad_hyperparameters(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()

    @pytest.mark.parametrize("axis_name", [0, "", (), ("data", 0), ["data"]])
    def test_axis_name_that_is_no_name(self, axis_name):
        for build in (hero_jax.sam, hero_jax.grad_l1, functools.partial(hero_jax.hero, gamma=1.0)):
            with pytest.raises(TypeError, match=r"\(axis_name=...\)` must be the name of a mapped axis or a tuple of"):
                build(0.1, axis_name=axis_name)

    def test_container_of_another_type(self):
        params = {"w": [jnp.ones((2, 3))]}
        tx = hero_jax.hero(0.1, 1.0)
        with pytest.raises(ValueError, match="node 0 of params is a tuple where that of `params` is a list"):
            tx.update({"w": (jnp.ones((2, 3)),)}, tx.init(params), params, grad_fn=lambda p: p)

    def test_messages_are_one_line(self, case):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        calls = [
            lambda: tx.update(grad_fn(params), tx.init(params), params, grad_fn=jnp.ones((50, 50))),
            lambda: hero_jax.hero(jnp.ones((30, 30)), 1.0),
            lambda: hero_jax.hero(0.1, 1.0, mask={"w": jnp.ones((30, 30)), "b": True}).init(params),
        ]
        for call in calls:
            with pytest.raises(TypeError) as raised:
                call()
            assert "\n" not in str(raised.value)
            assert len(str(raised.value)) < 200

    def test_state_of_another_configuration(self, case):
        params, grad_fn = case
        state = hero_jax.hero(0.1, 1.0).init(params)
        with pytest.raises(ValueError, match=r"`state.eigenvector` must have the structure of `params`"):
            hero_jax.hero(0.1, 1.0, penalty="eigenvalue").update(grad_fn(params), state, params, grad_fn=grad_fn)

    def test_callable_pytree_of_bools_is_a_mask_and_no_function(self):
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Layer:
            kernel: Any
            bias: Any

            def __call__(self, x):
                return x @ self.kernel + self.bias

        tx = hero_jax.hero(0.1, 1.0, mask=Layer(True, False))
        assert tx.init(Layer(jnp.ones((2, 3)), jnp.ones(3))).count == 0

    @pytest.mark.parametrize("value", ["0.1", True, None, [0.1]])
    def test_hyperparameters_of_the_wrong_kind(self, value):
        with pytest.raises(TypeError, match=r"`hero\(rho=...\)` must be a real scalar; got"):
            hero_jax.hero(value, 1.0)

    @pytest.fixture
    def case(self):
        params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        return params, jax.grad(lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2))

    def test_no_grad_fn(self, case):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        with pytest.raises(ValueError, match=r"`hero` needs `grad_fn` .* got None"):
            tx.update(grad_fn(params), tx.init(params), params)

    def test_no_params(self, case):
        params, grad_fn = case
        tx = hero_jax.grad_l1(0.1)
        with pytest.raises(ValueError, match=r"`grad_l1` needs `params`.* got None"):
            tx.update(grad_fn(params), tx.init(params), grad_fn=grad_fn)

    def test_grad_fn_that_is_not_callable(self, case):
        params, grad_fn = case
        tx = hero_jax.sam(0.1)
        with pytest.raises(TypeError, match="`sam` needs a callable `grad_fn`"):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn(params))

    def test_penalty_grad_fn_that_does_not_fit(self, case):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        with pytest.raises(TypeError, match="`hero` needs a callable `penalty_grad_fn`"):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, penalty_grad_fn=0)
        with pytest.raises(ValueError, match=r"`penalty_grad_fn\(params\)` must have the structure of `params`"):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, penalty_grad_fn=lambda p: {})

    @pytest.mark.parametrize(
        ("mask", "kind", "message"),
        [
            ({"w": True, "c": True}, ValueError, r"it has params\['c'\] where `params` has params\['b'\]"),
            ({"w": True}, ValueError, r"it has params\['w'\] where `params` has params\['b'\]"),
            ({"w": True, "b": True, "z": True}, ValueError, r"only `hero\(mask=...\)` has params\['z'\]"),
            ({"w": True, "b": "yes"}, TypeError, r"must hold Python bools; at params\['b'\] it has 'yes'"),
            ({"w": False, "b": False}, ValueError, r"must select at least one leaf; got none of 2"),
        ],
    )
    def test_bad_masks(self, case, mask, kind, message):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0, mask=mask)
        with pytest.raises(kind, match=message):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)

    def test_default_mask_that_selects_nothing(self):
        tx = hero_jax.hero(0.1, 1.0)
        params = jnp.ones(3)
        with pytest.raises(ValueError, match=r"`hero\(mask=...\)` must select at least one leaf"):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p)

    @pytest.mark.parametrize(
        ("grads", "message"),
        [
            ({"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, r"`updates` .* at params\['w'\] it is \(3, 2\) .* \(2, 3\)"),
            ({"w": jnp.ones((2, 3))}, r"`updates` must have the structure of `params`; it has params\['w'\]"),
            ({"w": jnp.ones((2, 3)), "b": jnp.ones(3), "c": 1.0}, r"`updates` .* it has params\['c'\]"),
            ([jnp.ones(3), jnp.ones((2, 3))], r"`updates` .* it has params\[0\] where `params` has params\['b'\]"),
        ],
    )
    def test_updates_that_do_not_match(self, case, grads, message):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(params), params, grad_fn=grad_fn)

    def test_grad_fn_that_returns_more_than_the_gradient(self, case):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        told = r"`grad_fn\(params\)` must have the structure of `params`; it is a tuple of 2: drop the value or the aux"
        with pytest.raises(ValueError, match=told):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=lambda p: (grad_fn(p), {"accuracy": 1.0}))

    def test_grad_fn_that_is_the_loss(self, case):
        params, grad_fn = case
        tx = hero_jax.hero(0.1, 1.0)
        with pytest.raises(
            ValueError, match=r"`grad_fn\(params\)` must have .*; it is one array where `params` has params"
        ):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=lambda p: jnp.sum(p["w"]))

    def test_integer_parameters(self):
        tx = hero_jax.hero(0.1, 1.0)
        params = {"w": jnp.ones((2, 3)), "n": jnp.arange(3)}
        with pytest.raises(TypeError, match=r"floating-point leaves; at params\['n'\] it has int32"):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p)

    def test_optax_masked_is_refused(self, case):
        params, grad_fn = case
        tx = optax.masked(hero_jax.hero(0.1, 1.0), {"w": True, "b": False})
        with pytest.raises(
            ValueError, match=r"at params\['b'\] it is masked. Give the transformation a `mask` .* `perturb_mask`"
        ):
            tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)

"""What a step of hero and sam can be given: suppression, a part of the batch, another ascent, no perturbation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from tests import problems, reference

# With a strength at which each penalty matters.
PENALTIES = {"none": 0.0, "detached": 30.0, "difference": 30.0, "hvp": 30.0, "eigenvalue": 0.5}
RHO = 0.6


def unit_on_kernels(params):
    v = reference.restrict(problems.random_like(jax.random.key(5), params), problems.kernels_mask(params))
    return reference.scale(1 / reference.norm(v), v)


def transformation(penalty, adaptive, **options):
    if penalty == "none":
        return hero_jax.sam(RHO, adaptive=adaptive, **options)
    return hero_jax.hero(RHO, PENALTIES[penalty], penalty=penalty, adaptive=adaptive, **options)


def difference(a, b):
    """||a - b|| relative to ||b||."""
    return reference.norm(reference.subtract(a, b)) / reference.norm(b)


@pytest.fixture
def net(x64):
    """Parameters, the loss of the whole batch, that of a part, and a momentum."""
    params = problems.dense_params()
    momentum = problems.random_like(jax.random.key(1), params)
    return params, problems.dense_loss(), problems.dense_loss(slice(0, None, 3)), momentum


class TestExactness:
    @pytest.mark.parametrize("options", ["suppress", "part", "ascent", "suppress part ascent"])
    @pytest.mark.parametrize(
        ("penalty", "adaptive"),
        [
            ("none", False),
            ("none", True),
            ("detached", True),
            ("difference", False),
            ("hvp", True),
            ("eigenvalue", True),
        ],
    )
    def test_direction_is_that_of_the_definition(self, net, penalty, adaptive, options):
        params, loss_fn, part_loss, momentum = net
        given = {
            name: value
            for name, value in {"suppress": 0.5, "part": part_loss, "ascent": momentum}.items()
            if name in options
        }
        v = unit_on_kernels(params)

        def defined(suppress=0.0, part=None, ascent=None):
            return reference.direction(
                loss_fn,
                params,
                RHO,
                PENALTIES[penalty],
                adaptive=adaptive,
                penalty=penalty,
                mask=problems.kernels_mask(params),
                eigenvector=v,
                suppress=suppress,
                part_loss_fn=part,
                ascent=ascent,
            )

        tx = transformation(penalty, adaptive, suppress=given.get("suppress", 0.0))
        state = tx.init(params)
        if penalty == "eigenvalue":
            state = state._replace(eigenvector=v)
        keywords = {"grad_fn": jax.grad(loss_fn)}
        keywords |= {"part_grad_fn": jax.grad(part_loss)} if "part" in given else {}
        keywords |= {"ascent": momentum} if "ascent" in given else {}
        grads = jax.grad(given.get("part", loss_fn))(params)
        direction, state = tx.update(grads, state, params, **keywords)
        expected = defined(**given)
        problems.assert_close(direction, expected)
        for name in given:
            assert difference(defined(**{k: x for k, x in given.items() if k != name}), expected) > 0.01, name
        if penalty != "none":
            assert state.metrics.penalty_grad_norm > 0.01 * state.metrics.perturbed_grad_norm

    def test_suppression_looks_at_the_gradients_of_one_part(self, net):
        """Not at the whole batch's g* against the part's g, whose quotients say nothing of w*."""
        params, loss_fn, part_loss, _ = net
        tx = hero_jax.sam(RHO, suppress=1.0)
        g = jax.grad(part_loss)(params)
        direction, _ = tx.update(
            g, tx.init(params), params, grad_fn=jax.grad(loss_fn), part_grad_fn=jax.grad(part_loss)
        )
        perturbed = reference.add(params, reference.perturbation(params, g, RHO, adaptive=False))
        whole, part = jax.grad(loss_fn)(perturbed), jax.grad(part_loss)(perturbed)
        problems.assert_close(direction, reference.suppressed(g, whole, 1.0, part))
        assert difference(reference.suppressed(g, whole, 1.0), direction) > 0.01

    def test_penalty_grad_fn_beside_a_part_names_the_hessian(self, net):
        params, loss_fn, part_loss, _ = net
        third_loss = problems.dense_loss(slice(1, 4))
        g = jax.grad(part_loss)(params)
        tx = hero_jax.hero(RHO, 0.3)
        call = functools.partial(tx.update, g, tx.init(params), params, grad_fn=jax.grad(loss_fn))
        direction, _ = call(part_grad_fn=jax.grad(part_loss), penalty_grad_fn=jax.grad(third_loss))
        perturbed = reference.add(params, reference.perturbation(params, g, RHO, adaptive=True))
        d = reference.subtract(jax.grad(part_loss)(perturbed), g)
        along = jax.tree.map(lambda x, keep: 2 * x * keep / x.size, d, problems.kernels_mask(params))
        product = reference.hessian_vector(third_loss, perturbed, along)
        expected = reference.add(jax.grad(loss_fn)(perturbed), reference.scale(0.3, product))
        problems.assert_close(direction, expected)
        assert difference(call(part_grad_fn=jax.grad(part_loss))[0], expected) > 0.01

    @pytest.mark.parametrize("scope", ["global", "leaf"])
    def test_ascent_has_the_norm_of_its_own_tree(self, net, scope):
        params, loss_fn, _, momentum = net
        tx = hero_jax.sam(RHO, scope=scope)
        g = jax.grad(loss_fn)(params)
        call = functools.partial(tx.update, g, tx.init(params), params, grad_fn=jax.grad(loss_fn))
        direction, state = call(ascent=momentum)
        e = reference.perturbation(params, momentum, RHO, adaptive=False, scope=scope)
        problems.assert_close(direction, jax.grad(loss_fn)(reference.add(params, e)))
        problems.assert_close(call(ascent=reference.scale(-3.0, momentum))[0], jax.grad(loss_fn)(
            reference.subtract(params, e)
        ))  # fmt: skip
        np.testing.assert_allclose(state.metrics.perturbation_norm, reference.norm(e), rtol=1e-5)
        np.testing.assert_allclose(state.metrics.grad_norm, reference.norm(g), rtol=1e-5)

    def test_ascent_is_not_needed_where_the_gradient_is_zero(self, net):
        params, loss_fn, _, _ = net
        zeros = jax.tree.map(jnp.zeros_like, params)
        tx = hero_jax.hero(RHO, 0.3, suppress=0.5)
        direction, state = tx.update(zeros, tx.init(params), params, grad_fn=jax.grad(loss_fn), ascent=zeros)
        assert state.metrics.perturbation_norm == 0
        chex.assert_tree_all_finite(direction)


class TestSuppress:
    @staticmethod
    def step(net, suppress):
        params, loss_fn, *_ = net
        tx = hero_jax.sam(RHO, suppress=suppress)
        return tx.update(jax.grad(loss_fn)(params), tx.init(params), params, grad_fn=jax.grad(loss_fn))[0]

    def test_one_removes_and_keeps_the_others_bit_for_bit(self, net):
        params, loss_fn, *_ = net
        g, g_star = jax.grad(loss_fn)(params), self.step(net, 0.0)
        removed = self.step(net, 1.0)
        counts = []
        for x, y, full in zip(*map(jax.tree.leaves, (g, removed, g_star)), strict=True):
            is_smaller = (np.abs(full) < np.abs(x)) & (np.sign(full) == np.sign(x))
            np.testing.assert_array_equal(y, np.where(is_smaller, 0, full))
            counts += [is_smaller.sum(), (~is_smaller).sum()]
        assert sum(counts[::2]) > 10
        assert sum(counts[1::2]) > 10

    def test_share_may_be_mapped_over(self, net):
        shares = jnp.array([0.0, 0.3, 1.0])
        found = jax.vmap(lambda share: self.step(net, share))(shares)
        for i, share in enumerate(shares):
            problems.assert_close(jax.tree.map(lambda x, i=i: x[i], found), self.step(net, float(share)))
        assert difference(self.step(net, 0.3), self.step(net, 0.0)) > 0.01

    def test_follows_a_schedule(self, net):
        params, loss_fn, *_ = net
        schedule = optax.linear_schedule(0.0, 1.0, 2)
        for build in (hero_jax.sam, functools.partial(hero_jax.hero, gamma=0.3)):
            tx = build(RHO, suppress=schedule)
            state = tx.init(params)
            for count in range(3):
                call = functools.partial(tx.update, jax.grad(loss_fn)(params), grad_fn=jax.grad(loss_fn))
                direction, state = call(state, params)
                constant = build(RHO, suppress=count / 2)
                expected, _ = constant.update(
                    jax.grad(loss_fn)(params), constant.init(params), params, grad_fn=jax.grad(loss_fn)
                )
                problems.assert_close(direction, expected)

    def test_injected_schedule(self, net):
        params, loss_fn, *_ = net
        grad_fn = jax.grad(loss_fn)
        tx = optax.inject_hyperparams(hero_jax.sam)(RHO, suppress=optax.linear_schedule(0.25, 0.75, 1))
        state = tx.init(params)
        for suppress in (0.25, 0.75):
            direction, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            problems.assert_close(direction, self.step(net, suppress), rtol=1e-6)
            np.testing.assert_allclose(state.hyperparams["suppress"], suppress)

    def test_zero_adds_no_operation(self):
        params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}

        def program(build, **options):
            tx = build(**options)
            grad_fn = jax.grad(lambda p: jnp.sum(jnp.cosh(p["kernel"]) + p["bias"] ** 2))
            step = jax.make_jaxpr(lambda p, state: tx.update(grad_fn(p), state, p, grad_fn=grad_fn))
            return str(step(params, tx.init(params)))

        for build, options in ((hero_jax.sam, {"rho": 0.1}), (hero_jax.hero, {"rho": 0.1, "gamma": 1.0})):
            plain = program(build, **options)
            for zero in (0, 0.0, np.float32(0)):
                assert program(build, **options, suppress=zero) == plain
            added = program(build, **options, suppress=0.5)
            assert added.count(" lt ") == plain.count(" lt ") + 2, "one comparison for each leaf"

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    @pytest.mark.parametrize("penalty", ["none", "detached"])
    def test_sixteen_bit_parameters(self, dtype, penalty):
        params = {"kernel": jnp.linspace(0.5, 2, 6, dtype=dtype).reshape(2, 3), "bias": jnp.ones(3, dtype)}
        # The gradient of cos falls where that of cosh grows.
        grad_fn = jax.grad(lambda p: jnp.sum(jnp.cosh(p["kernel"])) + jnp.sum(jnp.sin(p["bias"])))
        options = {"gamma": 1e-3} if penalty == "detached" else {}
        build = hero_jax.hero if options else hero_jax.sam
        found = []
        for suppress in (0.0, 1.0):
            tx = build(0.5, suppress=suppress, adaptive=False, **options)
            direction, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
            chex.assert_trees_all_equal_dtypes(direction, params)
            found.append(direction)
        np.testing.assert_array_equal(found[1]["bias"], 0)
        assert (found[0]["bias"] > 0.1).all()
        np.testing.assert_array_equal(found[1]["kernel"], found[0]["kernel"])

    @pytest.mark.parametrize("build", [hero_jax.sam, functools.partial(hero_jax.hero, gamma=1.0)])
    @pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), np.float32(2)])
    def test_share_outside_its_range(self, build, value):
        with pytest.raises(ValueError, match=r"`(hero|sam)\(suppress=...\)` must be between 0 and 1; got"):
            build(0.1, suppress=value)

    def test_share_of_the_wrong_kind(self):
        with pytest.raises(TypeError, match=r"`sam\(suppress=...\)` must be a real scalar; got 'half'"):
            hero_jax.sam(0.1, suppress="half")
        tx, params = hero_jax.sam(0.1, suppress=lambda count: jnp.ones(3)), jnp.ones((2, 3))
        with pytest.raises(TypeError, match=r"`sam\(suppress=...\)` must be a real scalar; got an array of shape"):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p)


class TestUnperturbed:
    @pytest.mark.parametrize("name", [*PENALTIES, "grad_l1"])
    @pytest.mark.parametrize("jit", [False, True])
    def test_direction_is_the_gradient_and_nothing_is_evaluated(self, name, jit):
        params = {"kernel": jnp.linspace(0.5, 2, 6).reshape(2, 3), "bias": jnp.linspace(-1, 1, 3)}
        calls = []

        def grad_fn(params):
            calls.append(1)
            return jax.grad(lambda p: jnp.sum(jnp.cosh(p["kernel"] * p["bias"])))(params)

        tx = hero_jax.grad_l1(0.3) if name == "grad_l1" else transformation(name, True, suppress=0.5)
        g = grad_fn(params)
        _, state = tx.update(g, tx.init(params), params, grad_fn=grad_fn)
        assert len(calls) > 1
        calls.clear()

        # grad_l1 takes none of a part.
        part = {} if name == "grad_l1" else {"part_grad_fn": grad_fn}

        def update(perturb, state):
            return tx.update(g, state, params, grad_fn=grad_fn, penalty_grad_fn=grad_fn, perturb=perturb, **part)

        direction, after = (jax.jit(update, static_argnums=0) if jit else update)(False, state)
        assert not calls
        chex.assert_trees_all_equal(direction, g)
        assert int(after.count) == 2
        chex.assert_trees_all_equal(after[2:], state[2:])
        norm = float(reference.norm(g))
        np.testing.assert_allclose(after.metrics, [norm, norm, 0, 0, 0], rtol=1e-6)
        if name == "eigenvalue":
            assert reference.norm(after.eigenvector) > 0.9
        assert difference(update(True, state)[0], g) > 1e-3

    def test_schedules_go_on(self):
        tx = hero_jax.sam(optax.linear_schedule(0.0, 1.0, 4))
        params, state = jnp.ones((2, 3)), tx.init(jnp.ones((2, 3)))
        for perturb in (False, False, True):
            _, state = tx.update(params, state, params, grad_fn=lambda p: p, perturb=perturb)
        np.testing.assert_allclose(state.metrics.perturbation_norm, 0.5, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
    def test_emits_the_type_of_the_parameters(self, dtype):
        params, tx = jnp.ones((2, 3), dtype), hero_jax.hero(0.1, 1.0)
        direction, _ = tx.update(2 * jnp.ones((2, 3)), tx.init(params), params, grad_fn=lambda p: p, perturb=False)
        assert direction.dtype == dtype
        np.testing.assert_array_equal(direction, 2)


class TestErrors:
    @pytest.mark.parametrize("build", [hero_jax.sam, functools.partial(hero_jax.hero, gamma=1.0)])
    @pytest.mark.parametrize(
        ("keywords", "kind", "message"),
        [
            ({"perturb": 1}, TypeError, r"`(hero|sam) update\(perturb=...\)` must be True or False; got 1"),
            ({"part_grad_fn": 0}, TypeError, "`(hero|sam)` needs a callable `part_grad_fn`; got 0"),
            (
                {"part_grad_fn": lambda p: {"v": p["w"]}},
                ValueError,
                r"`part_grad_fn\(params\)` must have the structure of `params`",
            ),
            ({"ascent": {"v": 0}}, ValueError, r"`ascent` must have the structure of `params`; it has params\['v'\]"),
            ({"ascent": {"w": 0}}, ValueError, r"`ascent` must have the shapes of `params`; at params\['w'\]"),
        ],
    )
    def test_keywords_that_do_not_fit(self, build, keywords, kind, message):
        params = {"w": jnp.ones((2, 3))}
        tx = build(0.1, suppress=0.5)
        with pytest.raises(kind, match=message):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p, **keywords)


@pytest.mark.parametrize("given", ["part_grad_fn", "ascent"])
def test_grad_l1_perturbs_nothing_and_says_so(given):
    params = {"w": jnp.ones((2, 3))}
    grad_fn = jax.grad(lambda p: jnp.sum(jnp.cosh(p["w"])))
    tx, value = hero_jax.grad_l1(0.1), grad_fn if given == "part_grad_fn" else params
    with pytest.raises(hero_jax.ArgumentError, match=rf"^`grad_l1` takes no `{given}`, since it perturbs nothing;"):
        tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, **{given: value})

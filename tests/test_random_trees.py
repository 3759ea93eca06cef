"""Random pytrees through every transformation, operator and quantizer, in float64 against plain definitions.

CI makes the same calls each time; `pytest tests/test_random_trees.py --attacks 3000 --attack-seed 7` makes others.
"""

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from hero_jax import curvature, quantize, spectrum
from tests import problems, reference
from tests.test_quantize import PAIRS
from tests.test_quantize import reference as rounded

# Of no effect.
BATCH = np.zeros((1, 1))
SHAPES = ((), (1,), (4,), (2, 3), (4, 1), (2, 2, 3))


def tree_of(rng, leaf, depth=0):
    """A tree of dicts, lists and tuples with one to six leaves, `leaf()` each."""
    if depth == 3 or (depth and rng.random() < 0.5):
        return leaf()
    inside = [tree_of(rng, leaf, depth + 1) for _ in range(rng.randint(1, 2))]
    kind = rng.choice(("dict", "list", "tuple"))
    if kind == "dict":
        return {rng.choice(("b", "a", "layer 1", "é")) + str(i): each for i, each in enumerate(inside)}
    return inside if kind == "list" else tuple(inside)


def params_of(rng, structures=12):
    """One of so many trees, since operations are compiled for each, with random values."""
    numbers, structure = np.random.default_rng(rng.randrange(2**32)), random.Random(rng.randrange(structures))
    scale = 10 ** rng.uniform(-2, 1)
    return tree_of(structure, lambda: jnp.asarray(scale * numbers.normal(size=structure.choice(SHAPES)), jnp.float64))


def loss_of(rng, params):
    """A smooth loss of a tree, whose Hessian is dense."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    weights = jax.tree.map(lambda x: jnp.asarray(numbers.normal(size=x.shape)), params)

    def loss_fn(params):
        sums = [jnp.sum(c * jnp.tanh(x)) for c, x in zip(*map(jax.tree.leaves, (weights, params)), strict=True)]
        squares = [jnp.sum((x - c) ** 4) for c, x in zip(*map(jax.tree.leaves, (weights, params)), strict=True)]
        return jnp.sin(sum(sums)) + 0.5 * sum(sums) ** 2 + 0.1 * sum(squares)

    return loss_fn


def mask_of(rng, params):
    """A random choice of leaves, not none."""
    leaves, structure = jax.tree.flatten(params)
    chosen = [rng.random() < 0.6 for _ in leaves]
    chosen[rng.randrange(len(leaves))] = True
    return structure.unflatten(chosen)


def close(found, wanted, rtol=1e-8):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    problems.assert_close(found, wanted, rtol=rtol)


def direction(tx, params, loss_fn):
    grad_fn = jax.grad(loss_fn)
    found, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    return found


def a_perturbed_gradient(rng, params, loss_fn):
    options = {"adaptive": rng.random() < 0.5, "scope": rng.choice(("global", "leaf"))}
    options["suppress"] = rng.choice((0.0, 0.5))
    rho = 10 ** rng.uniform(-3, 0)
    found = direction(hero_jax.sam(rho, **options), params, loss_fn)
    close(found, reference.direction(loss_fn, params, rho, 0.0, mask=None, **options))


def a_penalty(rng, params, loss_fn):
    options = {"adaptive": rng.random() < 0.5, "scope": rng.choice(("global", "leaf"))}
    options["reduction"] = rng.choice(("mean", "sum"))
    options["penalty"] = rng.choice(("detached", "difference", "hvp"))
    mask, rho, gamma = mask_of(rng, params), 10 ** rng.uniform(-3, 0), 10 ** rng.uniform(-2, 2)
    found = direction(hero_jax.hero(rho, gamma, mask=mask, **options), params, loss_fn)
    close(found, reference.direction(loss_fn, params, rho, gamma, mask=mask, **options), 1e-7)


def an_absolute_gradient(rng, params, loss_fn):
    mask, gamma = mask_of(rng, params), 10 ** rng.uniform(-2, 2)
    found = direction(hero_jax.grad_l1(gamma, mask=mask), params, loss_fn)
    close(found, reference.grad_l1_direction(loss_fn, params, gamma, mask=mask))


def momentum(rng, params, loss_fn):
    """Three steps of SGD whose gradients are taken at a distance along the momentum of those before."""
    rho, decay, rate = 10 ** rng.uniform(-3, -1), rng.choice((0.0, 0.5, 0.9)), 0.01
    tx = hero_jax.msam(optax.sgd(rate), rho, decay=decay)
    loop, state = params, tx.init(params)
    weights, moved, shift = params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss_fn)(loop), state, loop)
        loop = optax.apply_updates(loop, updates)
        grads = jax.grad(loss_fn)(reference.add(weights, shift))
        weights = reference.subtract(weights, reference.scale(rate, grads))
        moved = reference.add(reference.scale(decay, moved), grads)
        shift = reference.scale(rho / (reference.norm(moved) + 1e-12), moved)
        close(hero_jax.msam_eval_params(state, loop), weights)
        close(loop, reference.add(weights, shift))


def noise(rng, params, loss_fn):
    """Of a quadratic loss the mean of both signs is the gradient, whatever the noise."""
    del loss_fn
    numbers = np.random.default_rng(rng.randrange(2**32))
    factors = jax.tree.map(lambda x: jnp.asarray(numbers.normal(size=x.shape)), params)

    def quadratic(params):
        return 0.5 * sum(jnp.sum(c * x**2) for c, x in zip(*map(jax.tree.leaves, (factors, params)), strict=True))

    tx = hero_jax.nso(10 ** rng.uniform(-3, 0), seed=rng.randrange(1000))
    close(direction(tx, params, quadratic), jax.grad(quadratic)(params))


def a_product(rng, params, loss_fn):
    vector = problems.random_like(jax.random.key(rng.randrange(1000)), params)
    flat, unravel = ravel_pytree(vector)
    wanted = unravel(reference.dense_hessian(loss_fn, params) @ flat)
    close(curvature.hvp(loss_fn, params, vector), wanted)
    close(curvature.grad_difference(jax.grad(loss_fn), params, vector), wanted, 1e-3)
    mask = mask_of(rng, params)
    operator = curvature.hessian_operator(lambda params, _: loss_fn(params), params, BATCH, mask=mask)
    wanted = curvature.restrict(unravel(reference.restricted_hessian(loss_fn, params, mask) @ flat), mask)
    close(operator(curvature.restrict(vector, mask)), wanted)


def eigenvalues(rng, params, loss_fn):
    params = params_of(rng, 2)  # solvers take long to compile
    loss_fn = loss_of(rng, params)
    dense = reference.dense_hessian(loss_fn, params)
    exact = np.linalg.eigvalsh(dense)
    # On the host: for a loop on the device each loss is compiled.
    operator = curvature.HostOperator(lambda vector: curvature.hvp(loss_fn, params, vector), params)
    k = min(2, len(exact))
    found = spectrum.top_eigenpairs(operator, jax.random.key(rng.randrange(1000)), k=k, rtol=1e-9)
    wanted = exact[np.argsort(-np.abs(exact))[:k]]
    np.testing.assert_allclose(np.abs(found.eigenvalues), np.abs(wanted), rtol=1e-7)
    assert all(found.converged)
    moments = spectrum.moments(operator, jax.random.key(0), num_probes=30)
    # Six standard errors.
    error = abs(float(moments.trace.mean) - np.trace(dense))
    assert error <= 6 * float(moments.trace.sem) + 1e-6 * np.linalg.norm(dense)


def a_quantizer(rng, params, loss_fn):
    del loss_fn
    spec, bits = rng.choice(PAIRS), rng.choice((2, 3, 4, 8))
    numbers = np.random.default_rng(rng.randrange(2**32))
    params = {"kernel": jnp.asarray(numbers.normal(size=(2, 3))), "rest": params}  # one kernel at least
    found = quantize.dequantize(quantize.quantize(params, bits, spec))

    def wanted(x):
        return rounded(np.asarray(x), bits, spec) if x.ndim >= 2 else x

    close(found, jax.tree.map(wanted, params), 1e-6)
    close(quantize.fake_quantize(params, bits, spec), found)


CALLS = (a_perturbed_gradient, a_penalty, an_absolute_gradient, momentum, noise, a_product, eigenvalues, a_quantizer)


def test_random_calls(x64, attacks, attack_seed):
    """A third as many as there are attacks: 33 in CI."""
    made, calls = collections.Counter(), attacks // 3
    for i in range(calls):
        rng = random.Random(f"{attack_seed} {i}")
        call, params = rng.choice(CALLS), params_of(rng)
        try:
            call(rng, params, loss_of(rng, params))
        except Exception as error:
            shapes = jax.tree.map(jnp.shape, params)
            pytest.fail(f"call {i} of seed {attack_seed}, {call.__name__} of {shapes}: {error!r}"[:2000])
        made[call.__name__] += 1
    print(f"{calls} random calls: {dict(made)}")
    assert len(made) == len(CALLS)

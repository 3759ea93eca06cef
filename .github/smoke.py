"""Tries an installed hero_jax with nothing else but jax and optax: trains, measures and quantizes, in seconds."""

import jax
import jax.numpy as jnp
import optax

import hero_jax
from hero_jax import operators, quantize, spectrum


def train() -> None:
    """Twenty steps of HERO on a regression lower its loss."""
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = jnp.sin(x @ jnp.array([[1.0], [-2.0], [0.5], [1.5]]))
    params = {
        "hidden": 0.5 * jax.random.normal(jax.random.key(1), (4, 8)),
        "head": 0.5 * jax.random.normal(jax.random.key(2), (8, 1)),
    }

    def loss_fn(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["head"] - y) ** 2)

    tx = optax.chain(hero_jax.hero(0.1, 0.1), optax.sgd(0.1))
    grad_fn = jax.grad(loss_fn)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    before, state = loss_fn(params), tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    after = loss_fn(params)
    assert after < 0.7 * before, (before, after)
    print(f"loss {before:.3f} before, {after:.3f} after 20 steps of HERO")


def measure() -> None:
    """The top eigenvalue of a diagonal matrix is its largest entry."""
    diagonal = jnp.array([3.0, 7.5, -1.0, 0.25, 2.0])
    operator = operators.Operator(lambda v: diagonal * v, jnp.zeros(5))
    found = spectrum.top_eigenpairs(operator, jax.random.key(0), k=1)
    assert bool(found.converged.all()), found
    assert abs(found.eigenvalues[0] - 7.5) < 1e-3, found
    print(f"top eigenvalue {found.eigenvalues[0]:.4f} of 7.5")


def round_weights() -> None:
    """Eight bits are off by at most half a step of the grid, and the tree keeps its form."""
    params = {"kernel": jax.random.normal(jax.random.key(3), (6, 4)), "bias": jnp.ones(4)}
    rounded = quantize.fake_quantize(params, 8, quantize.named("channel-narrow"))
    assert jax.tree.structure(rounded) == jax.tree.structure(params)
    step = jnp.abs(params["kernel"]).max(0) / 127
    error = jnp.abs(rounded["kernel"] - params["kernel"])
    assert bool((error <= 0.501 * step).all())
    assert bool((error > 0).any())
    assert bool((rounded["bias"] == params["bias"]).all())
    print(f"largest error of 8 bits {error.max():.4f}")


if __name__ == "__main__":
    where = hero_jax.__path__[0]
    print(f"hero_jax {hero_jax.__version__} in {where}, jax {jax.__version__}, optax {optax.__version__}")
    train()
    measure()
    round_weights()

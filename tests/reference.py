"""Independent, deliberately plain reference of the penalties and directions: an oracle for the tests.

It imports nothing of the package under test. Every direction is reverse-mode autodiff of the scalar objective as it
is stated in the docstring, with `jax.lax.stop_gradient` where the statement says "held constant". Speed is no aim.

Notation: L(w) is the scalar loss `loss_fn(params)`, w the tree of parameters, i runs over its leaves, n_i is the size
of leaf i, R the leaves that `mask` (a tree of Python bools with the structure of params) marks True, P the restriction
to R, H the Hessian of L, and

    g = grad L(w),    e = perturbation,    w* = w + e,    g* = grad L(w*),    d = g* - g.

reduce_i is the mean (reduction="mean") or the sum (reduction="sum") over the entries of leaf i.
The caller enables float64.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

PENALTIES = ("detached", "difference", "hvp", "eigenvalue")


def add(a, b):
    """a + b, leaf by leaf."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def subtract(a, b):
    """a - b, leaf by leaf."""
    return jax.tree.map(lambda x, y: x - y, a, b)


def scale(c, a):
    """c * a, leaf by leaf."""
    return jax.tree.map(lambda x: c * x, a)


def dot(a, b):
    """<a, b> = sum_i sum(a_i * b_i)."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def norm(a):
    """||a|| = sqrt(<a, a>), over the whole tree."""
    return jnp.sqrt(dot(a, a))


def restrict(a, mask):
    """P a: a_i for i in R, 0 elsewhere."""
    return jax.tree.map(lambda x, keep: x if keep else jnp.zeros_like(x), a, mask)


def hessian_vector(loss_fn, params, vector):
    """H(w) u = grad_w <grad L(w), u>, u constant (reverse over reverse)."""
    vector = jax.lax.stop_gradient(vector)
    return jax.grad(lambda p: dot(jax.grad(loss_fn)(p), vector))(params)


def perturbation(params, grads, rho, *, adaptive: bool, scope: str = "global", eps: float = 1e-12):
    """e = rho * g / (||g|| + eps), or with adaptive e = rho * w^2 g / (|| |w| g || + eps), elementwise.

    scope="global" takes the norm over the whole tree, scope="leaf" over each leaf alone. All leaves are perturbed.
    """
    if adaptive:
        numerator = jax.tree.map(lambda w, g: w**2 * g, params, grads)
        normed = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, grads)
    else:
        numerator = grads
        normed = grads
    if scope == "global":
        whole = norm(normed)
        return jax.tree.map(lambda x: rho * x / (whole + eps), numerator)
    if scope == "leaf":
        return jax.tree.map(lambda x, y: rho * x / (jnp.sqrt(jnp.sum(y**2)) + eps), numerator, normed)
    raise ValueError(f"unknown scope: {scope!r}")


def suppressed(grads, perturbed_grads, share, compared=None):
    """g*_i (1 - share) where 0 < c_i / g_i < 1, g*_i elsewhere; c is `compared`, or g* where there is none."""
    compared = perturbed_grads if compared is None else compared

    def leaf(g, g_star, c):
        quotient = c / g
        return jnp.where((quotient > 0) & (quotient < 1), (1 - share) * g_star, g_star)

    return jax.tree.map(leaf, grads, perturbed_grads, compared)


def reduced_squares(tree, reduction: str, mask):
    """sum_{i in R} reduce_i(x_i^2)."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction: {reduction!r}")
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    terms = jax.tree.map(lambda x, keep: reduce(x**2) if keep else jnp.zeros(()), tree, mask)
    return sum(jax.tree.leaves(terms), start=jnp.zeros(()))


def penalty_value(loss_fn, params, e, *, penalty: str, reduction: str, mask, eigenvector=None):
    """G(w), a scalar to be differentiated in params; e and v (eigenvector) are held constant.

    "detached":    G(w) = sum_{i in R} reduce_i((grad L(w + e) - stop_gradient(grad L(w)))^2)
    "difference":  G(w) = sum_{i in R} reduce_i((grad L(w + e) - grad L(w))^2)
    "hvp":         G(w) = sum_{i in R} reduce_i((H(w) e)^2)
    "eigenvalue":  G(w) = |v^T H(w + e) v|, v a unit tree that is zero outside R (the reduction has no part in it)
    """
    e = jax.lax.stop_gradient(e)
    grad_fn = jax.grad(loss_fn)
    if penalty == "detached":
        constant = jax.lax.stop_gradient(grad_fn(params))
        return reduced_squares(subtract(grad_fn(add(params, e)), constant), reduction, mask)
    if penalty == "difference":
        return reduced_squares(subtract(grad_fn(add(params, e)), grad_fn(params)), reduction, mask)
    if penalty == "hvp":
        return reduced_squares(hessian_vector(loss_fn, params, e), reduction, mask)
    if penalty == "eigenvalue":
        if eigenvector is None:
            raise ValueError("penalty='eigenvalue' needs an eigenvector")
        v = jax.lax.stop_gradient(eigenvector)
        return jnp.abs(dot(v, hessian_vector(loss_fn, add(params, e), v)))
    raise ValueError(f"unknown penalty: {penalty!r}, expected one of {PENALTIES}")


def direction(
    loss_fn,
    params,
    rho,
    gamma,
    *,
    adaptive: bool,
    scope: str = "global",
    penalty: str = "detached",
    reduction: str = "mean",
    mask,
    eigenvector=None,
    suppress=0.0,
    part_loss_fn=None,
    ascent=None,
    eps: float = 1e-12,
):
    """g* + gamma * grad_w G(w), with e computed once at w and then held constant; g* alone where gamma = 0.

    suppress: g* is `suppressed` by this share before the penalty is added.
    part_loss_fn: g, e, d and G are of this loss instead, and g* is suppressed where the gradient of it is; g* is of L.
    ascent: e is that of this tree instead of g.
    """
    part_loss_fn = loss_fn if part_loss_fn is None else part_loss_fn
    g = jax.grad(part_loss_fn)(params)
    e = perturbation(params, g if ascent is None else ascent, rho, adaptive=adaptive, scope=scope, eps=eps)
    e = jax.lax.stop_gradient(e)
    g_star = jax.grad(loss_fn)(add(params, e))
    g_star = suppressed(g, g_star, suppress, jax.grad(part_loss_fn)(add(params, e)))
    if gamma == 0:
        return g_star

    def objective(p):
        return penalty_value(
            part_loss_fn, p, e, penalty=penalty, reduction=reduction, mask=mask, eigenvector=eigenvector
        )

    return add(g_star, scale(gamma, jax.grad(objective)(params)))


def next_eigenvector(loss_fn, params, e, eigenvector, mask):
    """s * P H(w*) v / ||P H(w*) v||, s = sign(v^T H(w*) v), w* = w + e.

    The bare formula: undefined (NaN) where P H(w*) v = 0, and zero where v^T H(w*) v = 0.
    """
    h_v = hessian_vector(loss_fn, add(params, e), eigenvector)
    s = jnp.sign(dot(eigenvector, h_v))
    p_h_v = restrict(h_v, mask)
    length = norm(p_h_v)
    return jax.tree.map(lambda x: s * x / length, p_h_v)


def grad_l1_direction(loss_fn, params, gamma, *, mask):
    """g + gamma * grad_w G(w), G(w) = sum_{i in R} ||grad_i L(w)||_1; nothing is perturbed."""

    def objective(p):
        terms = jax.tree.map(lambda x, keep: jnp.sum(jnp.abs(x)) if keep else jnp.zeros(()), jax.grad(loss_fn)(p), mask)
        return sum(jax.tree.leaves(terms), start=jnp.zeros(()))

    return add(jax.grad(loss_fn)(params), scale(gamma, jax.grad(objective)(params)))


def dense_hessian(loss_fn, params):
    """H(w) as an (n, n) array, rows and columns in the order of ravel_pytree(params)."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: loss_fn(unravel(x)))(flat)


def restricted_hessian(loss_fn, params, mask):
    """P H(w) P as an (n, n) array, rows and columns in the order of ravel_pytree(params)."""
    kept, _ = ravel_pytree(restrict(jax.tree.map(jnp.ones_like, params), mask))
    return kept[:, None] * dense_hessian(loss_fn, params) * kept[None, :]

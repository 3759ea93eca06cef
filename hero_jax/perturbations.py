"""The weight perturbations of sharpness-aware training: where its gradients are taken, and which parts are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _check, _tree, errors

__all__ = ["SCOPES", "ascent", "noise", "suppressed"]

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]

SCOPES = ("global", "leaf")


def ascent(
    params: PyTree,
    grads: PyTree,
    rho: jax.typing.ArrayLike,
    *,
    adaptive: bool | Mask,
    scope: str = "global",
    mask: Mask | None = None,
    eps: jax.typing.ArrayLike = 1e-12,
) -> PyTree:
    """Computes the perturbation of length `rho` that raises the loss most, to first order.

        e = rho s^2 g / (|| s g || + eps)     ||e / s|| = rho;   e = 0 outside `mask`, the norm over the leaves in it

        s = 1                                 adaptive=False     (SAM)
        s = |w|, element-wise                 adaptive=True      (ASAM)
        s = |w| on some leaves, 1 on others   adaptive=mask      (the ASAM authors' code, which leaves biases unscaled)

    Args:
      params: pytree of arrays, w.
      grads: pytree with the structure of `params`, g.
      rho: radius of the ball, in the units of the weights (SAM) or relative to each weight (ASAM); may be traced.
      adaptive: True, False, or a bool tree (a prefix of one, or a callable from params to one) naming the leaves that
        are scaled. A weight of 0 on a scaled leaf is never perturbed.
      scope: "global" takes the norm over the whole tree, "leaf" over each leaf alone (each leaf then moves by `rho`).
      mask: the leaves to perturb, likewise; default all. SAM-ON perturbs normalisation layers alone.
      eps: guards the division. A zero gradient (of the tree or leaf) gives e = 0, whatever `eps`.

    Returns:
      e with the structure of `params`, in float32 or wider.

    Raises:
      ArgumentError: an unknown `scope`, a mask that does not match `params` or selects nothing.

    Cost: no gradient evaluation.

    >>> import jax.numpy as jnp
    >>> ascent(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), 0.5, adaptive=False)
    Array([0.3, 0.4], dtype=float32)

    Source: Foret et al., Sharpness-aware minimization, ICLR 2021; Kwon et al., ASAM, ICML 2021; Mueller et al.,
    Normalization layers are all that sharpness-aware minimization needs, NeurIPS 2023 (SAM-ON).
    """
    errors.one_of("ascent(scope=...)", scope, SCOPES)
    is_scaled = scaled_leaves("ascent(adaptive=...)", adaptive, params)
    is_moved = moved_leaves("ascent(mask=...)", mask, params)
    return ascent_on(is_scaled, is_moved, params, grads, rho, scope, eps)


def noise(
    params: PyTree,
    sigma: jax.typing.ArrayLike,
    key: jax.Array,
    *,
    sample: Callable[[PyTree, jax.Array], PyTree] | None = None,
    mask: Mask | None = None,
) -> PyTree:
    """Draws a random perturbation of the weights.

        u = sigma z,   z ~ N(0, 1) for every entry, or z = sample(params, key);   u = 0 outside `mask`

    Args:
      params: pytree of arrays, w.
      sigma: standard deviation of an entry, in the units of the weights, or a factor of what `sample` draws; may be
        traced.
      key: `jax.random.key`.
      sample: `(params, key) -> tree` like `params`, another distribution. Noise within a bin of a quantizer's grid is
        `lambda params, key: quantize.rounding_noise(params, 3, key)`.
      mask: bool tree, prefix of one, or callable from params to one: the leaves to perturb; default all.

    Returns:
      u with the structure of `params`, in float32 or wider.

    Raises:
      ArgumentError: a negative or non-finite `sigma`, a mask that does not match `params` or selects nothing, a sample
        of another structure.
      TypeError: a leaf of `params` is not floating point, `sample` is no function.

    Cost: one random number for each weight.

    >>> import jax, jax.numpy as jnp
    >>> u = noise({"w": jnp.ones((300, 40)), "b": jnp.ones(2)}, 0.1, jax.random.key(0), mask={"w": True, "b": False})
    >>> f"{jnp.std(u['w']):.2f}", u["b"].tolist()
    ('0.10', [0.0, 0.0])

    Source: Zhang, Li, Kakade and Zhang, Noise stability optimization, 2023 (arXiv 2306.08553).
    """
    _check.floating_tree("params", params)
    errors.non_negative("noise(sigma=...)", sigma)
    _check.optional_function("noise(sample=...)", sample)
    drawn = _tree.random_normal(key, params) if sample is None else sample(params, key)
    _check.matching_tree("sample(params, key)", drawn, params)
    is_moved = moved_leaves("noise(mask=...)", mask, params)
    return jax.tree.map(lambda z, keep: _tree.scale(sigma if keep else 0.0, z), drawn, is_moved)


def suppressed(
    grads: PyTree, perturbed_grads: PyTree, share: jax.typing.ArrayLike, compared: PyTree | None = None
) -> PyTree:
    """Weakens the components of a perturbed gradient that fit noisy labels.

        g*_i (1 - share)   where 0 < c_i / g_i < 1,   g*_i elsewhere

    They are those that point the way of the clean gradient and are smaller: SGD takes them larger, and on networks
    trained with wrong labels they are what learns these.

    Args:
      grads: pytree of arrays, g, the gradient at the weights.
      perturbed_grads: pytree like it, g*, that at the perturbed weights.
      share: how much is taken away, in [0, 1]; may be traced. 0 leaves g*, 1 removes the components.
      compared: pytree like it, c, the gradient at the perturbed weights of the examples that g is of; default g*.

    Returns:
      The tree, in float32 or wider.

    Raises:
      ArgumentError: `share` outside [0, 1]; trees that do not match.

    Cost: element-wise.

    >>> import jax.numpy as jnp
    >>> suppressed(jnp.array([2.0, 2.0, 2.0, 0.0]), jnp.array([1.0, 3.0, -1.0, 1.0]), 0.5)
    Array([ 0.5,  3. , -1. ,  1. ], dtype=float32)

    Source: Luong et al., Understanding SAM's robustness to noisy labels through gradient down-weighting, AISTATS 2026
    (arXiv 2411.17132), where it is called SANER.
    """

    compared = perturbed_grads if compared is None else compared
    errors.fraction("suppressed(share=...)", share)
    for name, tree in (("perturbed_grads", perturbed_grads), ("compared", compared)):
        _check.matching_tree(name, tree, grads, "grads")

    def leaf(g: jax.Array, perturbed: jax.Array, c: jax.Array) -> jax.Array:
        # Signs rather than the quotient, which under- and overflows.
        g, perturbed, c = _tree.wide(g), _tree.wide(perturbed), _tree.wide(c)
        is_smaller = (jnp.sign(g) == jnp.sign(c)) & (jnp.abs(c) < jnp.abs(g))
        return jnp.where(is_smaller, 1 - _tree.scale_like(share, perturbed), 1) * perturbed

    return jax.tree.map(leaf, grads, perturbed_grads, compared)


def ascent_on(
    is_scaled: PyTree,
    is_moved: PyTree,
    params: PyTree,
    grads: PyTree,
    rho: jax.typing.ArrayLike,
    scope: str,
    eps: jax.typing.ArrayLike,
) -> PyTree:
    """`ascent` with a bool for every leaf."""

    def numerator(w: jax.Array, g: jax.Array, scaled: bool) -> jax.Array:
        return _tree.wide(w) ** 2 * _tree.wide(g) if scaled else g

    def measured(w: jax.Array, g: jax.Array, scaled: bool) -> jax.Array:
        return jnp.abs(_tree.wide(w)) * _tree.wide(g) if scaled else g

    def factor(length: jax.Array) -> jax.Array:
        # The guard holds even where eps rounds to 0, as an injected float16 hyper-parameter does.
        guarded = jnp.where(length > 0, length + _tree.scale_like(eps, length), 1)
        return _tree.scale_like(rho, length) * jnp.where(length > 0, 1 / guarded, 0)

    directions = jax.tree.map(numerator, params, grads, is_scaled)
    lengths = jax.tree.map(measured, params, grads, is_scaled)
    if scope == "global":
        moved = jax.tree.map(lambda m, keep: m if keep else None, lengths, is_moved)
        factors = jax.tree.map(lambda _, f=factor(_tree.norm(moved)): f, params)
    else:
        factors = jax.tree.map(lambda m: factor(_tree.norm(m)), lengths)
    # Times 0 rather than zeros, which would lose the device axis that the gradient varies over.
    return jax.tree.map(lambda f, d, keep: _tree.scale(f if keep else 0.0, d), factors, directions, is_moved)


def scaled_leaves(argument: str, adaptive: bool | Mask, params: PyTree) -> PyTree:
    """A tree of bools: which leaves are scaled, one of True and False for all or a mask."""
    if isinstance(adaptive, bool | np.bool_):
        return jax.tree.map(lambda _: bool(adaptive), params)
    return _check.bool_tree(argument, adaptive, params)


def moved_leaves(argument: str, mask: Mask | None, params: PyTree) -> PyTree:
    """A tree of bools: which leaves are perturbed, all or those of a mask, which must name one at least."""
    return _check.bool_tree(argument, True if mask is None else mask, params)

"""The weight perturbations of sharpness-aware training: where the second gradient of a step is taken."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree

PyTree = Any

SCOPES = ("global", "leaf")


def perturbation(
    params: PyTree,
    grads: PyTree,
    rho: jax.typing.ArrayLike,
    *,
    adaptive: bool,
    scope: str = "global",
    eps: jax.typing.ArrayLike = 1e-12,
) -> PyTree:
    """Computes the perturbation of length `rho` that raises the loss most, to first order.

        adaptive=False   e = rho g / (||g|| + eps)               ||e|| = rho           (SAM)
        adaptive=True    e = rho w^2 g / (|| |w| g || + eps)     ||e / |w||| = rho     (ASAM; element-wise squares)

    Args:
      params: pytree of arrays, w.
      grads: pytree with the structure of `params`, g.
      rho: radius of the ball, in the units of the weights (SAM) or relative to each weight (ASAM); may be traced.
      adaptive: which of the two.
      scope: "global" takes the norm over the whole tree, "leaf" over each leaf alone (each leaf then moves by `rho`).
      eps: guards the division. A zero gradient (of the tree or leaf) gives e = 0, whatever `eps`.

    Returns:
      e with the structure of `params`, in float32 or wider.

    Cost: no gradient evaluation.

    >>> import jax.numpy as jnp
    >>> perturbation(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), 0.5, adaptive=False)
    Array([0.3, 0.4], dtype=float32)

    Source: Foret et al., Sharpness-aware minimization, ICLR 2021; Kwon et al., ASAM, ICML 2021.
    """
    _check.one_of("perturbation(scope=...)", scope, SCOPES)
    ascent = jax.tree.map(lambda w, g: _tree.wide(w) ** 2 * _tree.wide(g), params, grads) if adaptive else grads
    measured = jax.tree.map(lambda w, g: jnp.abs(_tree.wide(w)) * _tree.wide(g), params, grads) if adaptive else grads

    def rescale(direction: PyTree, length: jax.Array) -> PyTree:
        # The guard holds even where eps rounds to 0, as an injected float16 hyper-parameter does.
        guarded = jnp.where(length > 0, length + _tree.scale_like(eps, length), 1)
        return _tree.scale(_tree.scale_like(rho, length) * jnp.where(length > 0, 1 / guarded, 0), direction)

    if scope == "global":
        return rescale(ascent, _tree.norm(measured))
    return jax.tree.map(lambda a, m: rescale(a, _tree.norm(m)), ascent, measured)

"""Per-device gradients and their mean over devices, under vmap, pmap and shard_map.

A data-parallel step has replicated parameters and a gradient on every device; the gradient of the global mean loss is
the mean of the local ones. Two facts make this easy to get wrong in `jax.shard_map` with its default `check_vma=True`:
`jax.grad` with respect to a replicated parameter is already summed over devices, and so is every product taken of it.
`vary` marks parameters as per-device before they are differentiated, which makes the gradient local in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["AxisName", "local_grad_fn", "mean", "tracks_varying", "varies", "vary"]

PyTree = Any
AxisName = str | tuple[str, ...]


def vary(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Marks the leaves of `tree` as varying over `axis_name`, so that gradients with respect to them stay local.

    The values do not change. Under `vmap`, `pmap` and `shard_map(check_vma=False)`, where nothing is tracked, and for
    leaves that vary already, it is the identity.

    Args:
      tree: pytree of arrays, inside a function mapped over `axis_name`.
      axis_name: the mapped axis, or a tuple of several.

    Returns:
      The same tree.

    Cost: none.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    >>> grad_fn = jax.grad(lambda w, x: jnp.mean(w * x))
    >>> def local_grad(w, x):
    ...     return grad_fn(vary(w, "data"), x)[None]
    >>> spec = jax.sharding.PartitionSpec
    >>> per_device = jax.shard_map(local_grad, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    >>> per_device(jnp.float32(2), jnp.arange(4.0))
    Array([1.5], dtype=float32)
    """
    for name in _names(axis_name):
        # pcast exists only inside shard_map (jax 0.12 raises elsewhere), and refuses what varies already.
        if name in jax.sharding.get_abstract_mesh().manual_axes:
            tree = jax.tree.map(
                lambda x, name=name: x if varies(x, name) else jax.lax.pcast(x, name, to="varying"), tree
            )
    return tree


def varies(x: Any, axis_name: AxisName) -> bool:
    """Says whether `x` is tracked by `shard_map` as varying over every axis in `axis_name`.

    Args:
      x: an array, inside a function mapped over `axis_name`.
      axis_name: the mapped axis, or a tuple of several.

    Returns:
      True or False; False wherever nothing is tracked, under `vmap` and `pmap`, say.
    """
    return set(_names(axis_name)) <= set(jax.typeof(x).manual_axis_type.varying)


def tracks_varying(axis_name: AxisName) -> bool:
    """Says whether values are tracked as varying or not here, that is inside `shard_map` with `check_vma=True`.

    Args:
      axis_name: the mapped axis, or a tuple of several.

    Returns:
      True or False.
    """
    return varies(vary(jnp.zeros(()), axis_name), axis_name)


def local_grad_fn(grad_fn: Callable[[PyTree], PyTree], axis_name: AxisName | None) -> Callable[[PyTree], PyTree]:
    """Makes the gradient function of this device alone, whether or not its parameters are marked as varying.

    Args:
      grad_fn: `params -> gradient` of a loss that is not averaged over devices.
      axis_name: the mapped axis, or a tuple of several; None outside of one, where `grad_fn` is returned.

    Returns:
      `params -> gradient` of the local examples, also in `shard_map(check_vma=True)`, where `grad_fn` of replicated
      parameters is summed over devices.

    Cost: that of `grad_fn`.
    """
    if axis_name is None:
        return grad_fn
    return lambda params: grad_fn(vary(params, axis_name))


def mean(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """Averages a tree over devices.

    Args:
      tree: pytree of arrays, inside a function mapped over `axis_name`.
      axis_name: the mapped axis, or a tuple of several; None outside of one.

    Returns:
      The mean over the devices of the axis, the same on each; the tree itself where `axis_name` is None.

    Cost: one all-reduce.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(lambda x: mean(x, "data"), axis_name="data")(jnp.array([1.0, 4.0]))
    Array([2.5, 2.5], dtype=float32)
    """
    if axis_name is None:
        return tree
    return jax.lax.pmean(vary(tree, axis_name), axis_name)


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

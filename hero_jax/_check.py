"""Rules of arguments: those of `hero_jax.errors`, and those of trees, masks, axes and states.

Python and NumPy values (and concrete JAX scalars) are checked when a function is called; of traced ones, the shape and
type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax.errors import ArgumentError, boolean, brief, non_negative

PyTree = Any


def schedule(argument: str, value: Any, rule: Callable[[str, Any], None] | None = None) -> None:
    """Raises unless `value` is a function of a step count, or else what `rule` asks for; default `non_negative`."""
    if not callable(value):
        (rule or non_negative)(argument, value)


def bools(argument: str, value: Any) -> None:
    """Raises unless `value` is a Python bool, a tree of them, or a function (which makes one)."""
    if not _is_function(value):
        _hold_bools(argument, value, is_leaf=lambda x: x is None)


def function(argument: str, value: Any) -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"`{argument}` must be a function; got {brief(value)}.")


def optional_function(argument: str, value: Any) -> None:
    """Raises unless `value` is None or can be called."""
    if value is not None:
        function(argument, value)


def local(name: str, sync: Any, axis: Any) -> None:
    """Raises unless `sync` and the axis of a transformation are possible: False needs an axis."""
    boolean(f"{name}(sync=...)", sync)
    axis_name(f"{name}(axis_name=...)", axis)
    if not sync and axis is None:
        raise ArgumentError(f"`{name}(sync=False)` needs `axis_name`: without one there is no device to be local to.")


def state(name: str, value: Any, kind: type) -> None:
    """Raises unless `value` is the state of a transformation."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` needs the `{kind.__name__}` that `init` or the last update gave; got a"
            f" {type(value).__name__}. Restore a saved state into the structure of `tx.init(params)`."
        )


def axis_name(argument: str, value: Any) -> None:
    """Raises unless `value` is None, the name of a mapped axis, or a tuple of names."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not (names and all(isinstance(name, str) and name for name in names)):
        raise TypeError(f"`{argument}` must be the name of a mapped axis or a tuple of names; got {brief(value)}.")


def matching_tree(argument: str, tree: PyTree, params: PyTree, than: str = "params") -> None:
    """Raises unless `tree` has the structure and the shapes of `params`, which the message calls `than`.

    Names the first path that differs.
    """
    if type(tree) is tuple and type(params) is not tuple:
        raise ArgumentError(
            f"`{argument}` must have the structure of `{than}`; it is a tuple of {len(tree)}: drop the value or the"
            " auxiliary output."
        )
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    wanted, params_structure = jax.tree_util.tree_flatten_with_path(params)
    for (path, leaf), (params_path, params_leaf) in zip(found, wanted, strict=False):
        if path != params_path:
            has = f"has {_path(than, path)}" if path else "is one array"
            raise ArgumentError(
                f"`{argument}` must have the structure of `{than}`; it {has} where `{than}` has"
                f" {_path(than, params_path)}."
            )
        if jnp.shape(leaf) != jnp.shape(params_leaf):
            raise ArgumentError(
                f"`{argument}` must have the shapes of `{than}`; at {_path(than, path)} it is {jnp.shape(leaf)} and"
                f" `{than}` is {jnp.shape(params_leaf)}."
            )
    if len(found) != len(wanted):
        longer, name = (found, argument) if len(found) > len(wanted) else (wanted, than)
        path = longer[min(len(found), len(wanted))][0]
        raise ArgumentError(f"`{argument}` must have the structure of `{than}`; only `{name}` has {_path(than, path)}.")
    if structure != params_structure:
        place, kind, params_kind = _different_nodes(tree, params, than)
        raise ArgumentError(
            f"`{argument}` must have the structure of `{than}`; {place} is a {kind} where that of `{than}` is a"
            f" {params_kind}."
        )


def _different_nodes(tree: PyTree, params: PyTree, place: str) -> tuple[str, str, str]:
    """Where two trees with the same leaf paths have containers of different types, and the names of these types."""
    if type(tree) is type(params):
        (children, _), (params_children, _) = (
            jax.tree_util.default_registry.flatten_one_level(x) for x in (tree, params)
        )
        for i, (child, params_child) in enumerate(zip(children, params_children, strict=False)):
            if jax.tree.structure(child) != jax.tree.structure(params_child):
                return _different_nodes(child, params_child, f"node {i} of {place}")
    return place, type(tree).__name__, type(params).__name__


def floating_tree(argument: str, tree: PyTree) -> None:
    """Raises unless `tree` has leaves and every one is a real floating-point array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ArgumentError(f"`{argument}` must have at least one array; got {brief(tree)}.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`{argument}` must have floating-point leaves; at {_path(argument, path)} it has"
                f" {jnp.result_type(leaf)}."
            )


def wide_tree(argument: str, tree: PyTree, reason: str) -> None:
    """Raises where a leaf of `tree`, which has real floating-point leaves, has 16 bits."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.finfo(jnp.result_type(leaf)).bits < 32:
            raise ArgumentError(
                f"`{argument}` must be float32 or wider: {reason}; at {_path(argument, path)} it has"
                f" {jnp.result_type(leaf)}."
            )


def not_empty(argument: str, tree: PyTree) -> None:
    """Raises unless the leaves of `tree` have at least one entry together."""
    if not any(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)):
        raise ArgumentError(f"`{argument}` must have at least one entry; got only empty leaves.")


def no_masked_nodes(argument: str, tree: PyTree) -> None:
    """Raises when `tree` went through `optax.masked` or `optax.partition`, which hide leaves from `grad_fn`."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked):
        if is_masked(node):
            raise ArgumentError(
                f"`{argument}` must be the whole tree, since `grad_fn` needs all of it; at"
                f" {_path('params', path)} it is masked."
                " Give the transformation a `mask` instead of wrapping it in optax.masked or optax.partition. Where"
                " leaves are frozen, leave them out by `perturb_mask` too, or hand over the trained ones alone."
            )


def bool_tree(argument: str, mask: PyTree | Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Returns `mask` (a bool tree, a prefix of one, or a callable giving either) as a tree of Python bools.

    Raises when it does not match `params`, holds anything but bools, or selects no leaf.
    """
    if _is_function(mask):
        mask = mask(params)
    _hold_bools(argument, mask)
    try:
        full = jax.tree.broadcast(mask, params)
    except ValueError:
        # Not a prefix: broadcast the shapes away and name the first path that differs.
        matching_tree(argument, mask, jax.tree.map(lambda _: True, params))
        raise
    if not any(jax.tree.leaves(full)):
        raise ArgumentError(
            f"`{argument}` must select at least one leaf; got none of {len(jax.tree.leaves(full))} leaves."
        )
    return jax.tree.map(bool, full)


def _hold_bools(argument: str, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(f"`{argument}` must hold Python bools; at {_path('params', path)} it has {brief(leaf)}.")


def _is_function(value: Any) -> bool:
    """Whether a mask is a function. A module that is a pytree of bools may be callable too (Equinox)."""
    leaves = jax.tree.leaves(value)
    return callable(value) and len(leaves) == 1 and leaves[0] is value


def _path(root: str, path: tuple[Any, ...]) -> str:
    return f"{root}{jax.tree_util.keystr(path)}"

"""Which leaves are quantized, and to how many bits: a plan has a bit width for every leaf, or None."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree, errors
from hero_jax._jax import Tracer
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _grid
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS, QuantSpec

PyTree = Any


def plan_of(name: str, params: PyTree, bits: PyTree, spec: QuantSpec, mask: Any) -> list[Any]:
    """The bit width of every leaf, None where it passes through; raises what `fake_quantize` raises."""
    chosen = jax.tree.leaves(select(name, params, spec, mask))
    widths = bits_of_leaves(name, params, bits, spec)
    stacks = stacked_leaves(params, spec)
    each = zip(paths_of(params), jax.tree.leaves(params), widths, chosen, stacks, strict=True)
    for path, w, width, c, is_stacked in each:
        if c:
            errors.integer(f"{name}(bits=...)[{path!r}]", width, low=MIN_BITS, high=MAX_BITS)
            _grid.check_groups(path, jnp.shape(w), spec, is_stacked)
            if jnp.finfo(jnp.result_type(w)).bits < 16:
                raise TypeError(f"`params` must have 16 bits or more where quantized; {path!r} is {w.dtype}.")
    return [width if c else None for width, c in zip(widths, chosen, strict=True)]


def select(name: str, params: PyTree, spec: QuantSpec, mask: PyTree | Callable[[PyTree], PyTree] | None) -> PyTree:
    """Which leaves are quantized, as a tree of bools: by `mask`, or the patterns of `spec`, or their number of axes.

    Raises ArgumentError where nothing is selected, a pattern matches nothing, or an override no selected leaf.
    """
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"`{name}(spec=...)` must be a QuantSpec; got {errors.brief(spec)}.")
    _check.floating_tree("params", params)
    paths = paths_of(params)
    stacks = stacked_leaves(params, spec)
    if mask is not None and spec.leaves:
        raise ArgumentError(f"`{name}(mask=...)` and `QuantSpec(leaves=...)` both name leaves; give one of them.")
    if spec.leaves:
        chosen = _matches("leaves", spec.leaves, paths)
    else:
        if mask is None:
            leaves, structure = jax.tree.flatten(params)
            mask = structure.unflatten([jnp.ndim(x) - s >= 2 for x, s in zip(leaves, stacks, strict=True)])
        chosen = jax.tree.leaves(_check.bool_tree(f"{name}(mask=...)", mask, params))
    for pattern, _ in spec.overrides:
        if not any(fnmatch.fnmatchcase(path, pattern) for path, c in zip(paths, chosen, strict=True) if c):
            raise ArgumentError(_no_match("overrides", pattern, "selected ", paths))
    chosen = [c and _override(path, spec, 0) is not None for path, c in zip(paths, chosen, strict=True)]
    if not any(chosen):
        raise ArgumentError(f"`QuantSpec(overrides=...)` leaves nothing to quantize of {len(paths)} leaves.")
    return jax.tree.unflatten(jax.tree.structure(params), chosen)


def bits_of_leaves(name: str, params: PyTree, bits: PyTree, spec: QuantSpec) -> list[Any]:
    """The bit width of every leaf, overrides of `spec` included; in a tree unchecked, since some are not used.

    `bits` is one integer, traced or not, or a tree of them: that of `params` or a prefix of it.
    """
    if jax.tree.leaves(bits) and jax.tree.structure(bits) == jax.tree.structure(0):
        errors.integer(f"{name}(bits=...)", bits, low=MIN_BITS, high=MAX_BITS)
        widths = [bits] * len(jax.tree.leaves(params))
    else:
        try:
            tree = jax.tree.broadcast(bits, params)
        except ValueError:
            _check.matching_tree(f"{name}(bits=...)", bits, jax.tree.map(lambda _: 0, params))
            raise
        widths = jax.tree.leaves(tree)
    return [_override(path, spec, width) for path, width in zip(paths_of(params), widths, strict=True)]


def stacked_leaves(params: PyTree, spec: QuantSpec) -> list[bool]:
    """For every leaf, whether its first axis counts layers; raises ArgumentError at a pattern that matches nothing."""
    paths = paths_of(params)
    stacks = _matches("stacked", spec.stacked, paths)
    for path, w, is_stacked in zip(paths, jax.tree.leaves(params), stacks, strict=True):
        if is_stacked and not jnp.ndim(w):
            raise ArgumentError(
                f"`QuantSpec(stacked=...)` must name leaves whose first axis counts layers; {path!r} has no axis."
            )
    return stacks


def paths_of(tree: PyTree) -> list[str]:
    """The paths of the leaves, such as "stage1_block1/conv1/kernel"."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def traced(plan: list[Any]) -> list[Any]:
    """A plan whose bit widths are arrays: as an argument of a compiled function, one program serves all widths."""
    return [None if width is None else jnp.asarray(width, jnp.int32) for width in plan]


def static(name: str, plan: list[Any], twin: str) -> list[int | None]:
    """A plan whose bit widths are Python integers; raises TypeError at a traced one, which `twin` takes."""
    if any(isinstance(width, Tracer) for width in plan):
        raise TypeError(f"`{name}(bits=...)` must be Python integers; got a traced one: `{twin}` takes it.")
    return [None if width is None else int(width) for width in plan]


def map_selected(
    leaf: Callable[[jax.Array, Any, bool], Any], params: PyTree, plan: list[Any], spec: QuantSpec
) -> PyTree:
    """The tree with `leaf(w, entry, is_stacked)` in place of each leaf whose entry of `plan` is not None."""
    leaves, structure = jax.tree.flatten(params)
    each = zip(leaves, plan, stacked_leaves(params, spec), strict=True)
    return structure.unflatten([w if entry is None else leaf(jnp.asarray(w), entry, s) for w, entry, s in each])


def sizes(params: PyTree, plan: list[Any], spec: QuantSpec) -> dict[str, float]:
    """How large a network is on a plan of concrete bit widths: entries and bytes.

    fraction: of all entries, those that are quantized.
    mean_bits: average bit width of these, of the leaves where they have no entry; 0 where there is none.
    ideal_bytes: codes at exactly their bit width, the other leaves as they are: what is usually quoted.
    stored_bytes: that, with scales and zero points and each leaf filled up to bytes: the tensors of `save`'s file.
    """
    entries = code_bits = 0
    ideal = stored = 0.0
    for w, width, is_stacked in zip(jax.tree.leaves(params), plan, stacked_leaves(params, spec), strict=True):
        n = math.prod(jnp.shape(w))
        if width is None:
            nbytes = n * jnp.result_type(w).itemsize
            ideal, stored = ideal + nbytes, stored + nbytes
            continue
        width = int(width)
        scales = math.prod(_grid.scale_shape(jnp.shape(w), spec, is_stacked))
        entries, code_bits = entries + n, code_bits + n * width
        ideal += n * width / 8
        stored += -(-n * width // 8) + scales * (4 + (0 if spec.symmetric else 1 if width <= 8 else 2))
    total = _tree.size(params)
    widths = [int(width) for width in plan if width is not None]
    return {
        "fraction": entries / total if total else 0.0,
        "mean_bits": code_bits / entries if entries else sum(widths) / max(1, len(widths)),
        "ideal_bytes": ideal,
        "stored_bytes": stored,
    }


def _override(path: str, spec: QuantSpec, bits: Any) -> Any:
    for pattern, fixed in spec.overrides:
        if fnmatch.fnmatchcase(path, pattern):
            bits = fixed
    return bits


def _matches(field: str, patterns: tuple[str, ...], paths: list[str]) -> list[bool]:
    """For every path, whether one of the patterns matches it."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ArgumentError(_no_match(field, pattern, "", paths))
    return [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]


def _no_match(field: str, pattern: str, kind: str, paths: list[str]) -> str:
    return (
        f"`QuantSpec({field}=...)` has a pattern that matches no {kind}leaf: {pattern!r}; of {len(paths)},"
        f" the first is {paths[0]!r}."
    )

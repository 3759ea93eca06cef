"""Mixed precision: the bit width of each layer, under a budget, that costs least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _check, errors
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _plan
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS

__all__ = ["Allocation", "allocate_bits", "bits_tree"]

PyTree = Any

# Costs that differ by less than this, relative to what the cheapest allocation costs beyond every layer's least, tie.
TIE = 1e-9
# HiGHS stops at an absolute gap of 1e-6, which SciPy cannot set: 1e-10 of costs in this unit.
COST_UNIT = 1e4


class Allocation(NamedTuple):
    """A bit width for each layer.

    bits: {layer: bits}.
    cost: sum of the predicted costs.
    mean_bits: average bit width of the weights, sum n_l b_l / sum n_l; 0 where there is none.
    num_bytes: sum n_l b_l / 8, the codes without scales and without what is not quantized.
    """

    bits: dict[str, int]
    cost: float
    mean_bits: float
    num_bytes: float


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    *,
    mean_bits: float | None = None,
    num_bytes: float | None = None,
) -> Allocation:
    """Chooses a bit width for each layer, by integer programming.

        minimise sum_l cost_l(b_l)   subject to   sum_l n_l b_l <= mean_bits sum_l n_l   or   8 num_bytes

    exactly, and of the allocations of least cost takes one of the fewest bits. Costs tie where they differ by less
    than 1e-9 of what the cheapest allocation costs beyond sum_l min_b cost_l(b).

    Args:
      costs: {layer: {bits: cost}}, predicted or measured, of any sign and scale. Bit widths in 2..16, the same for
        all layers, except that a layer with a single one is fixed at it.
      sizes: {layer: entries}, n_l, of the same layers.
      mean_bits, num_bytes: the budget; one of the two. Bytes are those of the codes: scales, zero points and leaves
        that are not quantized are not counted.

    Returns:
      `Allocation`.

    Raises:
      ArgumentError: no layer, layers that differ, a cost that is missing, NaN or infinite (named), a budget below what
        the smallest bit widths take.
      TypeError: both budgets or none; a bit width, size or cost of another kind.

    Cost: a few integer programs of (layers x widths) binary variables, by HiGHS on the host: below a second for tens
    of layers.

    >>> costs = {"conv": {2: 0.9, 4: 0.1}, "head": {2: 0.3, 4: 0.2}}
    >>> allocate_bits(costs, {"conv": 100, "head": 100}, mean_bits=3)
    Allocation(bits={'conv': 4, 'head': 2}, cost=0.4, mean_bits=3.0, num_bytes=75.0)

    Source: Yao et al., HAWQ-V3: Dyadic neural network quantization, ICML 2021, section 3.3 (integer linear program).
    """
    _check_costs(costs, sizes)
    least = sum(int(n) * int(min(costs[layer])) for layer, n in sizes.items())
    capacity = _capacity(mean_bits, num_bytes, sum(int(n) for n in sizes.values()), least)
    options = [(layer, int(b), float(costs[layer][b])) for layer in costs for b in costs[layer]]
    spare = np.array([int(sizes[layer]) * (b - int(min(costs[layer]))) for layer, b, _ in options], np.int64)
    excess = np.array([cost - min(map(float, costs[layer].values())) for layer, _, cost in options])
    position = {layer: i for i, layer in enumerate(costs)}
    layers = np.array([position[layer] for layer, _, _ in options])
    picks = _Program(layers, excess, spare, capacity - least).solve()
    chosen = [option for option, is_picked in zip(options, picks, strict=True) if is_picked]
    total = sum(int(sizes[layer]) * b for layer, b, _ in chosen)
    entries = sum(int(n) for n in sizes.values())
    return Allocation(
        bits={layer: b for layer, b, _ in chosen},
        cost=math.fsum(cost for _, _, cost in chosen),
        mean_bits=total / entries if entries else 0.0,
        num_bytes=total / 8,
    )


def bits_tree(params: PyTree, allocation_bits: Mapping[str, int]) -> PyTree:
    """Turns {layer: bits} into a tree of bit widths that `fake_quantize` takes.

    Args:
      params: pytree of floating-point arrays.
      allocation_bits: {path: bits}, such as `Allocation.bits`.

    Returns:
      A tree like `params` of Python integers; leaves without an entry have the bits of their type (32 for float32),
      which `fake_quantize` ignores where it does not quantize them and refuses where it does.

    Raises:
      ArgumentError: a path that `params` has not; a bit width outside 2..16.
      TypeError: a bit width that is not an integer.

    >>> import jax.numpy as jnp
    >>> bits_tree({"a": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"a": 3})
    {'a': 3, 'bias': 32}
    """
    _check.floating_tree("params", params)
    paths = _plan.paths_of(params)
    for path, width in allocation_bits.items():
        errors.one_of("bits_tree(allocation_bits=...)", path, paths)
        errors.integer(f"bits_tree(allocation_bits=...)[{path!r}]", width, low=MIN_BITS, high=MAX_BITS)
    widths = [
        int(allocation_bits[path]) if path in allocation_bits else int(jnp.finfo(jnp.result_type(w)).bits)
        for path, w in zip(paths, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), widths)


def _check_costs(costs: Any, sizes: Any) -> None:
    if not isinstance(costs, Mapping) or not costs or set(costs) != set(sizes):
        differ = sorted(set(costs) ^ set(sizes)) if isinstance(costs, Mapping) else []
        raise ArgumentError(
            "`allocate_bits(costs, sizes)` must name the same layers, one at least;"
            f" got {len(costs)} and {len(sizes)}, {differ[:3]} in one only."
        )
    # A layer with one width is fixed at it, and says nothing of the others.
    widths = set().union(*(row for row in costs.values() if len(row) > 1))
    for layer, row in costs.items():
        errors.integer(f"allocate_bits(sizes=...)[{layer!r}]", sizes[layer], low=0)
        missing = sorted(widths - set(row))
        if not row or (missing and len(row) > 1):
            raise ArgumentError(
                f"`allocate_bits(costs=...)[{layer!r}]` must have every bit width; it has no {missing}."
            )
        for b, cost in row.items():
            errors.integer(f"allocate_bits(costs=...)[{layer!r}]", b, low=MIN_BITS, high=MAX_BITS)
            errors.scalar(f"allocate_bits(costs=...)[{layer!r}][{b}]", cost)
            if not math.isfinite(cost):
                raise ArgumentError(f"`allocate_bits(costs=...)[{layer!r}][{b}]` must be finite; got {float(cost)!r}.")


def _capacity(mean_bits: float | None, num_bytes: float | None, entries: int, least: int) -> int:
    """The budget in bits."""
    if (mean_bits is None) == (num_bytes is None):
        raise TypeError(
            f"`allocate_bits` must have one of mean_bits and num_bytes; got {mean_bits!r} and {num_bytes!r}."
        )
    name, budget, bits = ("num_bytes", num_bytes, 8) if mean_bits is None else ("mean_bits", mean_bits, entries)
    assert budget is not None
    errors.positive(f"allocate_bits({name}=...)", budget)
    # A whole number of bits that went through a division, as `Allocation.mean_bits` did, is that number again.
    capacity = math.floor(min(float(budget) * bits * (1 + 4 * float(np.finfo(float).eps)), 2.0**60))
    if capacity < least:
        raise ArgumentError(
            f"`allocate_bits({name}=...)` must be at least {least / bits!r}, the smallest possible (a mean of"
            f" {least / entries!r} bits); got {float(budget)!r}."
        )
    return capacity


@dataclasses.dataclass(frozen=True)
class _Program:
    """Pick one option of each layer, the sum of `spare` no more than `capacity`: least `excess`, then least `spare`.

    Options are arrays along one axis. excess: cost beyond the layer's least. spare, capacity: integers, 0 for the
    smallest width of a layer.
    """

    layers: np.ndarray
    excess: np.ndarray
    spare: np.ndarray
    capacity: int

    def solve(self) -> np.ndarray:
        """The picks, as bools."""
        allowed = np.ones(len(self.layers), bool)
        # An option that alone costs more than some allocation is in no better one. Without it costs have a smaller
        # unit, in which the tolerances of the solver are smaller.
        while unit := self.excess[allowed].max():
            picks = self._least(self.excess / unit * COST_UNIT, allowed)
            limit = math.fsum(self.excess[picks]) * (1 + TIE)
            allowed = self.excess <= limit
            if self.excess[allowed].max() > unit / 10:
                return self._least(self.spare, allowed, self.excess / limit * COST_UNIT)
        return self._least(self.spare, allowed)

    def _least(self, objective: np.ndarray, allowed: np.ndarray, limited: np.ndarray | None = None) -> np.ndarray:
        # Half a second to import, for this function alone.
        from scipy import optimize, sparse

        n = len(self.layers)
        one_each = sparse.csr_array((np.ones(n), (self.layers, np.arange(n))))
        rows = [
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(self.spare.astype(float), -np.inf, self.capacity),
        ]
        if limited is not None:
            rows.append(optimize.LinearConstraint(np.where(allowed, limited, 0), -np.inf, COST_UNIT))
        while True:
            result = optimize.milp(
                np.where(allowed, objective, 0),
                integrality=np.ones(n),
                bounds=optimize.Bounds(0, allowed.astype(float)),  # pyright: ignore[reportArgumentType]
                constraints=rows,
                options={"mip_rel_gap": 0},
            )
            if result.x is None:
                raise RuntimeError(f"HiGHS found no allocation: {result.message}")
            picks = result.x > 0.5
            if self.spare[picks].sum() <= self.capacity:
                return picks
            # Within the solver's tolerance of the budget, but above it: forbid just this one.
            rows.append(optimize.LinearConstraint(picks.astype(float), -np.inf, self.layers.max()))

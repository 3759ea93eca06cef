"""What decides a quantized weight: its scale, its grid, its range, and which weights it is at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hero_jax import errors
from hero_jax.errors import ArgumentError

__all__ = ["GRANULARITIES", "GRIDS", "MAX_BITS", "MIN_BITS", "PRESETS", "RANGE_RULES", "QuantSpec", "named"]

PyTree = Any

GRANULARITIES = ("tensor", "channel", "group")
GRIDS = ("narrow", "full", "stretched")
RANGE_RULES = ("max", "percentile", "mse")
MIN_BITS, MAX_BITS = 2, 16


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Everything that decides a quantized weight besides the bit width; `name` belongs beside every number.

    With L = 2^(b - 1), m the end of the symmetric range [-m, m], and [lo, hi] the asymmetric one, which holds 0:

        grid         scale              zero point            codes               at 2 bits, m = 1
        narrow       m / (L - 1)        0                     -(L - 1) .. L - 1   -1, 0, 1
        full         m / L              0                     -L .. L - 1         -1, -0.5, 0, 0.5
        stretched    m / (L - 1/2)      0                     -L .. L - 1         -1.33, -0.67, 0, 0.67
        asymmetric   (hi - lo)/(2L - 1) round(-L - lo/scale)  -L .. L - 1         lo=-1, hi=0.5: -1, -0.5, 0, 0.5

    "full" clips the largest positive weights; "stretched" is that of qwix and torchao. Zero is a code of every grid.
    Rounding is half to even, scales are float32.

    Args:
      granularity: what has a scale of its own. "channel": each entry of the last axis, the output channel of Flax
        Dense, Conv, depthwise and grouped kernels. "group": each `group_size` consecutive entries of the last axis but
        one, the input channel, at every position of the other axes; a depthwise kernel has one input channel, hence a
        scale for every weight: leave it out there. "tensor": the leaf. A leaf with fewer than two axes always has one
        scale. Of a kernel with several axes of outputs, such as (inputs, heads, head_dim) of an attention, "channel"
        is the last of them: heads share the scales.
      grid: "narrow", "full" or "stretched".
      symmetric: False for the asymmetric grid, which uses all codes: `grid` must then be "full".
      range_rule: "max": m = max |w|, or lo = min(w, 0) and hi = max(w, 0). "percentile": the `percentile` of |w|, or
        that of w and its complement; what lies outside is clipped. "mse": of the ranges c times that of "max", with c =
        1/80, 2/80, ..., 100/80, the one whose sum of squared errors is least (asymmetric ranges only shrink).
      percentile: for range_rule "percentile", in (50, 100].
      group_size: for granularity "group". A leaf with fewer input channels is one group; otherwise it must divide them.
      leaves: patterns (`fnmatch`, on paths such as "stage1_block1/conv1/kernel") of the leaves to quantize. Default:
        leaves with two or more axes. In most networks those are the kernels; biases of attention heads and of layers
        stacked by a scan have two axes as well: name patterns there.
      overrides: pairs of a pattern and a bit width that the leaves it matches have at every point of a sweep, or None
        to leave them as they are: `(("conv/*", 8), ("head/*", None))`. The last that matches counts.
      stacked: patterns of the leaves whose first axis counts layers, such as the (L, I, O) kernels of `nn.scan`:
        `("layers/*",)`. Each layer has its own scales, as if it were quantized alone, and that axis is not counted
        where the number of axes matters: biases (L, O) stay as they are by default. Otherwise the layers of a stack
        share scales by "channel" and "tensor". Operations are those of as many leaves as there are layers.

    Raises:
      ArgumentError, TypeError: a value that is not among those above, or given where it has no meaning.

    >>> QuantSpec(granularity="tensor").name
    'tensor-narrow'
    >>> QuantSpec("group", "full", symmetric=False, range_rule="mse", group_size=32).name
    'group32-asymmetric-mse'
    >>> QuantSpec(overrides=(("head/*", 8), ("conv/*", None))).name
    'channel-narrow+head/*@8+conv/*@full'
    >>> QuantSpec(stacked=("layers/*",)).name
    "channel-narrow+stacked['layers/*']"
    """

    granularity: str = "channel"
    grid: str = "narrow"
    symmetric: bool = True
    range_rule: str = "max"
    percentile: float | None = None
    group_size: int | None = None
    leaves: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int | None], ...] = ()
    stacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        errors.one_of("QuantSpec(granularity=...)", self.granularity, GRANULARITIES)
        errors.one_of("QuantSpec(grid=...)", self.grid, GRIDS)
        errors.boolean("QuantSpec(symmetric=...)", self.symmetric)
        errors.one_of("QuantSpec(range_rule=...)", self.range_rule, RANGE_RULES)
        if not self.symmetric and self.grid != "full":
            raise ArgumentError(f"`QuantSpec(grid=...)` must be 'full' where symmetric is False; got {self.grid!r}.")
        _goes_with("percentile", self.percentile, "range_rule", self.range_rule)
        if self.percentile is not None:
            errors.scalar("QuantSpec(percentile=...)", self.percentile)
            if not 50 < self.percentile <= 100:
                raise ArgumentError(f"`QuantSpec(percentile=...)` must be in (50, 100]; got {self.percentile!r}.")
            object.__setattr__(self, "percentile", float(self.percentile))
        _goes_with("group_size", self.group_size, "granularity", self.granularity, "group")
        if self.group_size is not None:
            errors.integer("QuantSpec(group_size=...)", self.group_size, low=1)
        for field in ("leaves", "stacked"):
            value = getattr(self, field)
            if not isinstance(value, tuple) or not all(isinstance(x, str) for x in value):
                raise TypeError(f"`QuantSpec({field}=...)` must be a tuple of patterns; got {errors.brief(value)}.")
        for pair in self.overrides if isinstance(self.overrides, tuple) else (self.overrides,):
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
                raise TypeError(
                    "`QuantSpec(overrides=...)` must be a tuple of pairs (pattern, bits or None); got"
                    f" {errors.brief(pair)}."
                )
            if pair[1] is not None:
                errors.integer(f"QuantSpec(overrides=...)[{pair[0]!r}]", pair[1], low=MIN_BITS, high=MAX_BITS)

    @property
    def name(self) -> str:
        """What the specification is in one word, such as "channel-narrow"."""
        parts = [self.granularity if self.group_size is None else f"group{self.group_size}"]
        parts.append(self.grid if self.symmetric else "asymmetric")
        if self.range_rule != "max":
            parts.append("mse" if self.percentile is None else f"p{self.percentile!r}")
        leaves = f"+only[{','.join(map(repr, self.leaves))}]" if self.leaves else ""
        fixed = "".join(f"+{pattern}@{'full' if bits is None else bits}" for pattern, bits in self.overrides)
        stacked = f"+stacked[{','.join(map(repr, self.stacked))}]" if self.stacked else ""
        return "-".join(parts) + leaves + fixed + stacked


def named(name: str) -> QuantSpec:
    """The specification of a name: what `QuantSpec.name` gives without patterns, or one of `PRESETS`.

    Raises:
      ArgumentError: an unknown name.

    >>> named("qwix").name
    'channel-stretched'
    >>> named("group32-asymmetric-p99.9")
    ... # doctest: +NORMALIZE_WHITESPACE
    QuantSpec(granularity='group', grid='full', symmetric=False, range_rule='percentile', percentile=99.9,
              group_size=32, leaves=(), overrides=(), stacked=())
    """
    if not isinstance(name, str):
        raise TypeError(f"`spec` must be a name; got {errors.brief(name)}.")
    if name in PRESETS:
        return PRESETS[name]
    match = re.fullmatch(
        r"(tensor|channel|group(?P<size>[1-9]\d*))-(?P<grid>narrow|full|stretched|asymmetric)"
        r"(-(?P<rule>mse|p(?P<percentile>\d+(\.\d+)?)))?",
        name,
    )
    if match is None:
        granularities, grids = "tensor, channel, group32", (*GRIDS, "asymmetric")
        raise ArgumentError(
            f"`spec` must be one of {', '.join(PRESETS)}, or GRANULARITY-GRID[-RANGE] with granularity {granularities};"
            f" grid {', '.join(grids)}; range mse, p99.9; got {name!r}."
        )
    size, percentile = match["size"], match["percentile"]
    return QuantSpec(
        granularity="group" if size else match[1],
        grid="full" if match["grid"] == "asymmetric" else match["grid"],
        symmetric=match["grid"] != "asymmetric",
        range_rule="percentile" if percentile else match["rule"] or "max",
        percentile=float(percentile) if percentile else None,
        group_size=int(size) if size else None,
    )


def from_fields(fields: Mapping[str, Any]) -> QuantSpec:
    """The specification whose fields these are, as JSON gives them: with lists, and without those it is older than."""
    pairs = tuple((pattern, bits) for pattern, bits in fields["overrides"])
    patterns = {name: tuple(fields.get(name, ())) for name in ("leaves", "stacked")}
    return QuantSpec(**{**fields, **patterns, "overrides": pairs})


def _goes_with(field: str, value: Any, other: str, kind: str, wanted: str | None = None) -> None:
    wanted = wanted or field
    if (value is not None) != (kind == wanted):
        rule = "be given with" if kind == wanted else "be left out without"
        raise ArgumentError(f"`QuantSpec({field}=...)` must {rule} {other}={wanted!r}; got {value!r} and {kind!r}.")


PRESETS = {
    "narrow": QuantSpec("channel", "narrow"),
    "qwix": QuantSpec("channel", "stretched"),
    "mse": QuantSpec("channel", "narrow", range_rule="mse"),
    "asymmetric": QuantSpec("channel", "full", symmetric=False),
}

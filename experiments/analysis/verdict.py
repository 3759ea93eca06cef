"""Which network has the best mean, by how much, and whether that is more than chance, in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from experiments.analysis import tables
from experiments.analysis.tables import Frame

# For each metric: how often, of equal networks, some pair is said to differ.
LEVEL = 0.05


def verdicts(
    ends: Mapping[str, Frame],
    networks: Sequence[str],
    lowest: Collection[str] = (),
    formats: Mapping[str, tuple[str, str]] = tables.FORMATS,
) -> list[str]:
    """A sentence for each metric: the best mean, and how far it is from the first network and from the next best.

    Args:
      ends: by the name of the metric, the value of each run at the end of training ("network", "seed", "value").
      networks: all that were compared; the first one is what the others are compared to.
      lowest: the metrics of which the lowest mean is the best, not the highest.
      formats: of means and errors by metric, where they are not fixed.

    A difference is paired over the seeds that both networks have: mean +- standard error. It is significant where a
    paired t test gives p < LEVEL, with Bonferroni's correction for all pairs of networks; the last sentence says so.
    """
    pairs = math.comb(len(networks), 2)
    made = []
    for title, rows in ends.items():
        means = tables.spreads(rows, ["network"])["mean"].dropna().sort_values(ascending=title in lowest, kind="stable")
        if len(means) < 2:
            continue
        best, following = means.index[:2]
        rivals = [name for name in (networks[0], following) if name != best and name in means.index]
        told = [
            _difference(rows, (best, rival), pairs, formats.get(title, tables.FIXED)) for rival in dict.fromkeys(rivals)
        ]
        kind = "lowest" if title in lowest else "highest"
        made.append(f"{title}: {best} has the {kind} mean, {' and '.join(told)}.")
    if made:
        corrected = f", corrected for all {pairs} pairs of methods" * (pairs > 1)
        made.append(f"Significant: paired t tests at {100 * LEVEL:.0f} % for each line{corrected}.")
    return made


def _difference(rows: Frame, networks: tuple[str, str], pairs: int, formats: tuple[str, str]) -> str:
    """How far the first of two networks is above the second, or below it, and whether that is significant."""
    from scipy import special  # which takes a quarter of a second of every command's help

    found = tables.differences(rows[rows["network"].isin(networks)].assign(label=""), networks[1])
    if not len(found):
        return f"not to be compared with {networks[1]} (no common seed)"
    ((_, mean, error, n),) = found.itertuples()
    side = f"{'above' if mean > 0 else 'below' if mean < 0 else 'from'} {networks[1]}"
    amount = tables.cell(abs(mean), error, formats)
    if n < 2:
        return f"{amount} {side} (one seed, not tested)"
    if error <= 1e-9 * abs(mean):  # scores come in steps, and those of a few seeds may differ by as many
        return f"{amount} {side} (the same in every seed, not tested)"
    p = 2 * special.stdtr(n - 1, -abs(mean) / error) * pairs
    return f"{amount} {side} ({'significant' if p < LEVEL else 'not significant'})"

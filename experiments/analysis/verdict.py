"""Which network is ahead, by how much, and whether that is more than chance, in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from experiments.analysis import tables
from experiments.analysis.tables import Frame

# Of comparisons of equal networks, in this share at most some pair is said to differ by more than chance.
LEVEL = 0.05


def verdicts(ends: Mapping[str, Frame], networks: Sequence[str], lowest: Collection[str] = ()) -> list[str]:
    """A sentence for each metric: who is ahead, and of the first network and of the next best how far.

    Args:
      ends: by the name of the metric, the value of each run at the end of training ("network", "seed", "value").
      networks: all that were compared; the first one is what the others are compared to.
      lowest: the metrics of which the lowest mean is ahead, not the highest.

    A difference is paired over the seeds that both networks have: mean +- standard error. It is more than chance where
    a paired t test gives p < LEVEL, with Bonferroni's correction for all pairs of networks; the last sentence says so.
    """
    pairs = math.comb(len(networks), 2)
    made = []
    for title, rows in ends.items():
        means = tables.spreads(rows, ["network"])["mean"].dropna().sort_values(ascending=title in lowest, kind="stable")
        if len(means) < 2:
            continue
        ahead, following = means.index[:2]
        rivals = [name for name in (networks[0], following) if name != ahead and name in means.index]
        told = [_difference(rows, title, (ahead, rival), pairs) for rival in dict.fromkeys(rivals)]
        made.append(f"{title}: {ahead} is {' and '.join(told)}.")
    if made:
        corrected = f", corrected for all {pairs} pairs of methods" * (pairs > 1)
        made.append(f"Chance: paired t tests at {100 * LEVEL:.0f} %{corrected}.")
    return made


def _difference(rows: Frame, title: str, networks: tuple[str, str], pairs: int) -> str:
    """How far the first of two networks is above the second, or below it, and whether that is more than chance."""
    from scipy import special  # which takes a quarter of a second of every command's help

    found = tables.differences(rows[rows["network"].isin(networks)].assign(label=title), networks[1])
    ((_, mean, error, n),) = found.itertuples()
    side = f"{'above' if mean >= 0 else 'below'} {networks[1]}"
    amount = tables.cell(abs(mean), error, tables.FORMATS.get(title, tables.FIXED))
    if n < 2:
        return f"{amount} {side} (one seed says nothing about chance)"
    p = 2 * special.stdtr(n - 1, -abs(mean) / error) * pairs if error else float(mean == 0)
    return f"{amount} {side} ({'more than chance' if p < LEVEL else 'chance can explain that'})"

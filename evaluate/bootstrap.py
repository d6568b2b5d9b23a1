"""How sure a figure is, where items come in groups that share demonstrations or a task.

A resample draws as many groups as there are, with replacement, and from each drawn group as many of its items as it
has. All figures of a resample come from the same draw, so differences are paired over items and groups.

Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, §3.8 (hierarchical data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from terselm.statistics import RESAMPLES, percentile_interval

Floats = NDArray[np.float64]
_AT_ONCE = 1 << 24  # counts in memory


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether a difference is one: zero is not in its interval."""
        return self.low > 0 or self.high < 0


def resampled_sums(columns: Floats, groups: Sequence[str], *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Sums of each column over resampled items.

    Args:
        columns: ``(items, columns)``.
        groups: ``(items,)``.

    Returns:
        ``(resamples, columns)``.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    generator = np.random.default_rng(seed)
    sums = np.zeros((resamples, columns.shape[1]))
    size = max(1, _AT_ONCE // len(groups))
    for begin in range(0, resamples, size):
        part = min(size, resamples - begin)
        drawn = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=part)
        for number, items in enumerate(members.values()):
            times = generator.multinomial(drawn[:, number] * len(items), np.full(len(items), 1 / len(items)))
            sums[begin : begin + part] += times @ columns[items]
    return sums


def ratio(over: Floats, under: Floats, groups: Sequence[str], *, seed: int) -> Estimate:
    """A ratio of sums, such as a mean (``under`` all ones). ``over``, ``under``: ``(items,)``."""
    sums = resampled_sums(np.stack([over, under], axis=1), groups, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(sums[:, 0] / sums[:, 1])
        value = float(over.sum() / under.sum()) if under.sum() else float("nan")
    return Estimate(value=value, low=low, high=high)

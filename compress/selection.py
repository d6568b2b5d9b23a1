"""Stage 2 for demonstrations whose units have scores already: the best are kept (docs/algorithm.md, §5).

The other form of `IterativeCompression`: no unit's score depends on what was kept before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from terselm.compress.itpc import IterativeCompression
from terselm.compress.layout import Layout, Mask
from terselm.compress.prompt import Part
from terselm.statistics import Floats, Ints

_DEMONSTRATIONS = list(Part).index(Part.DEMONSTRATION)


class RankedSelection:
    """Stage 2 of one prompt, done at once.

    `kept`, `margin`, `surprisal`, `segment_of` (all ``(n_units,)``), `tokens_read` and `tokens_cached` are as in
    `IterativeCompression`; surprisals are unknown, and the demonstrations are one segment.

    Args:
        parts, budgets: see `Plan`.
        scores: ``(n_units,)``, the higher the better; units with NaN are kept only where others belong to them.
        parents: ``(n_units,)``, an earlier unit that each is not kept without, −1 for none.
        quotas: tokens for each demonstration, by number of its piece, instead of one budget for all.
        others: Stage 2 of the other parts, finished; None where they are kept whole.
    """

    def __init__(
        self,
        layout: Layout,
        parts: Sequence[Ints],
        budgets: Sequence[int],
        scores: Floats,
        parents: Ints,
        *,
        quotas: dict[int, int] | None = None,
        others: IterativeCompression | None = None,
    ) -> None:
        size = len(layout)
        units = parts[_DEMONSTRATIONS]
        self.kept: Mask = layout.protected.copy() if others is None else others.kept.copy()
        self.margin: Floats = np.full(size, np.nan) if others is None else others.margin.copy()
        self.surprisal: Floats = np.full(size, np.nan) if others is None else others.surprisal.copy()
        self.segment_of: Ints = np.full(size, -1, dtype=np.int64) if others is None else others.segment_of.copy()
        self.tokens_read = 0 if others is None else others.tokens_read
        self.tokens_cached = 0 if others is None else others.tokens_cached
        self.kept[units] = layout.protected[units]
        self.segment_of[units] = self.segment_of.max(initial=-1) + 1
        self._layout = layout
        self._parents = parents
        free = units[~layout.protected[units]]
        scored = free[~np.isnan(scores[free])]
        best = scored[np.argsort(-scores[scored], kind="stable")]
        if quotas is None:
            self._take(best, budgets[_DEMONSTRATIONS])
        else:
            for piece, quota in quotas.items():
                self._take(best[layout.piece_of[best] == piece], quota)
        self._set_margins(free, scores)
        orphans = (parents >= 0) & ~self.kept & ~self.kept[parents]
        self.margin[orphans] = np.nan  # Stage 3 takes nothing back without what it belongs to

    def _take(self, best: Ints, room: int) -> None:
        """Keep units in this order, each with all that it belongs to; one that does not fit is passed over."""
        cost = self._layout.cost
        for unit in best.tolist():
            chain = self._chain(unit)
            price = int(cost[chain].sum())
            if price <= room:
                self.kept[chain] = True
                room -= price

    def _chain(self, unit: int) -> list[int]:
        """The unit and what it belongs to, as far as it is not kept yet."""
        chain: list[int] = []
        while unit >= 0 and not self.kept[unit]:
            chain.append(unit)
            unit = int(self._parents[unit])
        return chain

    def _set_margins(self, free: Ints, scores: Floats) -> None:
        """How far above the worst kept unit each is; what others belong to is as good as the best of them."""
        value = scores.copy()
        for unit in free[::-1].tolist():  # those that belong to others stand after these
            parent = int(self._parents[unit])
            if parent >= 0 and self.kept[unit]:
                value[parent] = np.fmax(value[parent], value[unit])
        rated = free[~np.isnan(value[free])]
        chosen = rated[self.kept[rated]]
        if len(rated):
            threshold = value[chosen].min() if len(chosen) else value[rated].max()
            self.margin[rated] = value[rated] - threshold


def standardised(values: Floats) -> Floats:
    """With mean 0 and deviation 1; zeros where all are alike."""
    spread = float(values.std()) if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))

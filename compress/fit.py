"""Stage 3: make the text fit the caller's budget, in the caller's tokens (docs/algorithm.md, §3)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.counter import Count, count_all
from terselm.compress.layout import Layout, Mask
from terselm.errors import BudgetError

if TYPE_CHECKING:
    from terselm.statistics import Floats, Ints


class BudgetFit:
    """Drops the least certain units while over the budget, takes the best dropped ones back while well under it.

    Args:
        kept: ``(n_units,)``, the choice of Stage 2.
        margin: ``(n_units,)``, score − γ; NaN for units without one.
        spare: gives the units that did not take part in Stage 2, best first; taken back last.
        budget: in the caller's tokens.

    Attributes, final once `steps` has come to its end:
        kept: ``(n_units,)``.
        text, size: the text of what is kept, and its tokens, at most ``budget``.
    """

    def __init__(
        self, layout: Layout, kept: Mask, margin: Floats, spare: Callable[[], Ints], budget: int, count: Count
    ) -> None:
        self._layout = layout
        self._margin = margin
        self._spare = spare
        self._budget = budget
        self.count = count
        self.kept = kept.copy()
        self.text = layout.text(kept)
        self.size = 0

    def steps(self) -> Generator[str, int, None]:
        """Yields a text whenever one has to be counted; its tokens are sent back.

        Raises:
            BudgetError: no text can fit.
        """
        self.size = yield self.text
        if self.size > self._budget:
            yield from self._drop()
        if self._wants_more():
            yield from self._take_back()
        if not self.kept.any():
            raise self._nothing_fits()

    def _wants_more(self) -> bool:
        return self.size * 100 < self._budget * 98 or not self.kept.any()

    def _drop(self) -> Generator[str, int, None]:
        free = np.flatnonzero(self.kept & ~self._layout.protected)[::-1]  # of equals the later goes first
        worst = free[np.argsort(self._margin[free], kind="stable")]
        done = 0
        while self.size > self._budget:
            if done == len(worst) and not self._layout.protected.any():
                raise self._nothing_fits()
            if done == len(worst):
                raise BudgetError(
                    f"the protected text alone has {self.size} tokens, more than the budget of {self._budget}; "
                    f"raise the budget to {self.size} or protect less",
                    smallest=self.size,
                )
            step = max(1, (self.size - self._budget) * int(self.kept.sum()) // (2 * self.size))
            self.kept[worst[done : done + step]] = False
            done = min(done + step, len(worst))
            self.text = self._layout.text(self.kept)
            self.size = yield self.text

    def _take_back(self) -> Generator[str, int, None]:
        dropped = np.flatnonzero(~self.kept & ~np.isnan(self._margin))
        candidates = dropped[np.argsort(-self._margin[dropped], kind="stable")]
        done = 0
        step = 0
        extended = False
        while self._wants_more():
            step = step or self._first_step()
            if done + step > len(candidates) and not extended:  # only now, since it may need the model
                candidates, extended = np.concatenate([candidates, self._spare()]), True
            if done == len(candidates):
                break
            chunk = candidates[done : done + step]
            self.kept[chunk] = True
            trial = self._layout.text(self.kept)
            size = yield trial
            if size <= self._budget:
                self.text, self.size = trial, size
                done += len(chunk)
                step = 0
                continue
            self.kept[chunk] = False
            if step == 1:
                done += 1
            else:
                step //= 2

    def _first_step(self) -> int:
        """As many units as fill half of what is free, if they are as long as those that are kept."""
        if not self.size:
            return 1
        return max(1, (self._budget - self.size) * int(self.kept.sum()) // (2 * self.size))

    def _nothing_fits(self) -> BudgetError:
        smallest = smallest_budget(self._layout, self.count)
        return BudgetError(
            f"a budget of {self._budget} tokens holds nothing of this prompt; the smallest that could is {smallest}",
            smallest=smallest,
        )


def fit_all(fits: Sequence[BudgetFit]) -> None:
    """Run the steps of prompts that are counted alike together, so that their texts are counted together.

    Raises:
        BudgetError: for one of the prompts no text can fit.
    """
    running = [fit.steps() for fit in fits]
    texts = [next(steps) for steps in running]
    while running:
        going = []
        asked = []
        for steps, size in zip(running, count_all(fits[0].count, texts), strict=True):
            try:
                asked.append(steps.send(size))
                going.append(steps)
            except StopIteration:
                continue
        running, texts = going, asked


def smallest_budget(layout: Layout, count: Count) -> int:
    """The least that a budget can be: the protected text, or where none is protected the cheapest single unit."""
    if layout.protected.any():
        return count(layout.text(layout.protected))
    return min(
        count(text)
        for text in {
            layout.pieces[piece].text[start:end]
            for piece, start, end in zip(layout.piece_of, layout.starts, layout.ends, strict=True)
        }
    )

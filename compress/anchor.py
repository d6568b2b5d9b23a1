"""Demonstrations kept whole, so that a small target sees how an example looks (docs/algorithm.md, §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from terselm.compress.layout import Layout
from terselm.compress.prompt import Prompt
from terselm.compress.settings import EXAMPLES_ANCHOR
from terselm.compress.units import Ints


def anchor_for(prompt: Prompt) -> float:
    """The share where the settings name none: `EXAMPLES_ANCHOR` for worked examples, else 0.

    Worked examples are at least two demonstrations that all begin as the question does, with a word such as
    "Question:" or "###": one that is not all letters.
    """
    texts = [prompt.question, *filter(str.strip, prompt.demonstrations)]
    opening, *others = (text.split(maxsplit=1)[:1] for text in texts)
    labelled = bool(opening) and not opening[0].isalpha()
    return EXAMPLES_ANCHOR if labelled and len(others) > 1 and all(other == opening for other in others) else 0.0


def keep_anchor(layout: Layout, pieces: Sequence[int], room: int, over: Callable[[str], int]) -> Layout:
    """Protect demonstrations that cost at most ``room``, separators included, and of one that does not fit its end.

    Args:
        pieces: the demonstrations, in the order in which they are taken.
        room: tokens of the small LM.
        over: by how many of the caller's tokens a text exceeds the budget; units leave the anchor until it does not.
    """
    units, opens = _candidates(layout, pieces)
    costs = np.where(layout.protected[units], 0, layout.cost[units]) + opens * len(layout.separator_ids)
    taken = int(np.searchsorted(np.cumsum(costs), room, side="right"))
    while taken:
        protected = layout.protected.copy()
        protected[units[:taken]] = True
        excess = over(layout.text(protected))
        if excess <= 0:
            return replace(layout, protected=protected)
        taken -= min(taken, excess)
    return layout


def _candidates(layout: Layout, pieces: Sequence[int]) -> tuple[Ints, Ints]:
    """The units in the order in which they are taken, and 1 at those that bring a new piece."""
    none = np.zeros(0, dtype=np.int64)
    units = np.concatenate([none, *(np.arange(layout.edges[n], layout.edges[n + 1])[::-1] for n in pieces)])
    opens = np.zeros(len(units), dtype=np.int64)
    firsts = np.cumsum([0, *(layout.edges[n + 1] - layout.edges[n] for n in pieces)])
    opens[[first for first, n in zip(firsts, pieces, strict=False) if not layout.holds_protected(n)]] = 1
    return units, opens

"""Stage 3: make the text fit the caller's budget, in the caller's tokens (docs/algorithm.md, §3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from terselm.compress.counter import Count
from terselm.compress.itpc import Floats
from terselm.compress.layout import Layout, Mask
from terselm.compress.units import Ints
from terselm.errors import BudgetError


def fit_budget(
    layout: Layout, kept: Mask, margin: Floats, spare: Callable[[], Ints], budget: int, count: Count
) -> tuple[Mask, str, int]:
    """Drop the least certain units while over the budget, take the best dropped ones back while well under it.

    Args:
        kept: ``(n_units,)``, the choice of Stage 2.
        margin: ``(n_units,)``, score − γ; NaN for units without one.
        spare: gives the units that did not take part in Stage 2, best first; taken back last.
        budget: in the caller's tokens.

    Returns:
        what is kept, its text, and the text's tokens, at most ``budget``.

    Raises:
        BudgetError: no text can fit.
    """
    kept = kept.copy()
    text = layout.text(kept)
    size = count(text)
    if size > budget:
        text, size = _drop(layout, kept, margin, budget, (text, size), count)
    if _wants_more(kept, size, budget):
        dropped = np.flatnonzero(~kept & ~np.isnan(margin))
        best = dropped[np.argsort(-margin[dropped], kind="stable")]
        text, size = _take_back(layout, kept, best, spare, budget, (text, size), count)
    if not kept.any():
        raise _nothing_fits(layout, budget, count)
    return kept, text, size


def smallest_budget(layout: Layout, count: Count) -> int:
    """The least that a budget can be: the protected text, or where none is protected the cheapest single unit."""
    if layout.protected.any():
        return count(layout.text(layout.protected))
    return min(count(text) for text in _unit_texts(layout))


def _nothing_fits(layout: Layout, budget: int, count: Count) -> BudgetError:
    smallest = smallest_budget(layout, count)
    return BudgetError(
        f"a budget of {budget} tokens holds nothing of this prompt; the smallest that could is {smallest}",
        smallest=smallest,
    )


def _wants_more(kept: Mask, size: int, budget: int) -> bool:
    return size * 100 < budget * 98 or not kept.any()


def _unit_texts(layout: Layout) -> set[str]:
    return {
        layout.pieces[piece].text[start:end]
        for piece, start, end in zip(layout.piece_of, layout.starts, layout.ends, strict=True)
    }


def _drop(
    layout: Layout, kept: Mask, margin: Floats, budget: int, now: tuple[str, int], count: Count
) -> tuple[str, int]:
    text, size = now
    free = np.flatnonzero(kept & ~layout.protected)[::-1]  # of equals the later goes first
    worst = free[np.argsort(margin[free], kind="stable")]
    done = 0
    while size > budget:
        if done == len(worst) and not layout.protected.any():
            raise _nothing_fits(layout, budget, count)
        if done == len(worst):
            raise BudgetError(
                f"the protected text alone has {size} tokens, more than the budget of {budget}; "
                f"raise the budget to {size} or protect less",
                smallest=size,
            )
        step = max(1, (size - budget) * int(kept.sum()) // (2 * size))
        kept[worst[done : done + step]] = False
        done = min(done + step, len(worst))
        text = layout.text(kept)
        size = count(text)
    return text, size


def _take_back(
    layout: Layout,
    kept: Mask,
    candidates: Ints,
    spare: Callable[[], Ints],
    budget: int,
    now: tuple[str, int],
    count: Count,
) -> tuple[str, int]:
    text, size = now
    done = 0
    step = 0
    extended = False
    while _wants_more(kept, size, budget):
        step = step or (max(1, (budget - size) * int(kept.sum()) // (2 * size)) if size else 1)
        if done + step > len(candidates) and not extended:  # only now, since it may need the model
            candidates, extended = np.concatenate([candidates, spare()]), True
        if done == len(candidates):
            break
        chunk = candidates[done : done + step]
        kept[chunk] = True
        trial = layout.text(kept)
        trial_size = count(trial)
        if trial_size <= budget:
            text, size = trial, trial_size
            done += len(chunk)
            step = 0
            continue
        kept[chunk] = False
        if step == 1:
            done += 1
        else:
            step //= 2
    return text, size

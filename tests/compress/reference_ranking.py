"""Section 5 of docs/algorithm.md for the brute-force reference: ranking for the question.

Every score is one full forward pass of its own. Which text is cut into lines, and what a unit belongs to, are rules of
thumb that are tested by themselves: they are taken from the compressor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from reference_pieces import Piece, Unit, tokenise

from terselm.compress.context import in_context

STATEMENT = " We can get the answer to this question in the given documents."

Surprisals = Callable[[Any, Sequence[int], Sequence[int]], list[float]]


def decide(prompt: Any, settings: Any, *, has_head: bool = False) -> Any:
    """The settings with ``rank_by`` and ``unit`` decided; ``unit`` may stay "auto" where texts decide."""
    by_model = "utility" if has_head else "question"
    asks = prompt.ranked_for or prompt.question
    words = [text.split()[0] for text in prompt.demonstrations if text.split()]
    opening = prompt.question.split()[:1]
    examples = not prompt.ranked_for and len(words) >= 2 and set(words) == set(opening) and not opening[0].isalpha()
    rank_by = settings.rank_by
    if rank_by == "auto":
        asked = settings.contrast or settings.rank_delta or (is_open(settings) and not examples)
        rank_by = by_model if asked and asks.strip() and words else "surprisal"
    if rank_by == "surprisal":
        settings = replace(settings, rank_by=rank_by, ranker=None, contrast=False, rank_delta=0.0)
    unit = settings.unit
    if unit == "auto" and (rank_by == "surprisal" or settings.contrast):
        unit = "token"
    anchor = 0.0 if settings.anchor is None and rank_by != "surprisal" else settings.anchor
    return replace(settings, rank_by=rank_by, unit=unit, anchor=anchor)


def is_open(settings: Any) -> bool:
    """Nothing says how demonstrations are thinned."""
    defaults = type(settings)()
    names = ["k", "instruction_rate", "question_rate", "segment_size", "unit", "order"]
    names += ["anchor", "anchor_by", "ablations"]
    return all(getattr(settings, name) == getattr(defaults, name) for name in names)


def otherwise(pieces: list[Piece], target: int, separator: int, settings: Any, asked: Any) -> Any:
    """Other settings where those that were decided do not suit the budget. ``settings``: of `decide`, without None."""
    if asked.rank_by != "auto" or not is_open(asked):
        return None
    demonstrations = [piece for piece in pieces if piece.part == "demonstration"]
    if settings.anchor == 1:
        fits = any(2 * piece.free <= sum(unit.cost for unit in piece.units) for piece in demonstrations)
        texts = [piece.text for piece in demonstrations if piece.text.strip()]
        lines = [line for text in texts for line in text.split("\n") if line.strip()]
        return (
            None
            if fits or len(lines) < 3 * len(texts)
            else replace(asked, rank_by="surprisal", unit="line", anchor=0.0)
        )
    free = [unit.cost for piece in demonstrations for unit in piece.units if not unit.protected]
    if settings.unit != "auto" or not free:
        return None
    first = next(piece for piece in demonstrations if piece.free)
    takers = [p for p in pieces if p is first or p.part != "demonstration" or any(u.protected for u in p.units)]
    charged = sum(unit.cost for piece in pieces for unit in piece.units if unit.protected)
    rates = {"instruction": settings.instruction_rate, "question": settings.question_rate}
    need = sum(rates[piece.part] * piece.free for piece in pieces if piece.part in rates)
    room = max(0, target - charged - separator * (len(takers) - 1))
    if min(free) <= room - need:
        return None
    return replace(asked, rank_by="surprisal", ranker=None, contrast=False, rank_delta=0.0, unit="token", anchor=0.0)


def scores_units(settings: Any) -> bool:
    return settings.rank_by != "surprisal" and (settings.contrast or settings.unit in ("auto", "sentence", "line"))


def log_likelihood(lm: Any, surprisals: Surprisals, question: str, text: str, *, whole: bool) -> float:
    """Mean log p(question | text), the best piece of a text that is too long."""
    bare = re.sub(r"^\s*question\s*:\s*|\n\s*answer\s*:?\s*$", "", question, flags=re.IGNORECASE).strip() or question
    ids = [i for i, _, _ in tokenise(lm.tokenizer, f"\n\nQuestion: {bare}{STATEMENT if whole else ''}")]
    before = [i for i, _, _ in tokenise(lm.tokenizer, text)]
    room = lm.window - 1 - len(ids)
    cuts = [before[start : start + room] for start in range(0, max(1, len(before)), room)]
    return max(-sum(surprisals(lm, cut, ids)) / len(ids) for cut in cuts)


def unit_scores(
    lm: Any, surprisals: Surprisals, prompt: Any, settings: Any, chosen: list[Piece], *, alone: bool
) -> dict[int, float]:
    """By id of the unit. Without ``alone``, demonstrations have their scores as ``perplexity``."""
    asks = prompt.ranked_for or prompt.question
    if settings.contrast:
        return contrast(lm, surprisals, f"{asks}{settings.separator}", chosen)
    if settings.rank_by == "utility":
        units = [unit for piece in chosen for unit in piece.units]
        return {id(unit): unit.utility for unit in units if unit.text.strip(" \n\t\r[]{}(),")}
    units, shown = [], []
    for piece in chosen:
        for unit, seen in zip(piece.units, in_context(piece.text, [u.text for u in piece.units]), strict=True):
            if unit.text.strip(" \n\t\r[]{}(),"):
                units.append(unit)
                shown.append(seen.text)
    own = [log_likelihood(lm, surprisals, asks, text, whole=False) for text in shown]
    whole = [0.0 if alone else piece.perplexity for unit in units for piece in chosen if unit in piece.units]
    totals = [a + b for a, b in zip(standardised(own), standardised(whole), strict=True)]
    return {id(unit): score for unit, score in zip(units, totals, strict=True)}


def contrast(lm: Any, surprisals: Surprisals, before: str, chosen: list[Piece]) -> dict[int, float]:
    question = [i for i, _, _ in tokenise(lm.tokenizer, before)]
    room = lm.window - 1 - len(question)
    scores = {}
    for piece in chosen:
        ids = [token for unit in piece.units for token in unit.ids]
        gains: list[float] = []
        for start in range(0, len(ids), room):
            cut = ids[start : start + room]
            pairs = zip(surprisals(lm, [], cut), surprisals(lm, question, cut), strict=True)
            gains += [a - b for a, b in pairs]
        for unit in piece.units:
            scores[id(unit)] = sum(gains[: unit.cost]) / unit.cost
            gains = gains[unit.cost :]
    return scores


def parents_of(chosen: list[Piece]) -> dict[int, Unit]:
    parents = {}
    for piece in chosen:
        for unit, seen in zip(piece.units, in_context(piece.text, [u.text for u in piece.units]), strict=True):
            if seen.parent is not None:
                parents[id(unit)] = piece.units[seen.parent]
    return parents


def choose(
    units: list[Unit], budgets: list[tuple[list[Piece] | None, int]], scores: dict[int, float], parents: dict[int, Unit]
) -> list[Unit]:
    """The units that stay of those of the demonstrations, with margins set; each budget is for some pieces or all."""
    kept = [unit for unit in units if unit.protected]
    free = sorted((unit for unit in units if not unit.protected), key=lambda unit: -scores.get(id(unit), -math.inf))
    for pieces, budget in budgets:
        mine = [u for u in free if id(u) in scores and (pieces is None or any(u in p.units for p in pieces))]
        for unit in mine:
            chain, above = [], unit
            while above is not None and above not in kept:
                chain.append(above)
                above = parents.get(id(above))
            if sum(link.cost for link in chain) <= budget:
                kept += chain
                budget -= sum(link.cost for link in chain)
    value = dict(scores)
    for unit in reversed(units):
        parent = parents.get(id(unit))
        if parent is not None and unit in kept and not unit.protected:
            value[id(parent)] = max(value.get(id(parent), -math.inf), value.get(id(unit), -math.inf))
    rated = [unit for unit in free if id(unit) in value]
    chosen = [value[id(unit)] for unit in rated if unit in kept]
    for unit in free:
        unit.margin = None
    for unit in rated:
        unit.margin = value[id(unit)] - (min(chosen) if chosen else max(value[id(u)] for u in rated))
    for unit in free:
        if unit not in kept and id(unit) in parents and parents[id(unit)] not in kept:
            unit.margin = None
    return [unit for unit in units if unit in kept]


def rates_by_rank(chosen: list[Piece], budget: int, delta: float) -> list[int]:
    """A weight for each of the pieces, in millionths."""
    free = sum(piece.free for piece in chosen)
    order = sorted(chosen, key=lambda piece: -piece.perplexity)
    rates = []
    for piece in chosen:
        rank = [other is piece for other in order].index(True)
        shift = delta * (1 - 2 * rank / (len(chosen) - 1)) if len(chosen) > 1 else 0.0
        rates.append(round(1_000_000 * min(1.0, max(0.0, budget / max(1, free) + shift))))
    return rates


def standardised(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / spread if spread > 0 else 0.0 for value in values]

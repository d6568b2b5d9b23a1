"""The compressor once more, brute force: docs/algorithm.md line by line, each segment one full forward pass.

No cache, no batch, and nothing of ``terselm.compress``. Only for prompts small enough to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference_budget import control_budget, keep_anchor, settle
from reference_pieces import Keep, Piece, Unit, read_pieces, tokenise, write
from reference_ranking import (
    choose,
    decide,
    log_likelihood,
    otherwise,
    parents_of,
    rates_by_rank,
    scores_units,
    unit_scores,
)
from reference_utility import score_utilities

from terselm.errors import BudgetError


@dataclass
class Answer:
    text: str
    original_tokens: int
    compressed_tokens: int
    selected: tuple[int, ...]
    units: list[Unit]  # of all pieces, in source order
    kept: list[bool]


def surprisals(lm: Any, before: Sequence[int], ids: Sequence[int]) -> list[float]:
    """-log p of each of ``ids`` after the start token, ``before`` and the ids in front of it."""
    sequence = [lm.start_id, *before, *ids]
    if len(sequence) > lm.window:
        raise AssertionError("the reference read beyond the window")
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    log_probabilities = logits[len(before) : -1].float().log_softmax(-1)  # row i predicts ids[i]
    return [-log_probabilities[i, token].item() for i, token in enumerate(ids)]


def read_alone(lm: Any, piece: Piece) -> None:
    """Perplexity of a demonstration by itself, and its units' surprisals."""
    ids = [token for unit in piece.units for token in unit.ids]
    values: list[float] = []
    for start in range(0, len(ids), lm.window - 1):
        values += surprisals(lm, [], ids[start : start + lm.window - 1])
    piece.perplexity = math.exp(sum(values) / len(values))
    for unit in piece.units:
        unit.surprisal = sum(values[: unit.cost])
        values = values[unit.cost :]


def cut_into_segments(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    segments: list[list[Unit]] = []
    for unit in units:
        if segments and sum(other.cost for other in segments[-1]) + unit.cost <= size:
            segments[-1].append(unit)
        else:
            segments.append([unit])
    return segments


def join(units: Sequence[Unit], last: int | None, separator: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of ``units`` after text that ends in piece ``last``, and where each unit's tokens begin."""
    ids: list[int] = []
    begins: list[int] = []
    for unit in units:
        if last is not None and unit.piece != last:
            ids += separator
        begins.append(len(ids))
        ids += unit.ids
        last = unit.piece
    return ids, begins


def compress_parts(
    lm: Any,
    parts: list[tuple[list[Unit], int]],
    separator: list[int],
    size: int,
    weights: dict[int, int] | None = None,
) -> list[Unit]:
    """The kept units of parts given as (units, budget); sets every unit's surprisal, segment and margin.

    A budget is spread over the tokens in proportion to the weights of their pieces (1 by default).
    """
    weights = weights or {}
    kept: list[Unit] = []
    prefix: list[int] = []
    number = 0
    for units, budget in parts:
        free_tokens = sum(unit.cost * weights.get(unit.piece, 1) for unit in units if not unit.protected)
        free_read = free_kept = 0
        for segment in cut_into_segments(units, size):
            last = kept[-1].piece if kept else None
            ids, begins = join(segment, last, separator)
            if 1 + len(prefix) + len(ids) > lm.window:
                prefix = prefix[len(prefix) - min(lm.window // 2, lm.window - 1 - len(ids), len(prefix)) :]
            values = surprisals(lm, prefix, ids)
            for unit, begin in zip(segment, begins, strict=True):
                unit.surprisal = sum(values[begin : begin + unit.cost])
                unit.segment = number
            number += 1
            free = [unit for unit in segment if not unit.protected]
            free_read += sum(unit.cost * weights.get(unit.piece, 1) for unit in free)
            allowed = budget * free_read // free_tokens - free_kept if free_tokens else 0
            taken = take_most_surprising(free, allowed)
            free_kept += sum(unit.cost for unit in taken)
            survivors = [unit for unit in segment if unit.protected or unit in taken]
            prefix += join(survivors, last, separator)[0]
            kept += survivors
    return kept


def take_ranked(
    lm: Any,
    prompt: Any,
    settings: Any,
    parts: list[tuple[list[Unit], int]],
    chosen: list[Piece],
    weights: dict[int, int],
    separator: list[int],
    *,
    alone: bool,
) -> list[Unit]:
    """Stage 2 where the demonstrations' units are taken by what they are worth for the question."""
    instruction, (units, budget), question = parts
    others = instruction[0] + question[0]
    if any(not unit.protected for unit in others):
        kept = compress_parts(lm, [instruction, question], separator, settings.segment_size)
    else:
        kept = others
    number = max((unit.segment for unit in others if unit.segment is not None), default=-1) + 1
    scores = unit_scores(lm, surprisals, prompt, settings, chosen, alone=alone)
    budgets: list[tuple[list[Piece] | None, int]] = [(None, budget)]
    if settings.rank_delta:
        shares = [weights[piece.units[0].piece] * piece.free for piece in chosen]
        budgets = [([p], budget * share // max(1, sum(shares))) for p, share in zip(chosen, shares, strict=True)]
    parents = {} if settings.contrast else parents_of(chosen)
    kept += choose(units, budgets, scores, parents)
    for unit in units:
        unit.segment = number
    return kept


def take_most_surprising(free: list[Unit], allowed: int) -> list[Unit]:
    ranked = sorted(free, key=lambda unit: -unit.score)  # stable: of equals, the earlier first
    taken: list[Unit] = []
    for unit in ranked:
        if unit.cost > allowed:
            break
        allowed -= unit.cost
        taken.append(unit)
    if free:
        gamma = taken[-1].score if taken else ranked[0].score
        for unit in free:
            unit.margin = unit.score - gamma
    return taken


def enforce(
    everything: list[Unit],
    kept: list[Unit],
    spare: list[Unit],
    budget: int,
    count: Callable[[str], int],
    separator: str,
) -> list[Unit]:
    """The units that stay. ``everything`` is in source order; ``spare`` are units outside Stage 2, best first."""
    order = {id(unit): i for i, unit in enumerate(everything)}
    alive = {order[id(unit)] for unit in kept}

    def counted(chosen: set[int]) -> int:
        return count(write([everything[i] for i in sorted(chosen)], separator))

    losers = sorted((unit for unit in kept if not unit.protected), key=lambda unit: (unit.margin, -order[id(unit)]))
    c = counted(alive)
    while c > budget:
        if not losers:
            raise BudgetError("the reference finds no room", smallest=smallest_budget(everything, count, separator))
        m = max(1, (c - budget) * len(alive) // (2 * c))
        alive -= {order[id(unit)] for unit in losers[:m]}
        losers = losers[m:]
        c = counted(alive)
    dropped = [
        unit
        for unit in everything
        if unit.segment is not None and unit.margin is not None and order[id(unit)] not in alive
    ]
    queue = [*sorted(dropped, key=lambda unit: (-unit.margin, order[id(unit)])), *spare]
    m = None
    while queue and (not alive or 100 * c < 98 * budget):
        if m is None:
            m = max(1, (budget - c) * len(alive) // (2 * c)) if c else 1
        tried = alive | {order[id(unit)] for unit in queue[:m]}
        if counted(tried) <= budget:
            alive, queue, m = tried, queue[m:], None
            c = counted(alive)
        elif m > 1:
            m //= 2
        else:
            queue = queue[1:]
    if not alive:
        raise BudgetError("the reference keeps nothing", smallest=smallest_budget(everything, count, separator))
    return [everything[i] for i in sorted(alive)]


def smallest_budget(everything: list[Unit], count: Callable[[str], int], separator: str) -> int:
    """What the protected units need; the cheapest unit, if none is protected."""
    protected = [unit for unit in everything if unit.protected]
    return count(write(protected, separator)) if protected else min(count(write([u], separator)) for u in everything)


def compress(
    lm: Any,
    prompt: Any,
    settings: Any,
    *,
    budget: int | None = None,
    rate: float | None = None,
    keep: Sequence[Keep] = (),
    counter: Callable[[str], int] | None = None,
) -> Answer:
    """Compress ``prompt`` (with ``instruction``, ``demonstrations``, ``question``) to ``budget`` or ``rate``.

    Raises:
        BudgetError: as the specification says, with ``smallest``.
    """
    count = counter or (lambda text: len(tokenise(lm.tokenizer, text)))
    asked, settings = settings, decide(prompt, settings, has_head=lm.utility is not None)
    pieces = read_pieces(lm, prompt, keep, settings)
    everything = [unit for piece in pieces for unit in piece.units]
    original = write(everything, settings.separator)
    total = count(original)
    if budget is None:
        assert rate is not None
        budget = math.floor(rate * total)
        if budget == 0 < total:
            smallest = max(1, smallest_budget(everything, count, settings.separator))
            raise BudgetError("the rate leaves nothing", smallest=smallest)
    numbers = tuple(piece.index for piece in pieces if piece.part == "demonstration")
    if total <= budget:
        return Answer(original, total, total, numbers, everything, [True] * len(everything))
    separator = [token for token, _, _ in tokenise(lm.tokenizer, settings.separator)]
    length = sum(unit.cost for unit in everything) + len(separator) * (len(pieces) - 1)
    target = budget if counter is None else budget * length // total

    def over(units: list[Unit]) -> int:
        return count(write(units, settings.separator)) - budget

    settings = settle(pieces, prompt, target, len(separator), settings, over)
    if settings.anchor:
        keep_anchor(pieces, target, len(separator), settings, prompt.pinned, over)
    if (other := otherwise(pieces, target, len(separator), settings, asked)) is not None:
        return compress(lm, prompt, other, budget=budget, keep=keep, counter=counter)

    alone = sum(piece.part == "demonstration" for piece in pieces) < 2

    if settings.rank_by == "utility":
        score_utilities(lm, prompt, settings, pieces, capped=asked.rank_by == "auto")

    def read(piece: Piece) -> None:
        if settings.rank_by == "surprisal":
            read_alone(lm, piece)
        elif not alone and settings.rank_by != "utility":
            asks = prompt.ranked_for or prompt.question
            piece.perplexity = log_likelihood(lm, surprisals, asks, piece.text, whole=True)

    chosen, shares = control_budget(pieces, target, len(separator), settings, read, prompt.pinned)
    if settings.order != "original":
        ranked = sorted((p for p in pieces if p.part == "demonstration"), key=lambda piece: -piece.perplexity)
        if settings.order == "first_and_last":
            ranked = ranked[::2] + ranked[1::2][::-1]
        place = {id(piece): place for place, piece in enumerate(ranked)}
        rank = {"instruction": 0, "demonstration": 1, "question": 2}
        pieces.sort(key=lambda piece: (rank[piece.part], place.get(id(piece), 0)))
        everything = [unit for piece in pieces for unit in piece.units]
        chosen = [piece for piece in pieces if piece in chosen]
    of = {part: [p for p in pieces if p.part == part] for part in ("instruction", "demonstration", "question")}
    parts = [
        ([unit for piece in of["instruction"] for unit in piece.units], shares.instruction),
        (
            [unit for piece in of["demonstration"] for unit in piece.units if unit.protected or piece in chosen],
            shares.demonstrations,
        ),
        ([unit for piece in of["question"] for unit in piece.units], shares.question),
    ]
    weights = {}
    if settings.rank_delta and chosen:
        rates = rates_by_rank(chosen, shares.demonstrations, settings.rank_delta)
        weights = {piece.units[0].piece: rate for piece, rate in zip(chosen, rates, strict=True)}
    if scores_units(settings) and chosen:
        kept = take_ranked(lm, prompt, settings, parts, chosen, weights, separator, alone=alone)
    else:
        kept = compress_parts(lm, parts, separator, settings.segment_size, weights)
    outside = sorted(of["demonstration"], key=lambda piece: -piece.perplexity)
    spare = [unit for piece in outside for unit in piece.units if unit.segment is None]
    final = enforce(everything, kept, spare, budget, count, settings.separator)
    text = write(final, settings.separator)
    stays = {id(unit) for unit in final}
    return Answer(
        text,
        total,
        count(text),
        tuple(piece.index for piece in chosen),
        everything,
        [id(unit) in stays for unit in everything],
    )

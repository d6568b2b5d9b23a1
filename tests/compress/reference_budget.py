"""Section 1 of docs/algorithm.md for the brute-force reference: the budget controller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reference_pieces import Piece, Unit

RATED = ("instruction", "question")


@dataclass
class Shares:
    """Budgets of the three parts, in free tokens."""

    instruction: int
    demonstrations: int
    question: int


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def control_budget(
    pieces: list[Piece],
    target: int,
    separator: int,
    settings: Any,
    read: Callable[[Piece], None],
    pinned: Sequence[int] = (),
) -> tuple[list[Piece], Shares]:
    """The selected demonstrations in source order, and the budgets; ``read`` sets a demonstration's perplexity."""
    demonstrations = [piece for piece in pieces if piece.part == "demonstration"]
    ins = sum(piece.free for piece in pieces if piece.part == "instruction")
    que = sum(piece.free for piece in pieces if piece.part == "question")
    dems = sum(piece.free for piece in demonstrations)
    charged = sum(unit.cost for piece in pieces for unit in piece.units if unit.protected)
    tau_ins, tau_que, k = settings.instruction_rate, settings.question_rate, settings.k
    need = tau_ins * ins + tau_que * que

    def room(chosen: list[Piece]) -> int:
        part_takers = [
            piece
            for piece in pieces
            if piece.part != "demonstration" or piece in chosen or any(unit.protected for unit in piece.units)
        ]
        return max(0, target - charged - separator * max(0, len(part_takers) - 1))

    tau_dems = max(0.0, (target - charged - need) / dems) if dems and settings.anchor < 1 else 0.0
    if dems:
        for piece in demonstrations:
            read(piece)
    chosen: list[Piece] = []
    whole = settings.unit == "demonstration"
    ranked = sorted(demonstrations, key=lambda piece: -piece.perplexity)  # stable: of equals, the earlier first
    if whole:
        for piece in sorted(ranked, key=lambda piece: (0, piece.index) if piece.index in pinned else (1, 0)):
            wider = [*chosen, piece]
            if tau_dems > 0 and piece.free and sum(d.free for d in wider) <= room(wider) - need:
                chosen.append(piece)
        ranked = []
    for piece in demonstrations:
        if not whole and tau_dems > 0 and piece.free and piece.index in pinned:
            chosen.append(piece)
    for piece in ranked:
        fits = sum(d.free for d in chosen) <= k * tau_dems * dems
        if tau_dems > 0 and piece.free and piece not in chosen and fits:
            chosen.append(piece)
    while not whole and chosen and room(chosen) - need < len(chosen):
        chosen.pop()
    return [piece for piece in demonstrations if piece in chosen], share(
        room(chosen), need, ins, que, chosen, tau_dems * dems, settings
    )


def share(room: int, need: float, ins: int, que: int, chosen: list[Piece], coarse: float, settings: Any) -> Shares:
    """Step 6. ``coarse`` is tau_dems * L_dems."""
    length = sum(piece.free for piece in chosen)
    if not chosen and room < need:
        b_ins = round_half_up(room * (settings.instruction_rate * ins) / need)
        b_que = room - b_ins
        if b_ins > ins:
            b_ins, b_que = ins, b_que + b_ins - ins
        if b_que > que:
            b_ins, b_que = min(ins, b_ins + b_que - que), que
        return Shares(b_ins, 0, b_que)
    whole = bool(chosen) and settings.unit == "demonstration"
    delta = max(0.0, coarse - length / settings.k) if chosen else room - need
    if whole:
        delta = room - need - length
    extra = delta / (ins + que) if ins + que else 0.0
    b_ins = round_half_up(min(1.0, settings.instruction_rate + extra) * ins)
    b_que = round_half_up(min(1.0, settings.question_rate + extra) * que)
    b_dems = room - b_ins - b_que
    least = length if whole else 0
    if b_dems < least:
        from_que = min(b_que, least - b_dems)
        b_que -= from_que
        b_ins = max(0, b_ins - (least - b_dems - from_que))
        b_dems = least
    if b_dems > length:
        to_ins = min(b_dems - length, ins - b_ins)
        to_que = min(b_dems - length - to_ins, que - b_que)
        b_ins, b_que, b_dems = b_ins + to_ins, b_que + to_que, length
    return Shares(b_ins, b_dems, b_que)


def settle(
    pieces: list[Piece], prompt: Any, target: int, separator: int, settings: Any, over: Callable[[list[Unit]], int]
) -> Any:
    """The settings without None. Protects the instruction and the question, or the question, where §0 says so."""
    open_parts = [
        part
        for part, rate in (("question", settings.question_rate), ("instruction", settings.instruction_rate))
        if rate is None and not settings.ablations.uniform_rates
    ]
    settled = replace(
        settings,
        instruction_rate=0.85 if settings.instruction_rate is None else settings.instruction_rate,
        question_rate=0.9 if settings.question_rate is None else settings.question_rate,
    )
    everything = [unit for piece in pieces for unit in piece.units]
    while open_parts:
        tried = [unit for unit in everything if unit.protected or unit.part in open_parts]
        holders = {unit.piece for unit in tried} | {piece.units[0].piece for piece in pieces if piece.part in RATED}
        left = max(0, target - sum(unit.cost for unit in tried) - separator * max(0, len(holders) - 1))
        need = 0.0
        for part, rate in (("instruction", settled.instruction_rate), ("question", settled.question_rate)):
            need += rate * sum(unit.cost for unit in everything if unit.part == part and unit not in tried)
        if over(tried) <= 0 and left >= need:
            for unit in tried:
                unit.protected = True
            break
        open_parts.pop()
    if settled.anchor is None:
        words = [text.split()[0] for text in prompt.demonstrations if text.split()]
        opening = prompt.question.split()[:1]
        examples = len(words) >= 2 and set(words) == set(opening) and not opening[0].isalpha()
        settled = replace(settled, anchor=1.0 if examples and settings.ablations == type(settings.ablations)() else 0.0)
    return settled


def keep_anchor(
    pieces: list[Piece],
    target: int,
    separator: int,
    settings: Any,
    pinned: Sequence[int],
    over: Callable[[list[Unit]], int],
) -> None:
    """Protect demonstrations, unit by unit. ``over``: the excess of some units over the budget."""
    rates = {"instruction": settings.instruction_rate, "question": settings.question_rate}
    need = sum(rates[piece.part] * piece.free for piece in pieces if piece.part in rates)
    charged = [unit for piece in pieces for unit in piece.units if unit.protected]
    holders = {piece.part + str(piece.index) for piece in pieces if piece.part in rates or piece.free < len_of(piece)}
    left = max(0, target - sum(unit.cost for unit in charged) - separator * max(0, len(holders) - 1)) - need
    room = math.floor(settings.anchor * left)
    order = [piece for piece in reversed(pieces) if piece.part == "demonstration"]
    if settings.anchor_by == "shortest":
        order.sort(key=lambda piece: piece.free)
    order = [piece for piece in order if piece.index in pinned] + [p for p in order if p.index not in pinned]
    backwards = [unit for piece in order for unit in reversed(piece.units)]
    anchor: list[Unit] = []
    for unit in backwards:
        room -= 0 if unit.protected else unit.cost
        if unit.part + str(unit.index) not in holders:
            room -= separator
            holders.add(unit.part + str(unit.index))
        if room < 0:
            break
        anchor.append(unit)
    everything = [unit for piece in pieces for unit in piece.units]
    while anchor:
        excess = over([unit for unit in everything if unit.protected or unit in anchor])
        if excess <= 0:
            break
        anchor = anchor[: max(0, len(anchor) - excess)]
    for unit in anchor:
        unit.protected = True


def len_of(piece: Piece) -> int:
    return sum(unit.cost for unit in piece.units)

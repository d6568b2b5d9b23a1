"""Section 1 of docs/algorithm.md for the brute-force reference: the budget controller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reference_pieces import Piece


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

    tau_dems = max(0.0, (target - charged - need) / dems) if dems else 0.0
    if dems:
        for piece in demonstrations:
            read(piece)
    chosen: list[Piece] = []
    ranked = sorted(demonstrations, key=lambda piece: -piece.perplexity)  # stable: of equals, the earlier first
    for piece in demonstrations:
        if tau_dems > 0 and piece.free and piece.index in pinned:
            chosen.append(piece)
    for piece in ranked:
        fits = sum(d.free for d in chosen) <= k * tau_dems * dems
        if tau_dems > 0 and piece.free and piece not in chosen and fits:
            chosen.append(piece)
    while chosen and room(chosen) - need < len(chosen):
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
    delta = max(0.0, coarse - length / settings.k) if chosen else room - need
    extra = delta / (ins + que) if ins + que else 0.0
    b_ins = round_half_up(min(1.0, settings.instruction_rate + extra) * ins)
    b_que = round_half_up(min(1.0, settings.question_rate + extra) * que)
    b_dems = room - b_ins - b_que
    if b_dems < 0:
        from_que = min(b_que, -b_dems)
        b_que -= from_que
        b_ins = max(0, b_ins - (-b_dems - from_que))
        b_dems = 0
    if b_dems > length:
        to_ins = min(b_dems - length, ins - b_ins)
        to_que = min(b_dems - length - to_ins, que - b_que)
        b_ins, b_que, b_dems = b_ins + to_ins, b_que + to_que, length
    return Shares(b_ins, b_dems, b_que)

"""Section 1 of docs/algorithm.md for the brute-force reference: the budget controller."""

from __future__ import annotations

import math
import re
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
    if settled.anchor is not None and settled.anchor_by == "auto":
        settled = replace(settled, anchor_by="shortest")
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
    if settings.anchor_by != "last":
        order.sort(key=lambda piece: piece.free)
    order = [piece for piece in order if piece.index in pinned] + [p for p in order if p.index not in pinned]
    if settings.anchor_by == "auto":
        prices = {id(p): p.free + (0 if p.part + str(p.index) in holders else separator) for p in order}
        question = "".join(piece.text for piece in pieces if piece.part == "question")
        order = most_useful_first(order, prices, question, room, pinned)
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


def most_useful_first(
    order: list[Piece], prices: dict[int, int], question: str, room: int, pinned: Sequence[int]
) -> list[Piece]:
    """Pinned examples, the most similar, one of each label, the others. ``order``: pinned ones, then the shortest."""
    examples = sorted((piece for piece in order if piece.text.strip()), key=lambda piece: piece.index)
    names = {id(piece): label_of(piece.text) for piece in examples}
    distinct = set(names.values())
    if not all(distinct) or len(distinct) < 2 or len(distinct) == len(examples):
        names, distinct = {}, set()

    def completed(some: list[Piece]) -> list[Piece]:
        full = list(some)
        for piece in order:
            name = names.get(id(piece))
            if name is not None and all(names.get(id(other)) != name for other in full):
                full.append(piece)
        return full

    def price(some: list[Piece]) -> int:
        return sum(prices[id(piece)] for piece in some)

    front = [piece for piece in order if piece.index in pinned]
    scores = similarities(question, [piece.text for piece in examples])
    if scores and max(scores) > 0:
        best = [piece for piece, score in zip(examples, scores, strict=True) if score == max(scores)][-1]
        alone = price(completed(front)) > room >= price([*front, best])
        if best not in front and (alone or price(completed([*front, best])) <= room):
            front = [*front, best]
    front = completed(front)
    return front + [piece for piece in order if piece not in front]


def label_of(text: str) -> str:
    line = text.strip().split("\n")[-1] + " "
    start = 0
    for at in range(1, len(line) + 1):
        head = line[:at]
        sign = head[-1] == "：" or (head[-1].isspace() and head[-2:-1] in tuple(":=>→|"))
        verb = head[-1].isspace() and re.search(r"(^|\W)is$", head[:-1])
        if sign or verb:
            start = at
    label = line[start:].strip(" \t\r.!").casefold()
    return label if len(label.split()) < 4 else ""


def similarities(question: str, texts: list[str]) -> list[float]:
    """Cosines of sets of words, but for the length of the question's."""
    sets = [words_of(text) for text in texts]
    asked = words_of(question)
    scores = []
    for mine in sets:
        weights = {word: math.log(len(texts) / sum(word in other for other in sets)) ** 2 for word in mine}
        shared = math.fsum(weight for word, weight in weights.items() if word in asked)
        scores.append(shared / math.sqrt(math.fsum(weights.values())) if shared else 0.0)
    return scores


def words_of(text: str) -> set[str]:
    spaced = ""
    for c in text.casefold():
        if "\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff":
            spaced += f" {c} "
        else:
            spaced += c if c.isalnum() and not c.isdecimal() else " "
    return set(spaced.split())


def len_of(piece: Piece) -> int:
    return sum(unit.cost for unit in piece.units)

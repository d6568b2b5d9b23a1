"""Section 5 of docs/algorithm.md for the brute-force reference: units scored by a utility head, a pass for each.

Nothing of ``terselm.compress`` but the rule of thumb that says what is cut into lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from reference_pieces import Piece, cut_by_rule, cut_into_units, tokenise

from terselm.compress.context import unit_kind


def score_utilities(lm: Any, prompt: Any, settings: Any, pieces: Sequence[Piece], *, capped: bool) -> None:
    """Set the utility of each unit of the demonstrations, and the best of them as their demonstration's perplexity.

    Args:
        pieces: all pieces of the prompt.
        capped: nobody asked for ranking by utility, so no more than the question's last 256 tokens are read.
    """
    by_unit = settings.unit in ("auto", "sentence", "line") and not settings.contrast
    demonstrations = [piece for piece in pieces if piece.part == "demonstration"]
    if len(demonstrations) < (1 if by_unit else 2):
        return
    question = question_ids(lm, prompt.ranked_for or prompt.question)
    if capped:
        longest = min(256, lm.window - 1 - lm.window // 2)
        question = question[-longest:] if longest else []
    separator = [i for i, _, _ in tokenise(lm.tokenizer, settings.separator)]
    whole: list[int] = []
    units: list[tuple[Piece, str, int, Any]] = []  # with the place of the last token
    for piece in demonstrations:
        whole += separator if piece is not demonstrations[0] else []
        cut = [(unit.text, unit.ids, unit) for unit in piece.units]
        if not by_unit:
            tokens = cut_into_units(tokenise(lm.tokenizer, piece.text), len(piece.text))
            spans = cut_by_rule(piece.text, tokens, unit_kind(piece.text))
            cut = [(piece.text[start:end], ids, None) for ids, start, end in spans]
        for text, ids, unit in cut:
            whole += ids
            units.append((piece, text, len(whole) - 1, unit))
    scores: dict[int, list[tuple[bool, float]]] = {}
    for piece, text, place, unit in units:
        score = score_of(lm, question, whole, place)
        scores.setdefault(id(piece), []).append((bool(text.strip(" \n\t\r[]{}(),")), score))
        if unit is not None:
            unit.utility = score
    for piece in demonstrations:
        mine = scores[id(piece)]
        piece.perplexity = max(score for speaks, score in mine if speaks or not any(some for some, _ in mine))


def question_ids(lm: Any, asks: str) -> list[int]:
    if not asks.strip():
        return []
    bare = re.sub(r"^\s*question\s*:\s*|\n\s*answer\s*:?\s*$", "", asks, flags=re.IGNORECASE).strip() or asks
    return [i for i, _, _ in tokenise(lm.tokenizer, f"Question: {bare}\n\n")]


def score_of(lm: Any, question: list[int], whole: list[int], place: int) -> float:
    """Of the unit whose last token is ``whole[place]``, in the first window that holds it."""
    room = lm.window - 1 - len(question)
    begin = 0
    while begin + room <= place:
        begin += room - room // 2
    ids = torch.tensor([[lm.start_id, *question, *whole[begin : place + 1]]])
    assert ids.shape[1] <= lm.window
    with torch.no_grad():
        state = lm.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
        return float(state.double() @ lm.utility.weight.double() + lm.utility.bias.double())

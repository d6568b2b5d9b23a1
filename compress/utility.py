"""How the small LM reads a prompt to score its units: the question, then the demonstrations, in one pass.

The state of a unit's last token scores it, so every unit is seen after the question and all that stands before it.
Training reads labelled prompts in the same way (docs/algorithm.md, §5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.ranking import bare_question
from terselm.errors import ContextLengthError

if TYPE_CHECKING:
    from terselm.statistics import Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class UtilityWindow:
    """What is read in one pass. A prompt that does not fit has several, which overlap by half.

    Attributes:
        ids: ``(T,)``, the question, then the demonstrations or a stretch of them; without the start token, which is
            read before.
        units: ``(n,)``, numbers of the units whose scores are taken from this window, ascending: those that end in it,
            and in no earlier one, so that each has as much before it as may be.
        ends: ``(n,)``, the place in ``ids`` of the last token of each.
    """

    ids: Ints
    units: Ints
    ends: Ints


def question_before(question: str) -> str:
    """What stands before the demonstrations: the question without its labels; nothing where there is none."""
    return f"Question: {bare_question(question)}\n\n" if question.strip() else ""


def longest_question(window: int) -> int:
    """The most tokens of a question that leave half of the model's window to the demonstrations."""
    return window - 1 - max(1, window // 2)


def utility_windows(
    question: Ints, pieces: Sequence[Ints], ends: Sequence[Ints], separator: Ints, window: int
) -> list[UtilityWindow]:
    """The windows in which a prompt is read; those in which no unit is scored are left out.

    Args:
        question: tokens of `question_before`, ``(Q,)``; may be empty.
        pieces: of each demonstration its tokens, ``(T_p,)``, each tokenised by itself.
        ends: of each demonstration the place in its tokens of the last token of each of its units, ascending. Units
            are numbered through all demonstrations.
        separator: tokens between two demonstrations.
        window: the most tokens that the model reads at once, start token included.

    Raises:
        ContextLengthError: a question that leaves less than half of the window.
    """
    if len(question) > longest_question(window):
        raise ContextLengthError(
            f"the question has {len(question)} tokens, which leaves less than half of the model's window of {window} "
            f"to the rest of the prompt; shorten it to {max(0, longest_question(window))} tokens"
        )
    text, places = _joined(pieces, ends, separator)
    room = window - 1 - len(question)
    step = room - room // 2
    first = np.maximum(0, -((room - 1 - places) // step))  # the first window that holds each unit's end
    windows = []
    for number in np.unique(first).tolist():
        units = np.flatnonzero(first == number)
        begin = number * step
        ids = np.concatenate([question, text[begin : begin + room]])
        windows.append(UtilityWindow(ids=ids, units=units, ends=places[units] - begin + len(question)))
    return windows


def _joined(pieces: Sequence[Ints], ends: Sequence[Ints], separator: Ints) -> tuple[Ints, Ints]:
    """All demonstrations with separators between them, and the place there of each unit's last token."""
    nothing = np.zeros(0, dtype=np.int64)
    tokens, places = [nothing], [nothing]
    begin = 0
    for number, (ids, its) in enumerate(zip(pieces, ends, strict=True)):
        if number:
            tokens.append(separator)
            begin += len(separator)
        tokens.append(ids)
        places.append(its + begin)
        begin += len(ids)
    return np.concatenate(tokens), np.concatenate(places)

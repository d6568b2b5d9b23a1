"""Answers that are not fit to learn from: empty, caught in a loop, or copied from the template's worked examples.

A loop is told by words, with digits counted as equal, so that a numbered list of one sentence is one. It does not
know whether an answer is right.
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum

_LEAST_LOOP = 12
"""Words that a loop must cover to be one; and the least length of a passage that may not stand twice in a row."""
_LEAST_LOOP_CHARS = 40
_LEAST_LINE = 4
"""Words of a line or sentence that may not occur ``_MOST_LINES`` times."""
_MOST_LINES = 4
_SHINGLE = 5
"""Words in a row that count as copied if the template has them too."""
_MOST_COPIED = 0.4


class Fault(StrEnum):
    """Why an answer is not kept as it came."""

    EMPTY = "empty"
    LOOP = "loop"
    COPY = "copy"


def find_fault(text: str, template: str) -> Fault | None:
    """The fault of an answer, if it has one.

    Args:
        text: the answer.
        template: the prompt template, with its worked examples and without the prompt.
    """
    if not re.search(r"\w", text):
        return Fault.EMPTY
    if copied_share(text, template) > _MOST_COPIED:
        return Fault.COPY
    return Fault.LOOP if loop_start(text) is not None else None


def loop_start(text: str) -> int | None:
    """Where ``text`` begins to say again what it said before; None if it does not loop.

    ``text[:loop_start(text)]`` holds each repeated passage once.
    """
    starts = [cut for cut in (_word_loop(text), _character_loop(text), _line_loop(text)) if cut is not None]
    return min(starts, default=None)


def copied_share(text: str, source: str) -> float:
    """Share of the runs of five words of ``text`` that stand in ``source`` too; 0 if it has fewer words."""
    runs, known = _shingles(text), set(_shingles(source))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _word_loop(text: str) -> int | None:
    words = [(match.start(), re.sub(r"\d+", "0", match[0].casefold())) for match in re.finditer(r"\S+", text)]
    again = _periodic_tail([word for _, word in words], least=_LEAST_LOOP, once=_LEAST_LOOP)
    return None if again is None else words[again][0]


def _character_loop(text: str) -> int | None:
    return _periodic_tail(list(text.rstrip()), least=_LEAST_LOOP_CHARS, once=len(text))


def _periodic_tail(items: list[str], least: int, once: int) -> int | None:
    """Index at which the tail of ``items`` enters its second period.

    The tail must hold at least three periods and ``least`` items, or two periods of at least ``once`` items.
    """
    for period in range(1, len(items) // 2 + 1):
        same = 0  # items at the end that equal the one a period before
        while same < len(items) - period and items[-1 - same] == items[-1 - same - period]:
            same += 1
        if (same >= 2 * period and same + period >= least) or (same >= period >= once):
            return len(items) - same
    return None


def _line_loop(text: str) -> int | None:
    seen: Counter[str] = Counter()
    second: dict[str, int] = {}
    for match in re.finditer(r"[^\n.!?]+", text):
        words = re.findall(r"[^\W\d]+", match[0].casefold())
        line = " ".join(words)
        if len(words) >= _LEAST_LINE:
            seen[line] += 1
            if seen[line] == 2:
                second[line] = match.start()
    return min((start for line, start in second.items() if seen[line] >= _MOST_LINES), default=None)


def _shingles(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)]

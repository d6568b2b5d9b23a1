"""Answers that are not fit to learn from: empty, in a loop, copied from the template, or the prompt said again.

Repetition is told by words; the marks of a list do not count, so that a numbered list of one sentence is a loop. In
an answer that ran into the token limit, all numbers count as equal: a model that counts for ever loops too. Whether an
answer is right is not known here.
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum

_LEAST_LOOP = 12
"""Words that are said again before an answer counts as looping."""
_LEAST_LOOP_CHARACTERS = 40
_LEAST_LINE = 4
"""Words; shorter lines and sentences may come as often as they like (``return 0``, ``| yes | no |``)."""
_RUN = 5
"""Words in a row that count as copied if the other text has them too."""
_MOST_COPIED = 0.4
"""Largest share of an answer that may stand in the template."""
_ECHO_OF_ANSWER = 0.8
_ECHO_OF_PROMPT = 0.5
"""An answer is an echo if so much of it stands in the prompt, and it holds so much of the prompt: a quotation from a
long text is none."""
_LIST_MARK = re.compile(r"^\s*(?:\d+[.):]|[^\W\d_][.):]|[-*•|])(?=\s|$)", re.MULTILINE)


class Fault(StrEnum):
    """Why an answer is not kept as it came."""

    EMPTY = "empty"
    LOOP = "loop"
    COPY = "copy"
    ECHO = "echo"


def find_fault(text: str, prompt: str, template: str, *, unfinished: bool = False) -> Fault | None:
    """The fault of an answer, if it has one.

    Args:
        text: the answer.
        prompt: what was asked.
        template: what stood around the prompt, such as worked examples.
        unfinished: the answer ran into the token limit.
    """
    if not re.search(r"\w", text):
        return Fault.EMPTY
    if copied_share(text, template) > _MOST_COPIED:
        return Fault.COPY
    if copied_share(text, prompt) >= _ECHO_OF_ANSWER and copied_share(prompt, text) >= _ECHO_OF_PROMPT:
        return Fault.ECHO
    return Fault.LOOP if _loop_start(text, unfinished) is not None else None


def cut_loop(text: str, *, unfinished: bool = False) -> str:
    """``text`` up to where it begins to say again what it said before, at the end of a line or sentence if it can.

    Empty if that holds no letter.
    """
    start = _loop_start(text, unfinished)
    if start is None:
        return text
    kept = text[:start]
    ends = [match.end() for match in re.finditer(r"[^\s\d][.!?](?=\s|$)|(?=\n)", kept)]
    kept = (kept[: ends[-1]] if ends else kept).strip()
    return kept if re.search(r"[^\W\d_]", kept) else ""


def copied_share(text: str, source: str) -> float:
    """Share of the runs of five words of ``text`` that stand in ``source`` too; 0 if it has fewer words."""
    runs, known = _runs(text), set(_runs(source))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _loop_start(text: str, unfinished: bool) -> int | None:
    plain = _LIST_MARK.sub(lambda mark: " " * len(mark[0]), text)
    words = _split(r"\S+", plain, unfinished)
    starts = [
        _periodic_tail(words, least=_LEAST_LOOP),
        _periodic_tail(words[:-1], least=_LEAST_LOOP) if unfinished else None,  # the last word may be half a word
        _line_loop(plain, unfinished),
    ]
    if any(start is not None for start in starts):
        return min(start for start in starts if start is not None)
    # Script without spaces; and one word that never ends.
    characters = _split(r"\d+|\D" if unfinished else r"(?s:.)", plain, unfinished)
    return _periodic_tail(characters, least=_LEAST_LOOP_CHARACTERS)


def _split(pattern: str, text: str, equal_numbers: bool) -> list[tuple[int, str]]:
    """Each match, without regard to case, with its place in the text."""
    matches = ((match.start(), match[0].casefold()) for match in re.finditer(pattern, text))
    return [(start, re.sub(r"\d+", "0", item) if equal_numbers else item) for start, item in matches]


def _periodic_tail(items: list[tuple[int, str]], least: int) -> int | None:
    """Place at which the tail of ``items`` enters its second period.

    It must hold three periods, and say at least ``least`` items again.
    """
    for period in range(1, len(items) // 3 + 1):
        same = 0  # items at the end that equal the one a period before
        while same < len(items) - period and items[-1 - same][1] == items[-1 - same - period][1]:
            same += 1
        if same >= max(least, 2 * period):
            return items[len(items) - same][0]
    return None


def _line_loop(text: str, equal_numbers: bool) -> int | None:
    """Start of the second of several lines or sentences that are the same, wherever they stand."""
    seen: Counter[str] = Counter()
    second: dict[str, int] = {}
    for start, line in _split(r"[^\n.!?]+", text, equal_numbers):
        words = re.findall(r"\w+", line)
        key = " ".join(words)
        seen[key] += len(words)
        if len(words) >= _LEAST_LINE and seen[key] == 2 * len(words):
            second[key] = start
    again = [start for key, start in second.items() if seen[key] - len(key.split()) >= _LEAST_LOOP]
    return min(again, default=None)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]

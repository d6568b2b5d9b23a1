"""From rows of any source to prompts whose units can be labelled with their utility.

Prompts are cut as for ranking, but not too finely: the units are those that demonstrations are ranked by
(docs/algorithm.md, §5), sentences or lines, each with what it belongs to. They are cut at characters, so that labels
suit every small LM's tokens.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from terselm.compress.context import in_context, unit_kind
from terselm.compress.layout import cut_units, merge_lines, merge_sentences
from terselm.compress.prompt import Prompt
from terselm.compress.settings import UnitKind
from terselm.data.collection.label_plan import PromptToLabel
from terselm.data.rows import Json, each_once, read_rows
from terselm.data.utility import MOST_UNITS, CutPrompt, Unit
from terselm.errors import DataFormatError, PromptError

_APART = 3  # times as long a pair counts that does not belong together


@dataclass
class _Group:
    """Neighbouring units of a demonstration that became one.

    Attributes:
        first, end: numbers of its first unit, and of the one after its last.
        left, right: numbers of the groups beside it in its demonstration; −1 for none.
        span: its demonstration, first character, and the one after its last.
        parent: the unit that its first unit belongs to; −1 for none.
    """

    first: int
    end: int
    left: int
    right: int
    span: Unit
    parent: int


def label_units(prompt: Prompt, most: int = MOST_UNITS) -> CutPrompt:
    """Cut the demonstrations of a prompt into sentences or lines.

    Where that makes more than ``most`` units, neighbours in a demonstration become one, those first that are shortest
    together, and rather a line with what belongs to it, or with its like, than with what comes after these. What the
    prompt is ranked for is taken for its question.

    Raises:
        PromptError: there is one unit only, or none.
    """
    units: list[Unit] = []
    parents: list[int] = []
    for number, text in enumerate(prompt.demonstrations):
        spans = cut_text(text)
        seen = in_context(text, [text[start:end] for start, end in spans])
        parents += [-1 if one.parent is None else len(units) + one.parent for one in seen]
        units += [(number, start, end) for start, end in spans]
    if len(units) < 2:
        raise PromptError(
            f"the demonstrations hold {'one unit only' if units else 'no text'}; a utility needs two sentences or "
            "lines at least, which can be kept without each other"
        )
    merged, owners = _merged(units, parents, most)
    return CutPrompt(
        instruction=prompt.instruction,
        demonstrations=tuple(prompt.demonstrations),
        question=prompt.asks,
        units=tuple(merged),
        parents=tuple(owners),
    )


def read_prompts_to_label(source: str | Path) -> list[PromptToLabel]:
    """Read prompts from rows of any source (see `read_rows`) and cut them.

    A row has a prompt in one of the forms of ``compress-file``, and perhaps an ``id``, and an ``answer`` or a list of
    ``answers``, of which the first is taken.

    Raises:
        ConfigError: a package is missing, or the data set cannot be loaded.
        DataFormatError: a bad row, an id that came before, or no rows.
    """
    return each_once(source, _prompts(source), "prompts")


def _prompts(source: str | Path) -> Iterator[tuple[int, PromptToLabel]]:
    from terselm.compress.bulk.rows import prompt_of  # with which torch comes

    for number, row in read_rows(source):
        try:
            prompt = label_units(prompt_of(row))
            one = PromptToLabel(id=str(row.get("id", number)), prompt=prompt, answer=_answer(row))
        except (PromptError, ValueError) as error:
            raise DataFormatError(source, number, str(error)) from None
        yield number, one


def _answer(row: Json) -> str | None:
    answers = row.get("answers")
    if row.get("answer") is not None:
        answers = [row["answer"]]
    if answers is None:
        return None
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
        raise ValueError(f"the answer is {json.dumps(answers)[:60]}; expected a text, or none for the target's own")
    if not answers[0].strip():
        raise ValueError("the answer is empty; leave it out for what the target itself says to the whole prompt")
    return answers[0]


def cut_text(text: str) -> list[tuple[int, int]]:
    """The characters of each sentence, or of each line of data, code or logs: first, and the one after the last."""
    characters = cut_units(range(len(text)), [(place, place + 1) for place in range(len(text))], text)
    merge = merge_lines if unit_kind(text) is UnitKind.LINE else merge_sentences
    return list(pairwise(merge(characters, text).bounds.tolist()))


def _merged(units: Sequence[Unit], parents: Sequence[int], most: int) -> tuple[list[Unit], list[int]]:
    """As many neighbours as need be are one unit; a demonstration remains one at least."""
    groups = _groups(units, parents)
    alive = set(range(len(groups)))
    waiting = [_joint(groups, left) for left in alive if groups[left].right >= 0]
    heapq.heapify(waiting)
    while len(alive) > most and waiting:
        size, left, end = heapq.heappop(waiting)
        mine = groups[left]
        if left not in alive or mine.right < 0 or _joint(groups, left) != (size, left, end):
            continue  # one of the two has grown since
        other = groups[mine.right]
        alive.remove(mine.right)
        span = (*mine.span[:2], other.span[2])
        groups[left] = replace(mine, end=other.end, right=other.right, span=span)
        if other.right >= 0:
            groups[other.right].left = left
            heapq.heappush(waiting, _joint(groups, left))
        if mine.left >= 0:
            heapq.heappush(waiting, _joint(groups, mine.left))
    kept = [groups[number] for number in sorted(alive)]
    place = {unit: number for number, group in enumerate(kept) for unit in range(group.first, group.end)}
    return [group.span for group in kept], [_parent(group, parents, place) for group in kept]


def _groups(units: Sequence[Unit], parents: Sequence[int]) -> list[_Group]:
    """Each unit by itself."""
    last = len(units) - 1
    return [
        _Group(
            first=number,
            end=number + 1,
            left=number - 1 if number and units[number - 1][0] == unit[0] else -1,
            right=number + 1 if number < last and units[number + 1][0] == unit[0] else -1,
            span=unit,
            parent=parents[number],
        )
        for number, unit in enumerate(units)
    ]


def _joint(groups: Sequence[_Group], left: int) -> tuple[int, int, int]:
    """How much speaks against joining a group with the one to its right; which it is; the end of both, in units."""
    mine, other = groups[left], groups[groups[left].right]
    related = other.parent == mine.parent or other.parent >= mine.first
    return (other.span[2] - mine.span[1]) * (1 if related else _APART), left, other.end


def _parent(group: _Group, parents: Sequence[int], place: dict[int, int]) -> int:
    """The group that the first of a group's units belongs to that belongs to another."""
    outside = (parents[unit] for unit in range(group.first, group.end) if 0 <= parents[unit] < group.first)
    return next((place[parent] for parent in outside), -1)

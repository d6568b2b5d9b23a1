"""What a sentence or line belongs to: its heading, the key it stands under, the head of its table or hunk.

A line of nested data says little by itself. So it is ranked as it reads after the lines that it belongs to, and is not
kept without them (docs/algorithm.md, §5). Plain rules on indentation and first characters; no parser, so that broken
or cut off output is read as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from terselm.compress.settings import UnitKind

_PROSE = re.compile(  # six words in a row, or an end such as sentences have
    r"[^\W\d_]{2,}(?:[ ,;:'’\"”)(–—-]+[^\W\d_]+){5}|[.!?…。！？][\"'”’)\]」』]*\s*$"
)
_MARKUP = re.compile(r"^\s*(?:[\[{}\])<|@+]|[\w.\"'-]+\s*[:=]\s|\d[\d:.T/-]{3,}|at\s|File\s\")|[{};,|\\>]\s*$|\s{3,}\S")
_TITLE = re.compile(r"^\s*(?:[A-Z][a-z]+ )?\[?\d*\]?\s*\(\s*[Tt]itle:\s*([^\n]{1,200}?)\)\s")
_HEADING = re.compile(r"^\s*(#{1,6})\s+\S")
_TABLE_ROW = re.compile(r"^\s*\|")
_HUNK = re.compile(r"^@@ ")
_DIFF_FILE = re.compile(r"^(?:diff --git |\+\+\+ )")
_IN_HUNK = re.compile(r"^[ +\-\\]")
_BRACKETS = re.compile(r"^[\s\[\]{}(),]*$")
_HEADING_WORDS = 12


@dataclass(frozen=True)
class InContext:
    """One unit with what it belongs to.

    Attributes:
        text: to be ranked: the unit after the lines that it belongs to.
        parent: the number of the unit that it is not kept without, an earlier one; None for none.
        says_something: it is more than brackets and white space.
    """

    text: str
    parent: int | None
    says_something: bool = True


def unit_kind(text: str) -> UnitKind:
    """`UnitKind.LINE` for text most of whose lines are data, code or log entries; else `UnitKind.SENTENCE`."""
    lines = [line for line in text.split("\n") if line.strip() and not _HEADING.match(line)]
    of_data = sum(bool(_MARKUP.search(line)) or not _PROSE.search(line) for line in lines)
    return UnitKind.LINE if len(lines) > 2 and 2 * of_data > len(lines) else UnitKind.SENTENCE


def in_context(text: str, units: Sequence[str]) -> list[InContext]:
    """Each unit with what it belongs to.

    Args:
        text: a demonstration.
        units: the sentences or lines that it consists of, in order.
    """
    title = _TITLE.match(text)
    shown_title = f"({title[1].strip()})" if title else ""
    lines = _as_lines(text, units)
    parents = _parents(lines, prose=unit_kind(text) is UnitKind.SENTENCE)
    seen: list[InContext] = []
    for number, (unit, parent) in enumerate(zip(units, parents, strict=True)):
        opening = [shown_title] if shown_title and number else []
        text_in_context = " ".join([*opening, *_above(number, parents, units), unit.strip()])
        seen.append(InContext(text_in_context, parent, says_something=says_something(unit)))
    return seen


def says_something(unit: str) -> bool:
    """Whether a unit is more than brackets and white space."""
    return not _BRACKETS.match(unit)


@dataclass(frozen=True)
class _Line:
    """A unit from the start of its line on: tokens often join a line end with the indentation after it.

    Attributes:
        text: with the indentation, where the unit is the first of its line.
        is_first: whether it is.
    """

    text: str
    is_first: bool

    @property
    def indentation(self) -> int:
        return len(self.text) - len(self.text.lstrip())


def _as_lines(text: str, units: Sequence[str]) -> list[_Line]:
    lines = []
    begin = 0
    for unit in units:
        before = text[text.rfind("\n", 0, begin) + 1 : begin]
        is_first = not before.strip()
        lines.append(_Line(f"{before}{unit}".lstrip("\r\n") if is_first else unit, is_first))
        begin += len(unit)
    return lines


def _above(number: int, parents: Sequence[int | None], units: Sequence[str]) -> list[str]:
    """What the unit's ancestors say, the outermost first; brackets alone say nothing."""
    texts: list[str] = []
    parent = parents[number]
    while parent is not None:
        if not _BRACKETS.match(units[parent]):
            texts.append(units[parent].strip().rstrip("{[(,").rstrip())
        parent = parents[parent]
    return texts[::-1]


def _parents(lines: Sequence[_Line], *, prose: bool) -> list[int | None]:
    """The unit that each belongs to."""
    parents = _by_indentation(lines)
    for rule in (_of_tables, _of_headings if prose else _of_diff):
        parents = [own if other is None else other for own, other in zip(parents, rule(lines), strict=True)]
    return parents


def _by_indentation(lines: Sequence[_Line]) -> list[int | None]:
    """The last line before that is indented less; of members of a nameless object, the first of them."""
    parents: list[int | None] = []
    open_lines: list[tuple[int, int]] = []  # (indentation, number), each deeper than the one before
    first_member: dict[int, int] = {}
    for number, line in enumerate(lines):
        if not line.text.strip() or not line.is_first:  # a later sentence of a line belongs where that line does
            parents.append(parents[-1] if parents else None)
            continue
        while open_lines and open_lines[-1][0] >= line.indentation:
            open_lines.pop()
        parent = open_lines[-1][1] if open_lines else None
        open_lines.append((line.indentation, number))
        if parent is not None and parents[parent] is not None and _BRACKETS.match(lines[parent].text):
            label = parent if _BRACKETS.match(line.text) else first_member.setdefault(parent, number)
            parent = parent if label == number else label
        parents.append(parent)
    return parents


def _of_diff(lines: Sequence[_Line]) -> list[int | None]:
    """Lines of a hunk belong to its head, and that to its file."""
    file = hunk = None
    parents: list[int | None] = []
    for number, line in enumerate(lines):
        if _DIFF_FILE.match(line.text):
            parents.append(None)
            file, hunk = number, None
        elif _HUNK.match(line.text):
            parents.append(file)
            hunk = number
        else:
            parents.append(hunk if _IN_HUNK.match(line.text) else None)
    return parents


def _of_tables(lines: Sequence[_Line]) -> list[int | None]:
    """Rows of a Markdown table belong to its head."""
    head = None
    parents: list[int | None] = []
    for number, line in enumerate(lines):
        if not _TABLE_ROW.match(line.text):
            head = None
        parents.append(head)
        if head is None and _TABLE_ROW.match(line.text):
            head = number
    return parents


def _of_headings(lines: Sequence[_Line]) -> list[int | None]:
    """What follows a Markdown heading, or a short first line without an end, belongs to it."""
    levels: list[tuple[int, int]] = []  # (level, number)
    opens_with_heading = len(lines) > 1 and _is_heading_line(lines[0].text)
    parents: list[int | None] = []
    for number, line in enumerate(lines):
        heading = _HEADING.match(line.text) if line.is_first else None
        level = len(heading[1]) if heading else 0 if opens_with_heading and not number else 7
        while levels and levels[-1][0] >= level:
            levels.pop()
        parents.append(levels[-1][1] if levels else None)
        if level < 7:
            levels.append((level, number))
    return parents


def _is_heading_line(unit: str) -> bool:
    text = unit.strip()
    ends = text.endswith((".", "!", "?", ";", ",", "。", "{", "[", "(", "}", "]", "|", ">"))
    plain = text[:1].isalpha() and not _MARKUP.search(text.removeprefix("Title: "))
    return "\n" in unit and plain and not ends and len(text.split()) <= _HEADING_WORDS

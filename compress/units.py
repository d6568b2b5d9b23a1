"""From tokens to units: the smallest spans of text that are kept or dropped (docs/algorithm.md, §0).

Knows offsets and arrays, not models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one piece.

    Attributes:
        ids: ``(n_tokens,)``, the piece's tokens.
        first: ``(n_units + 1,)``, where each unit's tokens start in `ids`; the last entry is n_tokens.
        bounds: ``(n_units + 1,)``, where each unit's characters start; they partition the piece's text.
    """

    ids: Ints
    first: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.first) - 1


def cut_units(ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> Units:
    """Group tokens so that the groups' character spans partition the text.

    Args:
        ids: the tokens of ``text``, none of them special.
        offsets: (start, end) of each token, in characters; end exclusive.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = spans[:, 0], spans[:, 1]
    if (ends > starts).all() and (starts[1:] >= ends[:-1]).all():
        first = np.arange(len(ids) + 1)
        last_char = ends
    else:
        first, last_char = _group(starts.tolist(), ends.tolist())
    bounds = np.concatenate([[0], last_char])  # characters between two units belong to the later one
    if len(bounds) > 1:
        bounds[-1] = len(text)
    return Units(ids=np.asarray(ids, dtype=np.int64), first=first, bounds=bounds)


def _group(starts: list[int], ends: list[int]) -> tuple[Ints, Ints]:
    """`Units.first`, and each unit's last character + 1, where tokens share characters or have none."""
    first: list[int] = []
    last: list[int] = []
    waiting: int | None = None  # first of the tokens without text that the next token takes along
    for token, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end <= start:
            waiting = token if waiting is None else waiting
        elif last and start < last[-1]:
            last[-1] = max(last[-1], end)
            waiting = None
        else:
            first.append(token if waiting is None else waiting)
            last.append(end)
            waiting = None
    if starts and not first:
        first, last = [0], [0]
    return np.array([*first, len(starts)] if starts else [0], dtype=np.int64), np.array(last, dtype=np.int64)


def merge_words(units: Units, text: str) -> Units:
    """Join the units of each whitespace-separated word."""
    pieces = [text[start:end] for start, end in pairwise(units.bounds.tolist())]
    begins: list[int] = []
    blank = [not piece.strip() for piece in pieces]
    for i, piece in enumerate(pieces):
        if i == 0 or (not blank[i - 1] and (piece[0].isspace() or pieces[i - 1][-1].isspace())):
            begins.append(i)
    if len(begins) > 1 and all(blank[begins[-1] :]):
        begins.pop()
    edges = np.array([*begins, len(pieces)], dtype=np.int64)
    return Units(ids=units.ids, first=units.first[edges], bounds=units.bounds[edges])


_LINE_END = r"\n(?:[^\S\n]*\n)*"
_LINES = re.compile(_LINE_END)
_SENTENCES = re.compile(  # its white space opens the next one: tokens begin with a space
    rf"""[.!?…]["'”’)\]]*(?=[^\S\n]+\S)|[。！？][”’」』）]*(?=[^\S\n]*\S)|{_LINE_END}"""
)


def merge_sentences(units: Units, text: str) -> Units:
    """Join the units of each sentence; a line ends one too."""
    return _merge(units, [match.end() for match in _SENTENCES.finditer(text)])


def merge_lines(units: Units, text: str) -> Units:
    """Join the units of each line; blank lines belong to the line before them."""
    return _merge(units, [match.end() for match in _LINES.finditer(text)])


def merge_all(units: Units, text: str) -> Units:
    """One unit."""
    return _merge(units, [])


def _merge(units: Units, starts: Sequence[int]) -> Units:
    """Join the units between two of ``starts`` (characters, ascending); a unit belongs where it begins."""
    if not len(units):
        return units
    group = np.searchsorted(np.asarray(starts, dtype=np.int64), units.bounds[:-1], side="right")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(units)]])
    return Units(ids=units.ids, first=units.first[edges], bounds=units.bounds[edges])

"""From texts to flat arrays: pieces are tokenised, cut into units (docs/algorithm.md, §0), and laid end to end.

A unit is the smallest span of text that is kept or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from terselm.compress.prompt import Part, Piece, Prompt
from terselm.compress.settings import CompressionSettings, UnitKind
from terselm.errors import PromptError

if TYPE_CHECKING:
    from terselm.statistics import Ints

Floats32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The units of all pieces, end to end.

    Attributes:
        pieces: the pieces that are not empty.
        edges: ``(n_pieces + 1,)``, where each piece's units start.
        ids: ``(n_tokens,)``.
        first: ``(n_units + 1,)``, where each unit's tokens start in `ids`.
        starts, ends: ``(n_units,)``, characters in the unit's piece.
        protected: ``(n_units,)``.
        separator: the text between pieces; separator_ids: its tokens.
    """

    pieces: Sequence[Piece]
    edges: Ints
    ids: Ints
    first: Ints
    starts: Ints
    ends: Ints
    protected: Mask
    separator: str
    separator_ids: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def cost(self) -> Ints:
        """``(n_units,)``, tokens in each unit."""
        return np.diff(self.first)

    @cached_property
    def piece_of(self) -> Ints:
        """``(n_units,)``, the number of each unit's piece."""
        return np.repeat(np.arange(len(self.pieces)), np.diff(self.edges))

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all pieces and of the separators between them."""
        return len(self.ids) + len(self.separator_ids) * max(0, len(self.pieces) - 1)

    def piece_ids(self, piece: int) -> Ints:
        low, high = self.first[self.edges[piece]], self.first[self.edges[piece + 1]]
        return self.ids[low:high]

    def numbers(self, part: Part) -> list[int]:
        """The numbers of the pieces of a part."""
        return [number for number, piece in enumerate(self.pieces) if piece.part is part]

    def units_of(self, pieces: Sequence[int], *, backwards: bool = False) -> Ints:
        """The numbers of the units of some pieces, one piece after the other; each from its end with ``backwards``."""
        step = -1 if backwards else 1
        return _concatenate([np.arange(self.edges[n], self.edges[n + 1])[::step] for n in pieces])

    def reordered(self, order: Sequence[int]) -> Layout:
        """The same pieces in another order, which names each once."""
        cuts = [slice(self.edges[n], self.edges[n + 1]) for n in order]
        tokens = [self.piece_ids(n) for n in order]
        begins = np.cumsum([0, *(len(ids) for ids in tokens)])
        first = [self.first[cut] - self.first[cut.start] + begin for cut, begin in zip(cuts, begins, strict=False)]
        return replace(
            self,
            pieces=[self.pieces[n] for n in order],
            edges=np.cumsum([0, *(cut.stop - cut.start for cut in cuts)]),
            ids=_concatenate(tokens),
            first=np.append(_concatenate(first), begins[-1]),
            starts=_concatenate([self.starts[cut] for cut in cuts]),
            ends=_concatenate([self.ends[cut] for cut in cuts]),
            protected=np.concatenate([self.protected[cut] for cut in cuts]),
        )

    def text(self, kept: Mask) -> str:
        """The text of some units, cut from the source. ``kept``: ``(n_units,)``."""
        units = np.flatnonzero(kept)
        if not len(units):
            return ""
        pieces = self.piece_of[units]
        turns = np.flatnonzero((np.diff(units) != 1) | (np.diff(pieces) != 0))  # runs of neighbours are cut in one go
        begins = units[np.concatenate([[0], turns + 1])]
        ends = units[np.concatenate([turns, [len(units) - 1]])]
        cuts: dict[int, list[str]] = {}
        for piece, start, end in zip(
            self.piece_of[begins].tolist(), self.starts[begins].tolist(), self.ends[ends].tolist(), strict=True
        ):
            cuts.setdefault(piece, []).append(self.pieces[piece].text[start:end])
        return self.separator.join("".join(texts) for texts in cuts.values())


class LayoutMaker:
    """Lays prompts out for one tokenizer under one set of settings.

    Args:
        backend: the tokenizer, as `plain_backend` gives it.
    """

    def __init__(self, backend: Any, settings: CompressionSettings) -> None:
        self._backend = backend
        self._unit = UnitKind.TOKEN if settings.unit is UnitKind.AUTO else settings.unit
        self._separator = settings.separator
        self._separator_ids = self._tokenise([settings.separator])[0].ids
        rates = {Part.INSTRUCTION: settings.instruction_rate, Part.QUESTION: settings.question_rate}
        self._protected_parts = [part for part, rate in rates.items() if rate == 1]

    def make(
        self,
        prompts: Sequence[Prompt],
        patterns: Sequence[re.Pattern[str]],
        kinds: Sequence[UnitKind] | None = None,
    ) -> list[Layout]:
        """One layout a prompt; each distinct text is tokenised once.

        Args:
            patterns: what must survive.
            kinds: of the units of each prompt's demonstrations (`UnitKind.AUTO`: as `unit_kind` finds them) where these
                are not the settings'.

        Raises:
            PromptError: a prompt is empty.
        """
        kinds = kinds or [self._unit] * len(prompts)
        pieces = [
            [(piece, _kind(piece, kind)) for piece in prompt.pieces()]
            for prompt, kind in zip(prompts, kinds, strict=True)
        ]
        units = self._cut(list(dict.fromkeys((piece.text, kind) for some in pieces for piece, kind in some)))
        return [
            self._layout([piece for piece, _ in some], [units[piece.text, kind] for piece, kind in some], patterns)
            for some in pieces
        ]

    def tokens_of(self, texts: Sequence[str]) -> list[Ints]:
        """The tokens of texts, none of them special."""
        return [units.ids for units in self._tokenise(texts)]

    def _cut(self, wanted: Sequence[tuple[str, UnitKind]]) -> dict[tuple[str, UnitKind], Units]:
        """The units of each text."""
        texts = list(dict.fromkeys(text for text, _ in wanted))
        tokens = dict(zip(texts, self._tokenise(texts), strict=True))
        return {
            (text, kind): _MERGE[kind](tokens[text], text) if kind in _MERGE else tokens[text] for text, kind in wanted
        }

    def _tokenise(self, texts: Sequence[str]) -> list[Units]:
        if not texts:
            return []
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            cut_units(encoding.ids, encoding.offsets, text) for encoding, text in zip(encodings, texts, strict=True)
        ]

    def _layout(self, pieces: Sequence[Piece], units: Sequence[Units], patterns: Sequence[re.Pattern[str]]) -> Layout:
        """Lay the units of all pieces end to end and mark the protected ones."""
        present = [(piece, cut) for piece, cut in zip(pieces, units, strict=True) if len(cut)]
        if not present:
            raise PromptError("the prompt is empty; give an instruction, demonstrations or a question")
        tokens = np.cumsum([0, *(len(cut.ids) for _, cut in present)])
        return Layout(
            pieces=[piece for piece, _ in present],
            edges=np.cumsum([0, *(len(cut) for _, cut in present)]),
            ids=_concatenate([cut.ids for _, cut in present]),
            first=np.append(
                _concatenate([cut.first[:-1] + begin for (_, cut), begin in zip(present, tokens, strict=False)]),
                tokens[-1],
            ),
            starts=_concatenate([cut.bounds[:-1] for _, cut in present]),
            ends=_concatenate([cut.bounds[1:] for _, cut in present]),
            protected=np.concatenate([self._protected(piece, cut, patterns) for piece, cut in present]),
            separator=self._separator,
            separator_ids=self._separator_ids,
        )

    def _protected(self, piece: Piece, units: Units, patterns: Sequence[re.Pattern[str]]) -> Mask:
        mask = np.full(len(units), piece.part in self._protected_parts)
        for start, end in (match.span() for pattern in patterns for match in pattern.finditer(piece.text)):
            if start < end:
                low = np.searchsorted(units.bounds, start, side="right") - 1
                mask[low : np.searchsorted(units.bounds, end, side="left")] = True
        return mask


def _kind(piece: Piece, kind: UnitKind) -> UnitKind:
    """How a piece is cut where demonstrations are cut into ``kind``."""
    if piece.part is not Part.DEMONSTRATION:
        return kind if kind is UnitKind.TOKEN else UnitKind.WORD
    if kind is not UnitKind.AUTO:
        return kind
    from terselm.compress.context import unit_kind  # where there is a question to rank for

    return unit_kind(piece.text)


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


_MERGE = {
    UnitKind.WORD: merge_words,
    UnitKind.SENTENCE: merge_sentences,
    UnitKind.LINE: merge_lines,
    UnitKind.DEMONSTRATION: merge_all,
}


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])

"""One prompt as flat arrays: tokens, units, pieces, in the order instruction, demonstrations, question."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from terselm.compress.prompt import Part, Piece
from terselm.compress.protect import protected_spans
from terselm.compress.units import Ints, Units

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

    def free_tokens(self, piece: int) -> int:
        """Tokens of a piece that are not protected."""
        units = slice(self.edges[piece], self.edges[piece + 1])
        return int(self.cost[units][~self.protected[units]].sum())

    def holds_protected(self, piece: int) -> bool:
        return bool(self.protected[self.edges[piece] : self.edges[piece + 1]].any())

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


def build_layout(
    pieces: Sequence[Piece],
    units: Sequence[Units],
    *,
    patterns: Sequence[re.Pattern[str]],
    protected_parts: Collection[Part],
    separator: str,
    separator_ids: Sequence[int],
) -> Layout:
    """Lay the units of all pieces end to end and mark the protected ones."""
    present = [(piece, cut) for piece, cut in zip(pieces, units, strict=True) if len(cut)]
    lengths = [len(cut) for _, cut in present]
    tokens = np.cumsum([0, *(len(cut.ids) for _, cut in present)])
    return Layout(
        pieces=[piece for piece, _ in present],
        edges=np.cumsum([0, *lengths]),
        ids=_concatenate([cut.ids for _, cut in present]),
        first=np.append(
            _concatenate([cut.first[:-1] + begin for (_, cut), begin in zip(present, tokens, strict=False)]), tokens[-1]
        ),
        starts=_concatenate([cut.bounds[:-1] for _, cut in present]),
        ends=_concatenate([cut.bounds[1:] for _, cut in present]),
        protected=np.concatenate(
            [np.zeros(0, dtype=bool), *(_protected(piece, cut, patterns, protected_parts) for piece, cut in present)]
        ),
        separator=separator,
        separator_ids=np.asarray(separator_ids, dtype=np.int64),
    )


def _protected(
    piece: Piece, units: Units, patterns: Sequence[re.Pattern[str]], protected_parts: Collection[Part]
) -> Mask:
    mask = np.full(len(units), piece.part in protected_parts)
    for start, end in protected_spans(piece.text, patterns):
        low = np.searchsorted(units.bounds, start, side="right") - 1
        high = np.searchsorted(units.bounds, end, side="left")
        mask[low:high] = True
    return mask


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])

"""What a compression gives back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.compress.prompt import Part, Piece


class Reason(StrEnum):
    """Why a unit was kept or dropped."""

    UNCHANGED = "unchanged"  # the prompt fits the budget as it is
    PROTECTED = "protected"  # in a span that must survive
    ABOVE_THRESHOLD = "above_threshold"  # among the most surprising of its segment
    BELOW_THRESHOLD = "below_threshold"
    DEMONSTRATION_DROPPED = "demonstration_dropped"  # its demonstration was not selected
    OVER_BUDGET = "over_budget"  # dropped again, for the caller's counter
    TAKEN_BACK = "taken_back"  # kept after all: the caller's counter had room


@dataclass(frozen=True, kw_only=True)
class TokenDecision:
    """What became of one unit (almost always: one token).

    Attributes:
        part, index: the piece it stands in; index counts demonstrations and is 0 otherwise.
        text, start, end: its characters, and where they stand in that piece.
        token_count: tokens of the small LM in it.
        segment: the segment of Stage 2 in which it was scored; None if it never got there.
        surprisal: −log p of its own tokens, nats; None where the model did not read it.
        kept: whether it is in the compressed text.
        reason: why.
    """

    part: Part
    index: int
    text: str
    start: int
    end: int
    token_count: int
    segment: int | None
    surprisal: float | None
    kept: bool
    reason: Reason


_REASONS = tuple(Reason)
_OF_KEPT = (Reason.UNCHANGED, Reason.PROTECTED, Reason.ABOVE_THRESHOLD, Reason.TAKEN_BACK)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionArrays:
    """What became of the units of a prompt, in the smallest types that hold it: six to sixteen bytes a unit.

    Attributes:
        pieces: that the units are cut from.
        edges: ``(n_pieces + 1,)``, where each piece's units start.
        ends: ``(n_units,)``, character in the piece where a unit ends; the next one starts there.
        costs: ``(n_units,)``, tokens of the small LM.
        segments: ``(n_units,)``, −1 for none.
        surprisals: ``(n_units,)``, nats; NaN where the model did not read the unit.
        reasons: ``(n_units,)``, positions in `Reason`.
    """

    pieces: Sequence[Piece]
    edges: NDArray[Any]
    ends: NDArray[Any]
    costs: NDArray[Any]
    segments: NDArray[Any]
    surprisals: NDArray[Any]
    reasons: NDArray[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        for name, values in self._arrays():
            object.__setattr__(self, name, _compact(values))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DecisionArrays):
            return NotImplemented
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return self.pieces == other.pieces and all(
            np.array_equal(mine, theirs, equal_nan=name == "surprisals") for (name, mine), (_, theirs) in pairs
        )

    def __hash__(self) -> int:
        return hash((self.pieces, self.reasons.tobytes()))

    def decisions(self) -> Iterator[TokenDecision]:
        """One a unit, in the order of the pieces."""
        for piece, low, high in zip(self.pieces, self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True):
            start = 0
            columns = (self.ends, self.costs, self.segments, self.surprisals, self.reasons)
            for end, cost, segment, surprisal, reason in zip(*(c[low:high].tolist() for c in columns), strict=True):
                yield TokenDecision(
                    part=piece.part,
                    index=piece.index,
                    text=piece.text[start:end],
                    start=start,
                    end=end,
                    token_count=cost,
                    segment=segment if segment >= 0 else None,
                    surprisal=None if math.isnan(surprisal) else surprisal,
                    kept=_REASONS[reason] in _OF_KEPT,
                    reason=_REASONS[reason],
                )
                start = end

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        return ((column.name, getattr(self, column.name)) for column in fields(self)[1:])


def _compact(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in the smallest type that holds them all exactly, in an array that owns them."""
    if values.dtype.kind == "f":
        narrow = values.astype(np.float32)
        return narrow if np.array_equal(narrow, values, equal_nan=True) else values.astype(np.float64)
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(np.promote_types(np.min_scalar_type(least), np.min_scalar_type(most)))


@dataclass(frozen=True, kw_only=True)
class CompressionResult:
    """A compressed prompt.

    Attributes:
        text: the compressed prompt, cut from the source.
        original_tokens, compressed_tokens: as the caller counts them.
        budget: the budget, as the caller counts it; compressed_tokens never exceeds it.
        selected: the demonstrations that survived Stage 1.
        tokens_read: tokens that the small LM read for this prompt.
        tokens_cached: tokens whose surprisals were known from earlier prompts.
        arrays: what `tokens` is made of.
    """

    text: str
    original_tokens: int
    compressed_tokens: int
    budget: int
    selected: tuple[int, ...]
    tokens_read: int
    tokens_cached: int
    arrays: DecisionArrays = field(repr=False)

    @property
    def ratio(self) -> float:
        """How many times shorter the prompt has become."""
        if self.compressed_tokens == 0:  # the caller's counter finds nothing in it
            return math.inf if self.original_tokens else 1.0
        return self.original_tokens / self.compressed_tokens

    @cached_property
    def tokens(self) -> tuple[TokenDecision, ...]:
        """One decision a unit, in source order; together they rebuild every piece."""
        return tuple(self.arrays.decisions())

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Plain values for JSON."""
        values: dict[str, Any] = {
            "text": self.text,
            "original_tokens": self.original_tokens,
            "compressed_tokens": self.compressed_tokens,
            "budget": self.budget,
            "ratio": round(self.ratio, 4),
            "selected": list(self.selected),
            "tokens_read": self.tokens_read,
            "tokens_cached": self.tokens_cached,
        }
        if tokens:
            values["tokens"] = [vars(decision) for decision in self.tokens]
        return values

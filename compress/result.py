"""What a compression gives back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from terselm.compress.prompt import Part


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
    """

    text: str
    original_tokens: int
    compressed_tokens: int
    budget: int
    selected: tuple[int, ...]
    tokens_read: int
    tokens_cached: int
    _decide: Callable[[], tuple[TokenDecision, ...]] = field(repr=False, compare=False)

    @property
    def ratio(self) -> float:
        """How many times shorter the prompt has become."""
        if self.compressed_tokens == 0:  # the caller's counter finds nothing in it
            return math.inf if self.original_tokens else 1.0
        return self.original_tokens / self.compressed_tokens

    @cached_property
    def tokens(self) -> tuple[TokenDecision, ...]:
        """One decision a unit, in source order; together they rebuild every piece."""
        return self._decide()

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

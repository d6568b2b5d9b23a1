"""What the ledger's rows say: states of requests, intents before an attempt, outcomes after it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from terselm.data.rows import Json


class State(StrEnum):
    """What became of a request so far."""

    WAITING = "waiting"
    """To be asked, or asked again."""
    DONE = "done"
    """There is a record."""
    FAILED = "failed"
    """The endpoint did not answer, however often it was asked, or refused."""
    FILTERED = "filtered"
    """A content filter kept the answer back."""
    DROPPED = "dropped"
    """There is an answer, but none that is fit for a record."""


ANSWERED = "answered"
"""Outcome of an attempt that brought a whole answer."""
INTERRUPTED = "interrupted"
"""Outcome of an attempt that a kill cut off; whether it was answered, and charged, nobody knows."""
IMPORTED = "imported"
"""Outcome that stands for a record that was in the file before there was a ledger."""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """An attempt that is about to be made."""

    request: str
    number: int
    bound_tokens: int = 0
    bound_cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, and what that means for its request."""

    request: str
    number: int
    outcome: str
    message: str | None = None
    raw: bytes | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0
    state: State = State.WAITING
    reason: str | None = None
    record: Json | None = None

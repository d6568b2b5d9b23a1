"""What was measured of one prompt: a line of an evaluation's journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

JOURNAL = "journal.jsonl"
ZERO, FULL = "zero-shot", "full"  # the prompt without demonstrations; the whole prompt
NO_BUDGET = "-"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prompt, shortened by one method to one budget and read by the target; None for what was not measured.

    Attributes:
        method: as the user wrote it; ``zero-shot`` and ``full`` are the references.
        budget: as the user wrote it; ``-`` for the references.
        id: of the item.
        tokens: of the shortened prompt.
        whole_tokens: of the prompt before.
        compressor_seconds: its share of the time that its batch took.
        text: the shortened prompt.
        nats: −log p of the gold answer after it.
        gold_tokens: of the gold answer.
        answer: what the target wrote.
        target_seconds: its share of the time that the answers took.
        right: whether the answer is right.
        exact: whether it is an accepted short answer and nothing else.
        f1: of its words and those of an accepted short answer.
        answer_kept: whether the shortened prompt still holds the answer.
        allowed: tokens, by the budget.
        overlap: of the words kept with those that the target itself, as compressor, keeps.
        chat: whether the target read the prompt as a turn of a chat.
    """

    method: str
    budget: str
    id: str
    tokens: int
    whole_tokens: int
    compressor_seconds: float
    text: str
    nats: float | None = None
    gold_tokens: int | None = None
    answer: str | None = None
    target_seconds: float | None = None
    right: bool | None = None
    exact: bool | None = None
    f1: float | None = None
    answer_kept: bool | None = None
    allowed: int | None = None
    overlap: float | None = None
    chat: bool | None = None

    @property
    def cell(self) -> tuple[str, str]:
        """Method and budget."""
        return self.method, self.budget

    @property
    def key(self) -> tuple[str, str, str]:
        """Method, budget and item: what is measured once."""
        return self.method, self.budget, self.id

    @property
    def nats_a_token(self) -> float | None:
        """−log p of the gold answer, by its tokens; None where it was not measured."""
        return None if self.nats is None or self.gold_tokens is None else self.nats / self.gold_tokens

    def to_json(self) -> dict[str, Any]:
        """The journal's line, without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measurement:
        """What a line of the journal says."""
        return cls(**{field.name: entry[field.name] for field in fields(cls) if field.name in entry})

"""What a collection has come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from terselm.data.collection.entries import State
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.plan import Request
from terselm.data.collection.settings import CollectSettings
from terselm.data.collection.status import report


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection has come to.

    Attributes:
        records: in the file now.
        reused: of these, how many were there before this run.
        waiting: requests that are still to be asked.
        without_record: requests that will have no record, by reason.
        retried: records of a local target that took more than one draw.
        cut: records that were cut where they began to loop.
        prompt_tokens, completion_tokens: of the records, as the target counts.
        cost: of everything in the ledger, by the price table.
        stopped: why this run ended before everything was asked; None if it did not.
        files: what was written.
    """

    records: int
    reused: int
    waiting: int
    without_record: Mapping[str, int]
    retried: int
    cut: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    stopped: str | None
    files: tuple[str, ...]


def why_nothing(ledger: Ledger, requests: Sequence[Request], settings: CollectSettings, stopped: str | None) -> str:
    """Say why there is no record at all."""
    if stopped:
        return f"there is no answer of {settings.target} yet: {stopped}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in _reasons(ledger, requests).items())
    hint = "try another prompt template, or a higher temperature" if settings.is_local else "--status says more"
    return f"none of the {len(requests)} answers of {settings.target} was fit to keep ({reasons}); {hint}"


def _reasons(ledger: Ledger, requests: Sequence[Request]) -> dict[str, int]:
    wanted = {request.id for request in requests}
    rows = ledger.query(
        "SELECT id, reason FROM requests WHERE state IN (?, ?, ?)", (State.FAILED, State.FILTERED, State.DROPPED)
    )
    return dict(Counter(reason for name, reason in rows if name in wanted))


def summarise(
    ledger: Ledger, requests: Sequence[Request], *, reused: int, stopped: str | None, files: tuple[str, ...]
) -> CollectSummary:
    """Count what these requests have come to; ``reused`` of their records were there before."""
    states = ledger.states()
    made = [
        record["generation"]
        for request in requests
        if states[request.id] is State.DONE and (record := ledger.record(request.id)) is not None
    ]
    return CollectSummary(
        records=len(made),
        reused=reused,
        waiting=sum(states[request.id] is State.WAITING for request in requests),
        without_record=_reasons(ledger, requests),
        retried=sum(generation["attempts"] > 1 for generation in made),
        cut=sum(generation["finish_reason"] == "loop" for generation in made),
        prompt_tokens=sum(generation["usage"]["prompt_tokens"] for generation in made),
        completion_tokens=sum(generation["usage"]["completion_tokens"] for generation in made),
        cost=report(ledger)["cost"],
        stopped=stopped,
        files=files,
    )

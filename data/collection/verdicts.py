"""What the ledger says of an attempt at an endpoint: answered, filtered, failed, or to be asked again."""

from __future__ import annotations

from dataclasses import replace

from terselm.data.collection.entries import ANSWERED, Intent, Outcome, State
from terselm.data.collection.failures import Failure, Reason, Then
from terselm.data.collection.judge import make_record
from terselm.data.collection.money import Price
from terselm.data.collection.plan import Request
from terselm.data.collection.responses import Response
from terselm.data.faults import Fault
from terselm.data.schema import Usage


def failed(intent: Intent, failure: Failure, raw: bytes | None, *, last: bool) -> Outcome:
    """An attempt without an answer; ``last``: it will not be repeated in this run."""
    state = State.WAITING
    if failure.then is Then.FILTERED:
        state = State.FILTERED
    elif failure.then is Then.GIVE_UP or (failure.then is Then.RETRY and last):
        state = State.FAILED
    return Outcome(
        request=intent.request,
        number=intent.number,
        outcome=failure.reason,
        message=failure.message,
        raw=raw,
        cost=intent.bound_cost if failure.charged else 0.0,
        state=state,
        reason=failure.reason,
    )


def answered(
    request: Request, intent: Intent, response: Response, *, raw: bytes, price: Price, versions: dict[str, str]
) -> Outcome:
    """An attempt with an answer, which is a record unless it is empty or was kept back by a filter."""
    used = Outcome(
        request=request.id,
        number=intent.number,
        outcome=ANSWERED,
        raw=raw,
        prompt_tokens=response.prompt_tokens,
        completion_tokens=response.completion_tokens,
        cost=price.cost(response.prompt_tokens, response.completion_tokens) if response.metered else intent.bound_cost,
    )
    if response.filtered:
        return replace(used, state=State.FILTERED, reason=Reason.CONTENT_FILTER, message=response.finish_reason)
    if not response.text.strip():
        return replace(used, state=State.DROPPED, reason=Fault.EMPTY, message=f"ended with {response.finish_reason}")
    return replace(used, state=State.DONE, record=_record(request, response, versions))


def _record(request: Request, response: Response, versions: dict[str, str]) -> dict[str, object]:
    return make_record(
        request,
        response.text,
        finish_reason=response.finish_reason,
        usage=Usage(prompt_tokens=response.prompt_tokens, completion_tokens=response.completion_tokens),
        versions=versions,
        served_model=None if response.model == request.model else response.model,
        system_fingerprint=response.system_fingerprint,
    )

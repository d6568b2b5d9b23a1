"""What an attempt came to: the one place that decides it, for a target in this process and for an endpoint.

An `Outcome` says what the ledger notes of the attempt and what becomes of its request: a record, a reason why there is
none, or another attempt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from typing import Any

from terselm import __version__
from terselm.data.collection.ledger import ANSWERED, Intent, Outcome, State
from terselm.data.collection.plan import Request
from terselm.data.collection.settings import LogProbSettings, Price
from terselm.data.faults import Fault, cut_loop, find_fault
from terselm.data.formats import record_to_object
from terselm.data.generate import Answer
from terselm.data.rows import Json
from terselm.data.schema import Generation, PlainText, Record, Usage
from terselm.progress import Progress


class Then(StrEnum):
    """What follows a failure.

    Attributes:
        RETRY: it may pass.
        GIVE_UP: this request will not be answered.
        FILTERED: a content filter refused this request.
        STOP: no request will be answered.
    """

    RETRY = "retry"
    GIVE_UP = "give up"
    FILTERED = "filtered"
    STOP = "stop"


class FailureCause(StrEnum):
    """Classes of failures, as the status lists them."""

    RATE_LIMIT = "rate_limit"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    MALFORMED = "malformed"
    REFUSED = "refused"
    BAD_REQUEST = "bad_request"
    CONTENT_FILTER = "content_filter"
    EXPIRED = "expired"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt that brought no answer.

    Attributes:
        charged: it may have been answered, and so paid for.
        overload: the endpoint bears less than it is asked.
        pause: seconds that the endpoint asks to wait.
    """

    cause: FailureCause
    then: Then
    message: str
    charged: bool = False
    overload: bool = False
    pause: float | None = None


class AskError(Exception):
    """An attempt brought no answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer of an endpoint.

    Attributes:
        metered: the response says what it used; else the counts are 0.
        filtered: a content filter, or the model itself, kept the answer back.
        logprobs: as they came, in the form of the interface that was asked; None without.
    """

    text: str
    finish_reason: str
    filtered: bool
    metered: bool
    prompt_tokens: int
    completion_tokens: int
    model: str | None
    system_fingerprint: str | None
    logprobs: Any


def parse_response(raw: bytes) -> Response:
    """Read a response of ``/chat/completions`` or ``/completions``.

    Raises:
        ValueError: it is torn, not JSON, or lacks what every answer has.
    """
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        refused = message is not None and bool(message.get("refusal"))
        usage = value.get("usage") or {}
        reason = choice.get("finish_reason") or "unknown"
        response = Response(
            text=text or "",
            finish_reason=str(reason),
            filtered=refused or reason == "content_filter",
            metered="prompt_tokens" in usage and "completion_tokens" in usage,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            model=value.get("model") or None,
            system_fingerprint=value.get("system_fingerprint") or None,
            logprobs=choice.get("logprobs"),
        )
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a response of this interface: {type(error).__name__} {error}") from None
    if not isinstance(response.text, str) or not isinstance(text, str | None):
        raise ValueError(f"the answer is {type(text).__name__}; expected text")
    if any("\ud800" <= character <= "\udfff" for character in response.text):
        raise ValueError("the answer holds half a surrogate pair, which is no character")
    return response


def drawn(request: Request, intent: Intent, answer: Answer, *, draw: int, last: bool) -> Outcome:
    """A local target's answer: a record unless it has a fault (see `find_fault`).

    Args:
        draw: of this request, from 1.
        last: it will not be drawn again. A loop is cut after its first cycle then; what is left has no fault.
    """
    prompt = "\n\n".join(message.content for message in request.instruction.messages)
    template = request.template.text if request.template else ""
    unfinished = answer.finish_reason == "length"
    kept, fault = answer, find_fault(answer.text, prompt, template, unfinished=unfinished)
    if fault is Fault.LOOP and last:
        kept = replace(answer, text=cut_loop(answer.text, unfinished=unfinished), finish_reason="loop")
        fault = find_fault(kept.text, prompt, template)
    record = None
    if fault is None:
        usage = Usage(prompt_tokens=kept.prompt_tokens, completion_tokens=kept.completion_tokens)
        made = {"attempts": draw, "finish_reason": kept.finish_reason, "versions": _versions("transformers")}
        record = _record(request, kept.text, usage=usage, **made)
    return Outcome(
        request=request.id,
        number=intent.number,
        outcome=ANSWERED,
        raw=json.dumps(asdict(answer), ensure_ascii=False).encode(),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        state=State.DONE if fault is None else State.DROPPED if last else State.WAITING,
        reason=fault,
        record=record,
    )


def answered(request: Request, intent: Intent, raw: bytes, price: Price) -> Outcome:
    """An endpoint's answer: a record unless it is empty or was kept back by a filter.

    Raises:
        ValueError: the response cannot be read.
    """
    response = parse_response(raw)
    used = _used(intent, response, raw, price)
    if response.filtered:
        return replace(used, state=State.FILTERED, reason=FailureCause.CONTENT_FILTER, message=response.finish_reason)
    if not response.text.strip():
        return replace(used, state=State.DROPPED, reason=Fault.EMPTY, message=f"ended with {response.finish_reason}")
    record = _record(
        request,
        response.text,
        finish_reason=response.finish_reason,
        usage=Usage(prompt_tokens=response.prompt_tokens, completion_tokens=response.completion_tokens),
        versions=_versions("openai"),
        served_model=None if response.model == request.model else response.model,
        system_fingerprint=response.system_fingerprint,
    )
    return replace(used, state=State.DONE, record=record)


def scored(text: PlainText, settings: LogProbSettings, intent: Intent, raw: bytes, price: Price) -> Outcome:
    """An endpoint's log-probabilities of a text; they stay in the response, and there is no record.

    Raises:
        ValueError: the response holds none, or not those of this text.
    """
    from terselm.data.collection.scores import text_scores

    text_scores(text, raw, settings)
    return replace(_used(intent, parse_response(raw), raw, price), state=State.DONE)


def answer_found_likely(used: Outcome, nats: Sequence[float]) -> Outcome:
    """How likely a target finds a given answer; the record says so.

    Args:
        used: what the attempt has used.
        nats: −log p of each token of the answer.

    Raises:
        ValueError: that of a token is not known, or there are no tokens.
    """
    if not nats or not all(map(math.isfinite, nats)):
        raise ValueError("the response does not tell the log-probability of each token of the answer")
    record = {"nats": math.fsum(nats), "tokens": len(nats)}
    return replace(used, outcome=ANSWERED, state=State.DONE, record=record)


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
        outcome=failure.cause,
        message=failure.message,
        raw=raw,
        cost=intent.bound_cost if failure.charged else 0.0,
        state=state,
        reason=failure.cause,
    )


def _used(intent: Intent, response: Response, raw: bytes, price: Price) -> Outcome:
    """What every answer of an endpoint has; one that does not say what it used costs all that it could."""
    cost = price.cost(response.prompt_tokens, response.completion_tokens)
    return Outcome(
        request=intent.request,
        number=intent.number,
        outcome=ANSWERED,
        raw=raw,
        prompt_tokens=response.prompt_tokens,
        completion_tokens=response.completion_tokens,
        cost=cost if response.metered else intent.bound_cost,
    )


def _record(request: Request, response: str, **made: Any) -> Json:
    """``made`` is what `Generation` holds besides what the request says."""
    record = Record(
        id=request.id,
        category=request.instruction.category,
        messages=request.instruction.messages,
        response=response,
        generation=Generation(
            model=request.model,
            parameters=request.parameters,
            sample=request.sample,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **made,
        ),
    )
    return record_to_object(record)


@cache
def _versions(package: str) -> dict[str, str]:
    """Of TerseLM and of the package that makes the answers."""
    return {"terselm": __version__, package: version(package)}


class CollectionProgress:
    """Outcomes in figures: answers that failed, requests in flight, tokens per second, cost so far.

    Args:
        total: requests that this run is to ask.
        what: this run does.
        unit: of what is asked for.
    """

    def __init__(self, total: int, what: str, unit: str = "answer") -> None:
        self._progress = Progress(total, what, unit)
        self._started = time.perf_counter()
        self._failed = self._tokens = self._flying = 0
        self._cost = 0.0

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """While a request is on its way."""
        self._flying += 1
        try:
            yield
        finally:
            self._flying -= 1

    def update(self, outcome: Outcome) -> None:
        """An attempt has ended."""
        self._tokens += (outcome.prompt_tokens or 0) + (outcome.completion_tokens or 0)
        self._cost += outcome.cost
        if outcome.state is State.WAITING:
            return
        self._failed += outcome.state is not State.DONE
        speed = self._tokens / max(1e-9, time.perf_counter() - self._started)
        cost = f", cost {self._cost:.4f}" if self._cost else ""
        self._progress.update(1, f"{self._failed} failed, {self._flying} in flight, {speed:,.0f} tokens/s{cost}")

    def __enter__(self) -> CollectionProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

"""Ask through an endpoint's batch interface: submit, poll, fetch, each of which a kill may interrupt.

A batch bears a token of ours in its metadata, which the ledger has before anything is submitted. So a batch that was
created in the moment of a kill, before its id could be noted, is found again by the token and not paid for twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from terselm.data.collection.admission import PromptSizes, SpentError
from terselm.data.collection.endpoint import Client, no_answer, of_status
from terselm.data.collection.ledger import Intent, Ledger, OpenBatch, Outcome, State
from terselm.data.collection.outcome import AskError, CollectionProgress, Failure, FailureCause, Then, failed
from terselm.data.collection.plan import Request, recall
from terselm.data.collection.remote import Remote, Task, answer_task, intent_of, on_interrupt
from terselm.data.collection.settings import Api
from terselm.data.rows import dump_object
from terselm.extras import first_line

_log = logging.getLogger(__name__)
Item = TypeVar("Item")
_ENDED = ("completed", "failed", "expired", "cancelled")
_COMMIT = 500  # answers in one commit
_SEARCHED = 1000  # batches of the account, newest first, among which one of ours is looked for


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Of one file."""

    most_requests: int = 50_000
    most_bytes: int = 200 * 1_000_000


def ask_in_batches(
    remote: Remote, ledger: Ledger, requests: Sequence[Request], progress: CollectionProgress
) -> str | None:
    """Submit what is waiting, and wait for the answers; return why it stopped before all were there, if it did.

    Raises:
        TargetLLMError: the ledger cannot be written.
    """

    async def run() -> str | None:
        async with Client(remote.settings, remote.key) as client:
            return await _Batches(remote, ledger, client, progress).run(requests)

    return asyncio.run(run())


class _Batches:
    """The state of one run; it lives in one event loop."""

    def __init__(self, remote: Remote, ledger: Ledger, client: Client, progress: CollectionProgress) -> None:
        self.remote, self.ledger, self.client, self.progress = remote, ledger, client, progress
        self.settings, self.limits, self.sizes = remote.settings, BatchLimits(), PromptSizes()
        self.stopped = asyncio.Event()
        self.why: str | None = None
        self.tasks: dict[str, Task] = {}
        path = "/completions" if self.settings.api is Api.COMPLETIONS else "/chat/completions"
        self.url = path if self.settings.azure_api_version else f"/v1{path}"

    async def run(self, requests: Sequence[Request]) -> str | None:
        self.tasks = {request.id: answer_task(request, self.settings) for request in requests}
        with on_interrupt(lambda: self._stop("interrupted; the batches go on, run the command again to fetch them")):
            for last in [False] * self.settings.limits.retries + [True]:
                try:
                    await self._round(last)
                except AskError as error:
                    self._stop(f"the endpoint refuses ({error})")
                if self.why or not self._waiting():
                    break
        return self.why

    async def _round(self, last: bool) -> None:
        """Submit what is in no batch, then see every open batch to its end."""
        for part in split(self._affordable(), self._line, self.limits.most_requests, self.limits.most_bytes):
            attempts = self.ledger.attempts()
            intents = [self._intent(task, attempts.get(task.id, 0) + 1) for task in part]
            self.ledger.begin_batch(uuid.uuid4().hex, intents)
        for batch in self.ledger.open_batches():
            if batch.id is None:
                await self._submit(batch.token, [self._task(name) for name in batch.requests])
        while (left := self.ledger.open_batches()) and not self.stopped.is_set():
            for batch in left:
                state: Any = await self.client.call(partial(self.client.sdk.batches.retrieve, str(batch.id)))
                if state.status in _ENDED:
                    await self._fetch(batch, state, last)
            if self.ledger.open_batches():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.limits.batch_poll):
                        await self.stopped.wait()

    def _waiting(self) -> list[Task]:
        """What is to be asked, and in no batch."""
        taken = {name for batch in self.ledger.open_batches() for name in batch.requests}
        states = self.ledger.states()
        return [task for name, task in self.tasks.items() if states[name] is State.WAITING and name not in taken]

    def _affordable(self) -> list[Task]:
        """As many of those that wait as can never cost more than is left."""
        spending, waiting = self.remote.spending(self.ledger), self._waiting()
        for count, task in enumerate(waiting):
            try:
                spending.set_aside(self._intent(task, 1).bound_cost)
            except SpentError as spent:
                self.why = str(spent)
                return waiting[:count]
        return waiting

    def _task(self, name: str) -> Task:
        """Also one that this run did not ask for: its batch is paid for all the same."""
        if name not in self.tasks:
            self.tasks[name] = answer_task(recall(name, self.ledger.asked(name)), self.settings)
        return self.tasks[name]

    def _intent(self, task: Task, number: int) -> Intent:
        return intent_of(task, number, self.sizes, self.remote.price)

    def _line(self, task: Task) -> bytes:
        """A request in a file; its answer bears its id."""
        line = {"custom_id": task.id, "method": "POST", "url": self.url, "body": task.body()}
        return dump_object(line).encode() + b"\n"

    async def _submit(self, token: str, part: Sequence[Task]) -> None:
        call, sdk = self.client.call, self.client.sdk
        name = await call(partial(self._find, token))
        if name is None:
            content = b"".join(map(self._line, part))
            file: Any = await call(partial(sdk.files.create, file=(f"{token}.jsonl", content), purpose="batch"))
            create = partial(
                sdk.batches.create,
                input_file_id=file.id,
                endpoint=self.url,  # type: ignore[arg-type]
                completion_window="24h",
                metadata={"terselm": token},
            )
            made: Any = await call(create)
            name = str(made.id)
        self.ledger.submitted_batch(token, name)
        _log.info("submitted batch %s with %s requests", name, f"{len(part):,}")

    async def _find(self, token: str) -> str | None:
        """The endpoint's id of a batch of ours, if it was created before a kill."""
        searched = 0
        async for batch in self.client.sdk.batches.list(limit=100):
            if (batch.metadata or {}).get("terselm") == token:
                return str(batch.id)
            searched += 1
            if searched == _SEARCHED:
                break
        return None

    async def _fetch(self, batch: OpenBatch, state: Any, last: bool) -> None:
        """Commit the answers of a batch that has ended; what it did not answer is to be asked again."""
        if state.status == "failed" and state.errors and state.errors.data:
            self._stop(f"the endpoint refused the batch ({self.remote.key.mask(state.errors.data[0].message or '')})")
        lines: dict[str, tuple[bytes | None, Failure | None]] = {}
        for file in (state.output_file_id, state.error_file_id):
            if file is not None:
                content: Any = await self.client.call(partial(self.client.sdk.files.content, file))
                lines |= {name: (raw, failure) for name, raw, failure in answer_lines(content.content)}
        states, attempts = self.ledger.states(), self.ledger.attempts()
        outcomes = [
            self._outcome(self._task(name), attempts[name], *lines.get(name, (None, None)), last=last)
            for name in batch.requests
            if states[name] is State.WAITING
        ]
        for start in range(0, len(outcomes), _COMMIT):
            self.ledger.finish(outcomes[start : start + _COMMIT])
        for outcome in outcomes:
            self.progress.update(outcome)
        self.ledger.end_batch(batch.token)

    def _outcome(self, task: Task, number: int, raw: bytes | None, failure: Failure | None, *, last: bool) -> Outcome:
        intent = self._intent(task, number)
        if raw is not None and failure is None:
            raw = self.remote.key.mask_raw(raw)
            try:
                return task.outcome(intent, raw, self.remote.price)
            except ValueError as error:
                failure = no_answer(FailureCause.MALFORMED, first_line(error))
        failure = failure or expired(None)
        failure = replace(failure, message=self.remote.key.mask(failure.message))
        if failure.then is Then.STOP:
            self._stop(f"the endpoint refuses every request ({failure.message})")
        return failed(intent, failure, raw, last=last)

    def _stop(self, why: str) -> None:
        self.why = self.why or why
        self.stopped.set()


def split(
    items: Sequence[Item], line: Callable[[Item], bytes], most_requests: int, most_bytes: int
) -> Iterator[list[Item]]:
    """Requests that go into one file each, in order."""
    part: list[Item] = []
    size = 0
    for item in items:
        length = len(line(item))
        if part and (len(part) == most_requests or size + length > most_bytes):
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part


def answer_lines(content: bytes) -> Iterator[tuple[str, bytes | None, Failure | None]]:
    """Yield (request, response as it came, failure) of each line; a line that cannot be read is passed over.

    Its request has no answer then, as one that the endpoint left out.
    """
    for line in content.splitlines():
        try:
            value = json.loads(line)
            name = str(value["custom_id"])
            response, error = value.get("response"), value.get("error")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if error or not isinstance(response, dict):
            yield name, None, expired(error)
        elif response.get("status_code") != 200:
            yield name, None, of_status(int(response.get("status_code") or 0), response.get("body"), {})
        else:
            yield name, json.dumps(response.get("body"), ensure_ascii=False).encode(), None


def expired(error: Any) -> Failure:
    """The batch ended before this request was answered; it is not charged."""
    message = (error.get("message") if isinstance(error, dict) else None) or "the batch ended without an answer"
    return Failure(cause=FailureCause.EXPIRED, then=Then.RETRY, message=str(message))

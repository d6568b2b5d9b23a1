"""Ask through an endpoint's batch interface: submit, poll, fetch, each of which a kill may interrupt.

A batch bears a token of ours in its metadata, which the ledger has before anything is submitted. So a batch that was
created in the moment of a kill, before its id could be noted, is found again by the token and not paid for twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from terselm.data.collection.batch_files import MOST_BYTES, MOST_REQUESTS, answer_lines, expired, request_line, split
from terselm.data.collection.client import AskError, Client
from terselm.data.collection.entries import Intent, Outcome, State
from terselm.data.collection.failures import Failure, Reason, Then, no_answer
from terselm.data.collection.interrupts import on_interrupt
from terselm.data.collection.judge import versions
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.plan import Request, recall, remote_body
from terselm.data.collection.progress import Progress
from terselm.data.collection.remote import Remote
from terselm.data.collection.responses import parse_response
from terselm.data.collection.settings import Api
from terselm.data.collection.sizes import PromptSizes
from terselm.data.collection.verdicts import answered, failed

_log = logging.getLogger(__name__)
T = TypeVar("T")
_ENDED = ("completed", "failed", "expired", "cancelled")
_COMMIT = 500  # answers in one commit
_SEARCHED = 1000  # batches of the account, newest first, among which one of ours is looked for


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Of one file."""

    most_requests: int = MOST_REQUESTS
    most_bytes: int = MOST_BYTES


def ask_in_batches(
    remote: Remote,
    ledger: Ledger,
    requests: Sequence[Request],
    progress: Progress,
    limits: BatchLimits | None = None,
) -> str | None:
    """Submit what is waiting, and wait for the answers; return why it stopped before all were there, if it did.

    Raises:
        TargetLLMError: the ledger cannot be written.
    """

    async def run() -> str | None:
        async with Client(remote.settings, remote.key) as client:
            return await _Batches(remote, ledger, client, progress, limits or BatchLimits()).run(requests)

    return asyncio.run(run())


class _Batches:
    def __init__(self, remote: Remote, ledger: Ledger, client: Client, progress: Progress, limits: BatchLimits) -> None:
        self.remote, self.ledger, self.client, self.progress, self.limits = remote, ledger, client, progress, limits
        self.settings = remote.settings
        self.sizes = PromptSizes()
        self.versions = versions("openai")
        self.stopped = asyncio.Event()
        self.why: str | None = None
        self.known: dict[str, Request] = {}
        path = "/completions" if self.settings.api is Api.COMPLETIONS else "/chat/completions"
        self.url = path if self.settings.azure_api_version else f"/v1{path}"

    async def run(self, requests: Sequence[Request]) -> str | None:
        self.known = {request.id: request for request in requests}
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
            self._note(part)
        for token, names, batch in self._open():
            if batch is None:
                await self._submit(token, [self._request(name) for name in json.loads(names)])
        while (left := self._open()) and not self.stopped.is_set():
            for token, names, batch in left:
                found: Any = await self._call(partial(self.client.sdk.batches.retrieve, str(batch)))
                if found.status in _ENDED:
                    await self._fetch(token, found, json.loads(names), last)
            await self._pause()

    def _open(self) -> list[tuple[str, str, str | None]]:
        """(token, ids of requests, id at the endpoint) of each batch that has not been fetched."""
        return self.ledger.query("SELECT token, requests, batch FROM batches WHERE state != 'ended'")

    def _waiting(self) -> list[Request]:
        taken = {name for _, names, _ in self._open() for name in json.loads(names)}
        states = self.ledger.states()
        return [r for name, r in self.known.items() if states[name] is State.WAITING and name not in taken]

    def _request(self, name: str) -> Request:
        """Also one that this run did not ask for: its batch is paid for all the same."""
        if name not in self.known:
            ((noted,),) = self.ledger.query("SELECT asked FROM requests WHERE id=?", (name,))
            self.known[name] = recall(name, json.loads(noted))
        return self.known[name]

    def _affordable(self) -> list[Request]:
        """As many of those that wait as can never cost more than is left."""
        spent, sent = self.ledger.used()
        waiting = self._waiting()
        kept: list[Request] = []
        for request in waiting:
            spent, sent = spent + self._intent(request, 1).bound_cost, sent + 1
            if self.remote.max_cost is not None and spent > self.remote.max_cost:
                self.why = f"max_cost: {len(kept)} of {len(waiting)} requests are surely within it"
                break
            if self.remote.max_requests is not None and sent > self.remote.max_requests:
                self.why = f"max_requests: {sent - 1} requests were sent"
                break
            kept.append(request)
        return kept

    def _note(self, part: Sequence[Request]) -> None:
        """Write down a batch, with its requests, before it is submitted."""
        attempts = self.ledger.attempts()
        names = json.dumps([request.id for request in part])
        with self.ledger.transaction():
            self.ledger.execute("INSERT INTO batches (token, requests) VALUES (?, ?)", (uuid.uuid4().hex, names))
            self.ledger.begin(self._intent(request, attempts.get(request.id, 0) + 1) for request in part)

    async def _submit(self, token: str, part: Sequence[Request]) -> None:
        sdk = self.client.sdk
        batch = await self._call(partial(self._find, token))
        if batch is None:
            content = b"".join(map(self._line, part))
            upload = partial(sdk.files.create, file=(f"{token}.jsonl", content), purpose="batch")
            file: Any = await self._call(upload)
            create = partial(
                sdk.batches.create,
                input_file_id=file.id,
                endpoint=self.url,  # type: ignore[arg-type]
                completion_window="24h",
                metadata={"terselm": token},
            )
            made: Any = await self._call(create)
            batch = str(made.id)
        self.ledger.execute("UPDATE batches SET batch=?, state='submitted' WHERE token=?", (batch, token))
        _log.info("submitted batch %s with %s requests", batch, f"{len(part):,}")

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

    async def _fetch(self, token: str, found: Any, names: Sequence[str], last: bool) -> None:
        """Commit the answers of a batch that has ended; what it did not answer is to be asked again."""
        if found.status == "failed" and found.errors and found.errors.data:
            self._stop(f"the endpoint refused the batch ({self.remote.key.mask(found.errors.data[0].message or '')})")
        lines: dict[str, tuple[bytes | None, Failure | None]] = {}
        for file in (found.output_file_id, found.error_file_id):
            if file is not None:
                content: Any = await self._call(partial(self.client.sdk.files.content, file))
                lines |= {name: (raw, failure) for name, raw, failure in answer_lines(content.content)}
        states, attempts = self.ledger.states(), self.ledger.attempts()
        outcomes = []
        for name in names:
            if states[name] is State.WAITING:
                raw, failure = lines.get(name, (None, None))
                outcomes.append(self._outcome(self._intent(self._request(name), attempts[name]), raw, failure, last))
        for start in range(0, len(outcomes), _COMMIT):
            self.ledger.finish(outcomes[start : start + _COMMIT])
        for outcome in outcomes:
            self.progress.update(outcome)
        self.ledger.execute("UPDATE batches SET state='ended' WHERE token=?", (token,))

    def _outcome(self, intent: Intent, raw: bytes | None, failure: Failure | None, last: bool) -> Outcome:
        if raw is not None and failure is None:
            raw = self.remote.key.mask_raw(raw)
            try:
                return answered(
                    self._request(intent.request),
                    intent,
                    parse_response(raw),
                    raw=raw,
                    price=self.remote.price,
                    versions=self.versions,
                )
            except ValueError as error:
                failure = no_answer(Reason.MALFORMED, error)
        failure = failure or expired(None)
        failure = replace(failure, message=self.remote.key.mask(failure.message))
        if failure.then is Then.STOP:
            self._stop(f"the endpoint refuses every request ({failure.message})")
        return failed(intent, failure, raw, last=last)

    def _line(self, request: Request) -> bytes:
        return request_line(request, remote_body(request, self.settings.api), self.url)

    def _intent(self, request: Request, number: int) -> Intent:
        prompt, most = self.sizes.bound(request.instruction.messages), self.settings.max_new_tokens
        cost = self.remote.price.cost(prompt, most)
        return Intent(request=request.id, number=number, bound_tokens=prompt + most, bound_cost=cost)

    async def _call(self, make: Callable[[], Awaitable[T]]) -> T:
        """One call of the interface, again and again as long as its failures may pass."""
        import tenacity

        limits = self.settings.limits
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(limits.retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest_pause),
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, AskError) and e.failure.then is Then.RETRY),
            reraise=True,
        )

        async def once() -> T:
            async with self.client.clear_errors():
                return await make()

        return await retrying(once)

    async def _pause(self) -> None:
        if self._open():
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.limits.batch_poll):
                    await self.stopped.wait()

    def _stop(self, why: str) -> None:
        self.why = self.why or why
        self.stopped.set()

"""Ask an endpoint for all that is waiting, many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from terselm.data.collection.admission import Admission, StoppedError
from terselm.data.collection.client import AskError, Client, Key
from terselm.data.collection.commits import Commits
from terselm.data.collection.entries import Intent, Outcome
from terselm.data.collection.failures import Failure, Reason, Then, no_answer
from terselm.data.collection.interrupts import on_interrupt
from terselm.data.collection.judge import versions
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.money import FREE, Price, SpentError
from terselm.data.collection.plan import Request, remote_body
from terselm.data.collection.progress import Progress
from terselm.data.collection.responses import parse_response
from terselm.data.collection.settings import CollectSettings
from terselm.data.collection.sizes import PromptSizes
from terselm.data.collection.verdicts import answered, failed
from terselm.errors import ConfigError, TerseLMError

if TYPE_CHECKING:
    from tenacity import RetryCallState

_LONGEST_WISH = 3600.0
"""Seconds; an endpoint that asks to wait longer is asked again after this."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """An endpoint, and what asking it may cost."""

    settings: CollectSettings
    key: Key
    price: Price = FREE
    max_cost: float | None = None
    max_requests: int | None = None


def ask_all(remote: Remote, ledger: Ledger, pending: Sequence[Request], progress: Progress) -> str | None:
    """Ask until each request is answered or given up; return why it stopped before that, if it did.

    An interrupt (Ctrl-C, SIGTERM) sends nothing more and waits for the answers that are on their way.

    Raises:
        ConfigError: `openai` or `tenacity` is missing, or a request is larger than the token limit.
        TargetLLMError: the ledger cannot be written.
    """
    try:
        import tenacity  # noqa: F401
    except ImportError:
        raise ConfigError("endpoints need the tenacity package; run: pip install 'terselm[collect]'") from None

    async def ask() -> str | None:
        return await _Run(remote, ledger, progress).ask(pending)

    return asyncio.run(ask())


class _Run:
    """The state of one run; it lives in one event loop."""

    def __init__(self, remote: Remote, ledger: Ledger, progress: Progress) -> None:
        self.remote, self.settings, self.ledger, self.progress = remote, remote.settings, ledger, progress
        self.gate = Admission(remote.settings.limits, ledger, (remote.max_cost, remote.max_requests))
        self.commits = Commits(ledger)
        self.sizes = PromptSizes()
        self.attempts = ledger.attempts()
        self.versions = versions("openai")
        self.error: TerseLMError | None = None

    async def ask(self, pending: Sequence[Request]) -> str | None:
        queue = iter(pending)
        async with Client(self.settings, self.remote.key) as client:
            try:
                with on_interrupt(lambda: self.gate.stop("interrupted")):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.settings.limits.concurrency, len(pending))):
                            group.create_task(self._work(client, queue))
            finally:
                await self.commits.close()
        if self.error is not None:
            raise self.error
        return self.gate.why

    async def _work(self, client: Client, queue: Iterator[Request]) -> None:
        for request in queue:
            try:
                await self._until_answered(client, request)
            except SpentError as spent:  # what others have set aside may still be sent
                self.gate.why = self.gate.why or str(spent)
                return
            except StoppedError:
                return
            except TerseLMError as error:  # a ledger that cannot be written, a request that never fits
                self.error = self.error or error
                self.gate.stop(str(error))
            if self.gate.is_stopped:
                return

    async def _until_answered(self, client: Client, request: Request) -> None:
        import tenacity

        tries = self.settings.limits.retries + 1
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(tries),
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, AskError) and e.failure.then is Then.RETRY),
            wait=self._pause,
            sleep=self.gate.sleep,
            reraise=True,
        )
        with suppress(AskError):  # the ledger has it
            async for attempt in retrying:
                with attempt:
                    await self._attempt(client, request, last=attempt.retry_state.attempt_number == tries)

    async def _attempt(self, client: Client, request: Request, last: bool) -> None:
        """Send a request once, commit what came of it, and raise AskError where that was no answer."""
        intent = self._intent(request)
        async with self.gate.ticket(intent) as ticket:
            await self.commits.commit(lambda: self.ledger.begin([intent]))
            self.attempts[request.id] = intent.number
            ticket.sent, ticket.cost = True, intent.bound_cost
            with self.progress.in_flight():
                raw, failure = await self._send(client, request)
            outcome = self._outcome(request, intent, raw, failure, last)
            await self.commits.commit(lambda: self.ledger.finish([outcome]))
            self.gate.settle(ticket, outcome, failure)
        self.sizes.learn(request.instruction.messages, outcome.prompt_tokens or 0)
        self.progress.update(outcome)
        if failure is not None:
            if failure.then is Then.STOP:
                self.gate.stop(f"the endpoint refuses every request ({failure.message})")
            raise AskError(failure)

    def _intent(self, request: Request) -> Intent:
        prompt, most = self.sizes.bound(request.instruction.messages), self.settings.max_new_tokens
        return Intent(
            request=request.id,
            number=self.attempts.get(request.id, 0) + 1,
            bound_tokens=prompt + most,
            bound_cost=self.remote.price.cost(prompt, most),
        )

    async def _send(self, client: Client, request: Request) -> tuple[bytes | None, Failure | None]:
        raw = None
        try:
            raw = await client.ask(remote_body(request, self.settings.api))
            parse_response(raw)
        except AskError as error:
            return None, error.failure
        except ValueError as error:
            return raw, no_answer(Reason.MALFORMED, self.remote.key.mask(str(error)))
        return raw, None

    def _outcome(
        self, request: Request, intent: Intent, raw: bytes | None, failure: Failure | None, last: bool
    ) -> Outcome:
        if failure is not None:
            return failed(intent, failure, raw, last=last)
        assert raw is not None
        return answered(request, intent, parse_response(raw), raw=raw, price=self.remote.price, versions=self.versions)

    def _pause(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what the endpoint asks for, else exponential with full jitter."""
        import tenacity

        limits = self.settings.limits
        error = state.outcome.exception() if state.outcome else None
        asked = error.failure.pause if isinstance(error, AskError) else None
        drawn = tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest_pause)(state)
        return drawn if asked is None else min(asked, _LONGEST_WISH) + min(drawn, 0.1 * asked)

"""The gate before each request: its cost, the number in flight, the limits, and whether anything is still sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from terselm.data.collection.entries import ANSWERED, INTERRUPTED, Intent, Outcome
from terselm.data.collection.failures import Failure
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.limits import WINDOW, AdaptiveConcurrency, Reservation, RollingLimit
from terselm.data.collection.money import Budget
from terselm.data.collection.settings import LimitSettings

T = TypeVar("T")


class StoppedError(Exception):
    """Nothing more is sent; the request stays as it was."""


class Ticket:
    """Leave to send one request; ``settle`` says what came of it."""

    def __init__(self, intent: Intent, tokens: Reservation | None) -> None:
        self.intent, self.tokens = intent, tokens
        self.sent = False
        self.cost = 0.0


class Admission:
    """Lets requests through as fast as all limits allow, until it is stopped.

    Args:
        ledger: what was sent in the last minute, and what was spent in all, counts.
    """

    def __init__(self, limits: LimitSettings, ledger: Ledger, budget: tuple[float | None, int | None]) -> None:
        self.why: str | None = None
        self._stopped = asyncio.Event()
        self._concurrency = AdaptiveConcurrency(limits.concurrency)
        self._tokens = _limit(limits.tokens_per_minute, "tokens")
        self._requests = _limit(limits.requests_per_minute, "requests")
        spent, sent = ledger.used()
        self.budget = Budget(*budget, spent=spent, sent=sent)
        self._remember_last_minute(ledger)

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self, why: str) -> None:
        """Let nothing more through."""
        self.why = self.why or why
        self._stopped.set()

    @asynccontextmanager
    async def ticket(self, intent: Intent) -> AsyncIterator[Ticket]:
        """Wait until a request may be sent.

        Raises:
            ConfigError: it is larger than a limit, and never may.
            SpentError: the cost or the number of requests is used up.
            StoppedError: nothing more is sent.
        """
        await self._unless_stopped(self.budget.reserve(intent.bound_cost))
        ticket = Ticket(intent, None)
        try:
            async with self._concurrency.slot():
                if self._requests is not None:
                    await self._unless_stopped(self._requests.reserve(1))
                if self._tokens is not None:
                    ticket.tokens = await self._unless_stopped(self._tokens.reserve(intent.bound_tokens))
                if self.is_stopped:
                    raise StoppedError
                yield ticket
        finally:
            await self.budget.release(intent.bound_cost, ticket.cost, sent=ticket.sent)

    def sending(self, ticket: Ticket) -> None:
        """The request goes out now, and may cost all that it could."""
        ticket.sent, ticket.cost = True, ticket.intent.bound_cost
        if self._tokens is not None and ticket.tokens is not None:
            self._tokens.sent(ticket.tokens)

    def settle(self, ticket: Ticket, outcome: Outcome, failure: Failure | None) -> None:
        """Count what a request really used, and adapt to how the endpoint bore it."""
        ticket.cost = outcome.cost
        used = (outcome.prompt_tokens or 0) + (outcome.completion_tokens or 0)
        if failure.charged if failure is not None else not used:  # what it used is not known
            used = ticket.intent.bound_tokens
        if self._tokens is not None and ticket.tokens is not None:
            self._tokens.settle(ticket.tokens, used)
        if failure is None:
            self._concurrency.succeeded()
        elif failure.overload:
            self._concurrency.overloaded()

    async def sleep(self, seconds: float) -> None:
        """Pause before another attempt.

        Raises:
            StoppedError: nothing more is sent.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        if self.is_stopped:
            raise StoppedError

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(waiting)
        stop = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        raise StoppedError

    def _remember_last_minute(self, ledger: Ledger) -> None:
        """What a run that has just ended has sent counts towards the limits of this one."""
        now = time.time()
        rows = ledger.query(
            "SELECT started, CASE WHEN outcome = ? THEN prompt_tokens + completion_tokens "
            "WHEN outcome = ? OR cost > 0 THEN bound_tokens ELSE 0 END FROM attempts WHERE started > ? "
            "ORDER BY started",
            (ANSWERED, INTERRUPTED, now - WINDOW),
        )
        for started, used in rows:
            ago = max(0.0, now - started)
            if self._tokens is not None:
                self._tokens.remember(ago, used)
            if self._requests is not None:
                self._requests.remember(ago, 1)


def _limit(limit: int | None, name: str) -> RollingLimit | None:
    return None if limit is None else RollingLimit(limit, name=name)

"""The gate before each request: its cost, the number in flight, the limits by the minute, and whether it is shut.

Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from terselm.data.collection.ledger import Intent, Ledger, Outcome
from terselm.data.collection.outcome import Failure
from terselm.data.collection.settings import LimitSettings
from terselm.data.schema import Message
from terselm.errors import ConfigError

T = TypeVar("T")
_OF_A_MESSAGE = 8  # tokens that a chat template adds
_OF_A_PROMPT = 16
_ENOUGH = 20  # prompts from which the density of tokens is known
_MARGIN = 1.25
WINDOW = 60.0
"""Seconds."""


class StoppedError(Exception):
    """Nothing more is sent; the request stays as it was."""


class SpentError(Exception):
    """Nothing more may be sent."""


class Ticket:
    """Leave to send one request; ``settle`` says what came of it."""

    def __init__(self, intent: Intent, tokens: Reservation | None) -> None:
        self.intent, self.tokens = intent, tokens
        self.sent = False
        self.cost = 0.0


class Admission:
    """Lets requests through as fast as all limits allow, until it is stopped.

    Args:
        ledger: what a run that has just ended sent in the last minute counts.
    """

    def __init__(self, limits: LimitSettings, spending: SpendingLimit, ledger: Ledger) -> None:
        self.why: str | None = None
        self._stopped = asyncio.Event()
        self._concurrency = AdaptiveConcurrency(limits.concurrency)
        tokens, requests = limits.tokens_per_minute, limits.requests_per_minute
        self._tokens = RollingLimit(tokens, name="tokens") if tokens is not None else None
        self._requests = RollingLimit(requests, name="requests") if requests is not None else None
        self._spending = spending
        now = time.time()
        for started, used in ledger.sent_since(now - WINDOW):
            ago = max(0.0, now - started)
            if self._tokens is not None:
                self._tokens.remember(ago, used)
            if self._requests is not None:
                self._requests.remember(ago, 1)

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
        await self._unless_stopped(self._spending.reserve(intent.bound_cost))
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
            await self._spending.release(intent.bound_cost, ticket.cost, sent=ticket.sent)

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


class SpendingLimit:
    """Hard stops. What a request could cost at most is set aside before it is sent, so the limit is never passed.

    Args:
        max_cost: in the currency of the price table; None is no limit.
        max_requests: sent in all, with those that failed.
        ledger: what earlier runs have spent and sent counts.
    """

    def __init__(self, max_cost: float | None, max_requests: int | None, ledger: Ledger) -> None:
        self._max_cost, self._max_requests = max_cost, max_requests
        self._spent, self._sent = ledger.used()
        self._reserved, self._pending = 0.0, 0
        self._settled = asyncio.Condition()

    def set_aside(self, cost: float) -> None:
        """Set aside the cost of a request.

        Raises:
            SpentError: naming the limit that was reached.
        """
        if self._max_requests is not None and self._sent >= self._max_requests:
            raise SpentError(f"max_requests: {self._sent} requests were sent")
        if not self._affords(cost):
            taken = self._spent + self._reserved
            raise SpentError(
                f"max_cost: {taken:.4f} is spent or set aside, and the next request may cost up to {cost:.4f}"
            )
        self._reserved += cost
        self._pending += 1
        self._sent += 1

    async def reserve(self, cost: float) -> None:
        """As `set_aside`, but wait while requests in flight may turn out cheaper."""
        async with self._settled:
            while self._pending and not self._affords(cost):
                if self._max_requests is not None and self._sent >= self._max_requests:
                    break
                await self._settled.wait()
            self.set_aside(cost)

    async def release(self, reserved: float, cost: float, *, sent: bool) -> None:
        """Put what a request really cost in the place of what was set aside for it."""
        async with self._settled:
            self._spent += cost
            self._sent -= not sent
            self._pending -= 1
            # sums of floats leave crumbs, which must not look like a request in flight
            self._reserved = self._reserved - reserved if self._pending else 0.0
            self._settled.notify_all()

    def _affords(self, cost: float) -> bool:
        return self._max_cost is None or self._spent + self._reserved + cost <= self._max_cost


@dataclass(eq=False)
class Reservation:
    """A share of a limit.

    Attributes:
        free_at: when it no longer counts.
    """

    amount: int
    sent: float
    free_at: float


class RollingLimit:
    """At most ``limit`` units in *any* window, not only in those that begin on the minute.

    The endpoint counts a request when it arrives there, which is some time after it was sent and before it was
    answered. So a unit counts for a window from the answer on, or from ``lag`` after it was sent, if that is earlier.
    Whoever does not know yet how much it will use reserves the most, and settles afterwards; what it did not use is
    free again at once.

    Args:
        limit: units in a window.
        window: seconds.
        lag: seconds that a request takes at most to arrive.
        name: for messages.
    """

    def __init__(self, limit: int, *, window: float = WINDOW, lag: float = 1.0, name: str = "units") -> None:
        self.limit, self.name = limit, name
        self._window, self._lag = window, lag
        self._free: list[tuple[float, int, Reservation]] = []  # a heap; entries that were overtaken are passed over
        self._count = 0
        self._used = 0
        self._turn = asyncio.Lock()  # first come, first served: a large request is not starved by small ones
        self._freed = asyncio.Event()

    async def reserve(self, amount: int) -> Reservation:
        """Wait until ``amount`` fits.

        Raises:
            ConfigError: it never will.
        """
        if amount > self.limit:
            raise ConfigError(
                f"one request may use up to {amount:,} {self.name}, more than the {self.limit:,} a minute that are "
                "allowed; raise the limit, or lower max_new_tokens"
            )
        async with self._turn:
            while True:
                now = asyncio.get_running_loop().time()
                self._forget(now)
                if self._used + amount <= self.limit:
                    return self._grant(now, amount)
                self._freed.clear()
                try:
                    async with asyncio.timeout(max(1e-3, self._free[0][0] - now)):
                        await self._freed.wait()
                except TimeoutError:
                    continue

    def sent(self, reservation: Reservation) -> None:
        """Say that the request goes out only now; what had waited for so long that it was free again counts anew."""
        reservation.sent = asyncio.get_running_loop().time()
        self._forget(reservation.sent)
        if reservation.free_at <= reservation.sent:
            self._used += reservation.amount
        self._keep(reservation, reservation.sent + self._lag + self._window)

    def settle(self, reservation: Reservation, used: int) -> None:
        """Say what was really used, once the answer is there."""
        now = asyncio.get_running_loop().time()
        if reservation.free_at <= now:
            return
        self._used += used - reservation.amount
        reservation.amount = used
        self._keep(reservation, min(now, reservation.sent + self._lag) + self._window)
        self._freed.set()

    def remember(self, ago: float, amount: int) -> None:
        """Count what another process used, ``ago`` seconds before now."""
        self._grant(asyncio.get_running_loop().time() - ago, amount)

    def _grant(self, when: float, amount: int) -> Reservation:
        reservation = Reservation(amount=amount, sent=when, free_at=0.0)
        self._used += amount
        self._keep(reservation, when + self._lag + self._window)
        return reservation

    def _keep(self, reservation: Reservation, until: float) -> None:
        if until == reservation.free_at:  # twice in the heap, it would be taken out twice
            return
        self._count += 1
        reservation.free_at = until
        heapq.heappush(self._free, (until, self._count, reservation))

    def _forget(self, now: float) -> None:
        while self._free and self._free[0][0] <= now:
            until, _, reservation = heapq.heappop(self._free)
            if until == reservation.free_at:
                self._used -= reservation.amount


class AdaptiveConcurrency:
    """As TCP's congestion control: twice as many after each round until the first refusal, which halves the number;
    from there on one more after each round.

    Args:
        most: requests in flight that are never exceeded.
        start: requests in flight at first.
    """

    _CALM = 1.0  # seconds after a decrease in which failures, of requests sent before it, decrease no further

    def __init__(self, most: int, start: int = 8) -> None:
        self._most = most
        self._allowed = float(min(most, start))
        self._running = 0
        self._threshold = float("inf")
        self._decreased = float("-inf")
        self._changed = asyncio.Condition()

    @property
    def running(self) -> int:
        return self._running

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Be one of the requests in flight."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._running < int(self._allowed))
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            async with self._changed:
                self._changed.notify(2)  # a success may have made room for one more

    def succeeded(self) -> None:
        """An answer came."""
        more = 1.0 if self._allowed < self._threshold else 1 / self._allowed
        self._allowed = min(self._most, self._allowed + more)

    def overloaded(self) -> None:
        """Half as many in flight."""
        now = asyncio.get_running_loop().time()
        if now - self._decreased >= self._CALM:
            self._decreased = now
            self._allowed = self._threshold = max(1.0, self._allowed / 2)


class PromptSizes:
    """Upper bounds for the tokens of prompts without their endpoint's tokenizer; answers, which count, tighten them.

    A token is at least a byte of the text; what a chat template adds is allowed for. Once enough prompts are known, a
    byte counts for the most tokens that one had in any of them, with a margin.
    """

    def __init__(self) -> None:
        self._densest = 0.0
        self._known = 0

    def bound(self, messages: Sequence[Message]) -> int:
        """Tokens that the prompt has at most."""
        density = 1.0 if self._known < _ENOUGH else min(1.0, _MARGIN * self._densest)
        return _frame(messages) + round(density * prompt_bytes(messages)) + 1

    def learn(self, messages: Sequence[Message], tokens: int) -> None:
        """Say how long a prompt really was."""
        if tokens > 0:
            self._known += 1
            self._densest = max(self._densest, (tokens - _frame(messages)) / prompt_bytes(messages))


def _frame(messages: Sequence[Message]) -> int:
    return _OF_A_PROMPT + _OF_A_MESSAGE * len(messages)


def prompt_bytes(messages: Sequence[Message]) -> int:
    """Of their contents, in UTF-8."""
    return sum(len(message.content.encode()) for message in messages)

"""How fast an endpoint may be asked: exact limits in a rolling window, and a concurrency that adapts.

Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from terselm.errors import ConfigError

WINDOW = 60.0
"""Seconds."""


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
        """Say that the request goes out only now."""
        reservation.sent = asyncio.get_running_loop().time()
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

"""How fast an endpoint may be asked: exact limits in a rolling window, and a concurrency that adapts.

Time is the event loop's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from terselm.errors import ConfigError

WINDOW = 60.0
"""Seconds."""


@dataclass(eq=False)
class Reservation:
    """A share of a limit, from the moment it was granted."""

    granted: float
    amount: int
    counts: bool = True


class RollingLimit:
    """At most ``limit`` units in *any* window, not only in those that begin on the minute.

    A unit counts from the moment it is granted. Whoever does not know yet how much it will use reserves the most, and
    settles afterwards; what it did not use is free again at once.

    Args:
        limit: units in a window.
        window: seconds.
        slack: seconds for which a unit counts longer, since requests take differently long to reach the endpoint,
            which measures there.
        name: for messages.
    """

    def __init__(self, limit: int, *, window: float = WINDOW, slack: float = 0.5, name: str = "units") -> None:
        self.limit, self.name = limit, name
        self._kept = window + slack
        self._reservations: deque[Reservation] = deque()
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
                oldest = self._reservations[0].granted
                try:
                    async with asyncio.timeout(max(1e-3, oldest + self._kept - now)):
                        await self._freed.wait()
                except TimeoutError:
                    continue

    def settle(self, reservation: Reservation, used: int) -> None:
        """Say what was really used; nothing happens where the reservation is forgotten already."""
        if reservation.counts and used != reservation.amount:
            self._used += used - reservation.amount
            reservation.amount = used
            self._freed.set()

    def remember(self, ago: float, amount: int) -> None:
        """Count what another process used, ``ago`` seconds before now; from the oldest on, before anything else."""
        self._grant(asyncio.get_running_loop().time() - ago, amount)

    def _grant(self, when: float, amount: int) -> Reservation:
        reservation = Reservation(granted=when, amount=amount)
        self._reservations.append(reservation)
        self._used += amount
        return reservation

    def _forget(self, now: float) -> None:
        while self._reservations and self._reservations[0].granted + self._kept <= now:
            gone = self._reservations.popleft()
            gone.counts = False
            self._used -= gone.amount


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

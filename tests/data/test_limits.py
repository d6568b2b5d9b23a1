"""Limits in a rolling window, on a clock that runs as fast as the test does, and once on a real one."""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections.abc import Coroutine
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.data.collection.admission import AdaptiveConcurrency, RollingLimit
from terselm.errors import ConfigError


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeps take no time: where nothing is ready, the clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def most_in_a_window(used: list[tuple[float, int]], window: float) -> int:
    """The most units that any window holds, wherever it begins: it is enough to look at those that begin at a use."""
    used = sorted(used)
    times = [when for when, _ in used]
    sums = [0, *accumulate(amount for _, amount in used)]
    return max(sums[bisect_left(times, when + window)] - sums[index] for index, when in enumerate(times))


async def ask(limit: RollingLimit, *, workers: int, until: float, seed: int = 0) -> list[tuple[float, int]]:
    """Workers that ask and ask; what each request used, and when it reached the endpoint."""
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    used: list[tuple[float, int]] = []

    async def work() -> None:
        while loop.time() < until:
            reservation = await limit.reserve(400)
            await asyncio.sleep(chance.uniform(0.0, 0.4))  # written down first
            limit.sent(reservation)
            await asyncio.sleep(chance.uniform(0.0, 0.9))  # on the way
            amount = chance.randint(100, 350)
            used.append((loop.time(), amount))
            await asyncio.sleep(chance.uniform(0.1, 2.0))
            limit.settle(reservation, amount)

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
    return used


@pytest.mark.parametrize("per_minute", [50_000, 500_000])
def test_the_limit_is_reached_and_never_passed(per_minute: int) -> None:
    minutes = 10
    used = run(ask(RollingLimit(per_minute), workers=per_minute // 2000, until=60.0 * minutes))
    steady = [(when, amount) for when, amount in used if when < 60 * minutes]
    assert most_in_a_window(used, 60.0) <= per_minute
    assert sum(amount for _, amount in steady) >= 0.95 * per_minute * minutes


@settings(max_examples=40, deadline=None)
@given(st.integers(400, 5000), st.integers(1, 30), st.floats(0.5, 5.0), st.integers(0, 2**31))
def test_no_window_passes_it(limit: int, workers: int, window: float, seed: int) -> None:
    async def main() -> list[tuple[float, int]]:
        return await ask(RollingLimit(limit, window=window), workers=workers, until=20.0, seed=seed)

    assert most_in_a_window(run(main()), window) <= limit


def test_what_another_process_used_counts() -> None:
    async def main() -> float:
        limit = RollingLimit(100, lag=0)
        limit.remember(50.0, 70)
        limit.remember(10.0, 20)
        await limit.reserve(10)
        await limit.reserve(70)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(10.0)


def test_a_request_that_goes_out_after_its_reservation_has_ended_counts_once() -> None:
    async def main() -> float:
        limit = RollingLimit(100, window=1.0, lag=0.3)
        reservation = await limit.reserve(80)
        await asyncio.sleep(1.5)
        await limit.reserve(20)  # for which the 80 are free again
        limit.sent(reservation)  # at 1.5 s: it counts until 2.8 s
        await limit.reserve(80)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(2.8)


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    async def main() -> list[int]:
        limit, order = RollingLimit(100, lag=0), []

        async def take(amount: int) -> None:
            await limit.reserve(amount)
            order.append(amount)

        async with asyncio.TaskGroup() as group:
            for amount in (60, 90, 30, 10):
                group.create_task(take(amount))
        return order

    assert run(main()) == [60, 90, 30, 10]


def test_a_request_that_never_fits() -> None:
    with pytest.raises(ConfigError, match="may use up to 101 tokens, more than the 100 a minute"):
        run(RollingLimit(100, name="tokens").reserve(101))


def test_on_a_real_clock() -> None:
    """A window of half a second, so that it takes two seconds."""
    window = 0.5

    async def main() -> list[tuple[float, int]]:
        limit, used = RollingLimit(1000, window=window, lag=0.02), []

        async def work() -> None:
            while time.monotonic() - started < 2.0:
                reservation = await limit.reserve(50)
                used.append((time.monotonic(), 40))
                await asyncio.sleep(0.005)
                limit.settle(reservation, 40)

        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(work())
        return used

    used = asyncio.run(main())
    assert most_in_a_window(used, window) <= 1000
    assert len(used) * 40 >= 1000


def test_concurrency_doubles_until_a_burst_of_refusals_halves_it_once_and_then_creeps() -> None:
    async def main() -> list[int]:
        gate, seen = AdaptiveConcurrency(64, start=8), []

        async def fill() -> int:
            held = [gate.slot() for _ in range(100)]
            tasks = [asyncio.ensure_future(slot.__aenter__()) for slot in held]
            await asyncio.sleep(0.1)
            count = gate.running
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0.1)
            for slot, task in zip(held, tasks, strict=True):
                if not task.cancelled():
                    await slot.__aexit__(None, None, None)
            return count

        for answers in (0, 8, 1000):
            for _ in range(answers):
                gate.succeeded()
            seen.append(await fill())
        for _ in range(20):
            gate.overloaded()
        seen.append(await fill())
        for _ in range(33):
            gate.succeeded()
        seen.append(await fill())
        return seen

    assert run(main()) == [8, 16, 64, 32, 33]

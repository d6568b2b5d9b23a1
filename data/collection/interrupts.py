"""Ctrl-C and SIGTERM end a run in good order: what was paid for is waited for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on the first interrupt; a second one is Python's. For use within an event loop."""
    loop = asyncio.get_running_loop()
    caught: list[signal.Signals] = []

    def release() -> None:
        while caught:
            loop.remove_signal_handler(caught.pop())

    def interrupted() -> None:
        release()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            loop.add_signal_handler(number, interrupted)
            caught.append(number)
    try:
        yield
    finally:
        release()

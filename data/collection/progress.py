"""Tell the user how far a collection is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from terselm.data.collection.entries import Outcome, State

_log = logging.getLogger(__name__)
_EVERY = 30.0  # seconds between lines


class Progress:
    """Answers done, failed and in flight, tokens per second, cost so far, and time left.

    Args:
        total: requests that this run is to ask.
        what: of the bar.
    """

    def __init__(self, total: int, what: str) -> None:
        self._total = total
        self._started = self._said = time.perf_counter()
        self._done = self._failed = self._tokens = self._flying = 0
        self._cost = 0.0
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit="answer", delay=2, smoothing=0.05)

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
        self._done += outcome.state is State.DONE
        self._failed += outcome.state is not State.DONE
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update()
        elif time.perf_counter() - self._said >= _EVERY:
            self._said = time.perf_counter()
            ended = self._done + self._failed
            left = (self._total - ended) * (self._said - self._started) / ended
            _log.info("%s of %s answers, %s, %s left", ended, self._total, self._figures(), duration(left))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _figures(self) -> str:
        speed = self._tokens / max(1e-9, time.perf_counter() - self._started)
        cost = f", cost {self._cost:.4f}" if self._cost else ""
        return f"{self._failed} failed, {self._flying} in flight, {speed:,.0f} tokens/s{cost}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Such as ``1 h 05 min``, ``12 min 08 s`` or ``9 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

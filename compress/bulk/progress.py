"""Tell the user how far a bulk run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

_log = logging.getLogger(__name__)
_EVERY = 30.0  # seconds between lines


class Progress:
    """Prompts done, prompts per second and time left.

    Args:
        total: rows of the source.
        done: of these, how many were done before; they do not count for the speed.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self._started = self._said = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc="compressing", unit="prompt", smoothing=0.05)

    def update(self, done: int) -> None:
        """Say that so many rows are done."""
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif done > self._before and now - self._said >= _EVERY:
            self._said = now
            rate = (done - self._before) / (now - self._started)
            left = duration((self._total - done) / rate)
            _log.info("%s of %s prompts, %s prompts/s, %s left", f"{done:,}", f"{self._total:,}", f"{rate:,.1f}", left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Such as ``1 h 05 min``, ``12 min 08 s`` or ``9 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

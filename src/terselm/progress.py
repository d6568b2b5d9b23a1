"""Tell the user how far a long task is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger(__name__)
_EVERY = 30.0  # seconds between lines


class Progress:
    """What is done, how fast, and the time left; a context manager.

    Args:
        total: steps of the whole task.
        what: is being done, such as ``compressing``.
        unit: of a step, in the singular.
        done: steps that were done before this run; they do not count for the speed.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0) -> None:
        self._total, self._unit = total, unit
        self._done = self._before = done
        self._started = self._said = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, delay=2, smoothing=0.05)

    def update(self, n: int = 1, figures: str = "") -> None:
        """Count ``n`` more steps.

        Args:
            figures: what else there is to say, such as ``3 failed, 1,200 tokens/s``.
        """
        self._done += n
        now = time.perf_counter()
        if self._bar is not None:
            if figures:
                self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(n)
        elif self._done > self._before and now - self._said >= _EVERY:
            self._said = now
            rate = (self._done - self._before) / (now - self._started)
            left = duration((self._total - self._done) / rate)
            count = f"{self._done:,} of {self._total:,} {self._unit}s"
            _log.info(", ".join(filter(None, [count, figures, f"{rate:,.1f} {self._unit}s/s", f"{left} left"])))

    def close(self) -> None:
        """Leave the bar as it is; nothing more is said."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Such as ``9 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, over = divmod(minutes, 60)
    if hours:
        return f"{hours} h {over:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def say(line: str) -> None:
    """Print one line for the user; standard output is kept for results."""
    print(line, file=sys.stderr, flush=True)

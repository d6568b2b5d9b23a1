"""Budgets as the paper names them, in the target's tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from terselm.compress.counter import Count
from terselm.errors import ConfigError
from terselm.evaluate.items import Item, full_text

_SHOTS = {"half": 0.5, "quarter": 0.25, "one": 1.0}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget for every prompt: exactly one of its figures is given.

    Attributes:
        name: as the user wrote it.
        shots: mean demonstrations beside the instruction and the question.
        tokens: for each prompt.
        rate: share of each prompt's tokens.
    """

    name: str
    shots: float | None = None
    tokens: int | None = None
    rate: float | None = None

    def of(self, item: Item, count: Count) -> int:
        """Tokens for one prompt, at least 1."""
        if self.tokens is not None:
            return self.tokens
        if self.rate is not None:
            return max(1, math.floor(self.rate * count(full_text(item.prompt))))
        assert self.shots is not None
        demonstrations = [count(f"\n\n{text}") for text in item.prompt.demonstrations if text]
        mean = sum(demonstrations) / len(demonstrations) if demonstrations else 0.0
        return max(1, count(full_text(item.bare)) + math.floor(self.shots * mean))


def parse_budget(text: str) -> Budget:
    """Read "1-shot", "half-shot", "2.5-shot", "300" or "0.2".

    Raises:
        ConfigError: none of these.
    """
    if match := re.fullmatch(r"(half|quarter|one|\d+(?:\.\d+)?)[- ]shot", text.strip()):
        return Budget(name=text.strip(), shots=_SHOTS.get(match[1]) or float(match[1]))
    if re.fullmatch(r"[1-9]\d*", text.strip()):
        return Budget(name=text.strip(), tokens=int(text))
    if re.fullmatch(r"0?\.\d+", text.strip()) and float(text) > 0:
        return Budget(name=text.strip(), rate=float(text))
    raise ConfigError(
        f"budget {text!r} is none; expected such as '1-shot', 'half-shot', '300' (tokens) or '0.2' (a share of them)"
    )

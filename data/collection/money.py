"""What answers cost, and the point beyond which nothing is sent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from terselm.errors import ConfigError

_MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Price:
    """In any one currency, for a million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * completion_tokens) / _MILLION


FREE = Price(input=0.0, output=0.0)


def read_price(path: Path, model: str) -> Price:
    """The price of a model from a YAML table: ``MODEL: {input: …, output: …}``, for a million tokens.

    Raises:
        ConfigError: no such file, no such model in it, or not such a table.
    """
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"price table {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"price table {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(table, dict) or model not in table:
        known = ", ".join(map(str, table)) if isinstance(table, dict) else "nothing"
        raise ConfigError(f"price table {path} has no price for {model!r}; it has {known}")
    entry = table[model]
    numbers = isinstance(entry, dict) and all(
        isinstance(entry.get(name), int | float) and entry[name] >= 0 for name in ("input", "output")
    )
    if not numbers or set(entry) != {"input", "output"}:
        raise ConfigError(f"price table {path}: {model} is {entry!r}; expected input and output, for a million tokens")
    return Price(input=float(entry["input"]), output=float(entry["output"]))


class SpentError(Exception):
    """Nothing more may be sent."""


class Budget:
    """Hard stops. What a request could cost at most is set aside before it is sent, so the limit is never passed.

    Args:
        max_cost: in the currency of the price table; None is no limit.
        max_requests: sent in all, with those that failed.
        spent, sent: of earlier runs on the same ledger.
    """

    def __init__(self, max_cost: float | None, max_requests: int | None, *, spent: float = 0.0, sent: int = 0) -> None:
        self._max_cost, self._max_requests = max_cost, max_requests
        self.spent, self.sent = spent, sent
        self._reserved, self._pending = 0.0, 0
        self._settled = asyncio.Condition()

    async def reserve(self, cost: float) -> None:
        """Set aside the cost of a request; waits while requests in flight may turn out cheaper.

        Raises:
            SpentError: naming the limit that was reached.
        """
        async with self._settled:
            while True:
                if self._max_requests is not None and self.sent >= self._max_requests:
                    raise SpentError(f"max_requests: {self.sent} requests were sent")
                if self._max_cost is None or self.spent + self._reserved + cost <= self._max_cost:
                    self._reserved += cost
                    self._pending += 1
                    self.sent += 1
                    return
                if not self._pending:
                    raise SpentError(
                        f"max_cost: {self.spent:.4f} is spent, and the next request may cost up to {cost:.4f}"
                    )
                await self._settled.wait()

    async def release(self, reserved: float, cost: float, *, sent: bool) -> None:
        """Put what a request really cost in the place of what was set aside for it."""
        async with self._settled:
            self.spent += cost
            self.sent -= not sent
            self._pending -= 1
            # sums of floats leave crumbs, which must not look like a request in flight
            self._reserved = self._reserved - reserved if self._pending else 0.0
            self._settled.notify_all()

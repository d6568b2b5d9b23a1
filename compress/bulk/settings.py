"""How to compress a file of prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from terselm.compress.protect import Keep, compile_keep
from terselm.compress.settings import CompressionSettings
from terselm.compress.target import Target
from terselm.errors import ConfigError

_WITHOUT_EFFECT = ("cache_bytes",)  # settings that change no result


@dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """How to compress a file.

    Attributes:
        model: name of the small LM; results of different models are not mixed.
        dtype: its number format, likewise.
        budget: tokens allowed, for rows that say nothing else.
        rate: instead, the fraction to keep; with neither, each row must give its own.
        keep: what must survive, in every row.
        counter: tokenizer in which budgets are counted; by default the small LM's.
        compression: the settings of the compressor.
        batch_size: rows that are compressed, and committed to disk, together.

    Raises:
        ConfigError, BudgetError: a value out of its range.
    """

    model: str
    dtype: str = "auto"
    budget: int | None = None
    rate: float | None = None
    keep: Sequence[Keep] = ()
    counter: str | None = None
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.budget is not None or self.rate is not None:
            Target(budget=self.budget, rate=self.rate)
        if isinstance(self.keep, str | re.Pattern):
            object.__setattr__(self, "keep", (self.keep,))
        compile_keep(self.keep)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; expected at least 1 row")

    def binding(self) -> dict[str, Any]:
        """What a result depends on, as plain values."""
        compression = {key: value for key, value in asdict(self.compression).items() if key not in _WITHOUT_EFFECT}
        keep = [(item.pattern, item.flags) if isinstance(item, re.Pattern) else repr(item) for item in self.keep]
        own = {name: getattr(self, name) for name in ("model", "dtype", "budget", "rate", "counter")}
        return own | {"keep": keep} | compression

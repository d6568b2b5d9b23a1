"""What a bulk run does with a batch: compress its rows together, and find those that cannot be compressed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from terselm.compress.bulk.files import Output, SourceRow
from terselm.compress.bulk.rows import PromptRow, read_prompt_row, result_values
from terselm.compress.compressor import PromptCompressor
from terselm.compress.counter import resolve_counter
from terselm.compress.length import Length
from terselm.compress.prompt import Keep, compile_keep
from terselm.compress.settings import CompressionSettings
from terselm.data.jsonl import Json
from terselm.errors import BudgetError, ConfigError, ContextLengthError, PromptError, TerseLMError

_WITHOUT_EFFECT = ("cache_bytes",)  # settings that change no result
_FAULTS_OF_A_ROW = (BudgetError, PromptError, ContextLengthError)


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
            Length(budget=self.budget, rate=self.rate)
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


class Worker:
    """Turns rows into entries of a journal.

    Args:
        output: what the rows are for; a row that it cannot hold is set aside.
    """

    def __init__(self, compressor: PromptCompressor, output: Output, settings: BulkSettings) -> None:
        self._compressor = compressor
        self._output = output
        self._settings = settings
        self._count = resolve_counter(settings.counter)

    def entries(self, rows: Sequence[SourceRow]) -> list[Json]:
        """One entry a row, in order: ``{"line": n, "result": {…}}``, or ``{"line": n, "reason": "…"}``.

        Raises:
            Exception: what the compressor raises when it no longer works at all.
        """
        entries: dict[int, Json] = {}
        readable = []
        for row in rows:
            try:
                readable.append(self._read(row))
            except (TerseLMError, ValueError, TypeError, RecursionError) as error:
                entries[row.number] = _rejection(row.number, error)
        entries |= {entry["line"]: entry for entry in self._try(readable)}
        return [entries[row.number] for row in rows]

    def _read(self, row: SourceRow) -> PromptRow:
        values = row.values()
        self._output.check(values)
        return read_prompt_row(row.number, values, self._settings.budget, self._settings.rate)

    def _try(self, rows: Sequence[PromptRow]) -> list[Json]:
        """Compress together; what fails is halved until the guilty row stands alone."""
        try:
            return self._compress(rows)
        except Exception as error:
            if len(rows) == 1:
                return [self._blame(rows[0], error)]
        # Not inside the handler: the error holds on to the tensors of the batch.
        half = len(rows) // 2
        return self._try(rows[:half]) + self._try(rows[half:])

    def _compress(self, rows: Sequence[PromptRow]) -> list[Json]:
        if not rows:
            return []
        results = self._compressor.compress_batch(
            [row.prompt for row in rows],
            lengths=[row.length for row in rows],
            keep=self._settings.keep,
            counter=self._count,
        )
        return [
            {"line": row.number, "result": result_values(result)} for row, result in zip(rows, results, strict=True)
        ]

    def _blame(self, row: PromptRow, error: Exception) -> Json:
        """The rejection of a row, unless the machine is at fault: a GPU that failed once fails ever after."""
        if not isinstance(error, _FAULTS_OF_A_ROW):
            # The number makes it a text that was not read before.
            self._compressor.compress_text(f"Row {row.number} failed, so this is read in its place.", rate=0.5)
        return _rejection(row.number, error)


def _rejection(number: int, error: Exception) -> Json:
    reason = " ".join(str(error).split())
    if not isinstance(error, TerseLMError):
        reason = f"{type(error).__name__}: {reason}"
    return {"line": number, "reason": reason.encode(errors="backslashreplace").decode()}

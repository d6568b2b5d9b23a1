"""Compress the rows of a batch together, and find those that cannot be compressed."""

from __future__ import annotations

from collections.abc import Sequence

from terselm.compress.bulk.files import Output, Row
from terselm.compress.bulk.rows import Request, read_request, result_values
from terselm.compress.bulk.settings import BulkSettings
from terselm.compress.compressor import PromptCompressor
from terselm.compress.counter import resolve_counter
from terselm.data.rows import Json
from terselm.errors import BudgetError, ContextLengthError, PromptError, TerseLMError

_FAULTS_OF_A_ROW = (BudgetError, PromptError, ContextLengthError)


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

    def entries(self, rows: Sequence[Row]) -> list[Json]:
        """One entry a row, in order: ``{"line": n, "result": {…}}``, or ``{"line": n, "reason": "…"}``.

        Raises:
            Exception: what the compressor raises when it no longer works at all.
        """
        entries: dict[int, Json] = {}
        requests = []
        for row in rows:
            try:
                requests.append(self._read(row))
            except (TerseLMError, ValueError, TypeError, RecursionError) as error:
                entries[row.number] = _rejection(row.number, error)
        entries |= {entry["line"]: entry for entry in self._try(requests)}
        return [entries[row.number] for row in rows]

    def _read(self, row: Row) -> Request:
        values = row.values()
        self._output.check(values)
        return read_request(row.number, values, self._settings.budget, self._settings.rate)

    def _try(self, requests: Sequence[Request]) -> list[Json]:
        """Compress together; what fails is halved until the guilty row stands alone."""
        try:
            return self._compress(requests)
        except Exception as error:
            if len(requests) == 1:
                return [self._blame(requests[0], error)]
        # Not inside the handler: the error holds on to the tensors of the batch.
        half = len(requests) // 2
        return self._try(requests[:half]) + self._try(requests[half:])

    def _compress(self, requests: Sequence[Request]) -> list[Json]:
        entries: list[Json] = []
        by_budget = [request for request in requests if request.target.budget is not None]
        by_rate = [request for request in requests if request.target.rate is not None]
        for some in (by_budget, by_rate):
            if some:
                results = self._compressor.compress_batch(
                    [request.prompt for request in some],
                    budget=[request.target.budget or 0 for request in some] if some is by_budget else None,
                    rate=[request.target.rate or 0 for request in some] if some is by_rate else None,
                    keep=self._settings.keep,
                    counter=self._count,
                )
                for request, result in zip(some, results, strict=True):
                    entries.append({"line": request.number, "result": result_values(result)})
        return entries

    def _blame(self, request: Request, error: Exception) -> Json:
        """The rejection of a row, unless the machine is at fault: a GPU that failed once fails ever after."""
        if not isinstance(error, _FAULTS_OF_A_ROW):
            # The number makes it a text that was not read before.
            self._compressor.compress_text(f"Row {request.number} failed, so this is read in its place.", rate=0.5)
        return _rejection(request.number, error)


def _rejection(number: int, error: Exception) -> Json:
    reason = " ".join(str(error).split())
    if not isinstance(error, TerseLMError):
        reason = f"{type(error).__name__}: {reason}"
    return {"line": number, "reason": reason.encode(errors="backslashreplace").decode()}

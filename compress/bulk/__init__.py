"""Compress a file of prompts: resumable, on any number of processes, with bad rows set aside."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from terselm.compress.bulk.files import Output, RowSource, SourceRow, dump_row, open_output, open_source
from terselm.compress.bulk.journals import Journals
from terselm.compress.bulk.rows import PromptRow, read_prompt_row, result_values
from terselm.compress.compressor import PromptCompressor
from terselm.compress.length import Length, resolve_counter
from terselm.compress.prompt import Keep, compile_keep
from terselm.compress.settings import CompressionSettings
from terselm.config import refuse
from terselm.data.rows import Json
from terselm.errors import BudgetError, ConfigError, ContextLengthError, DataFormatError, PromptError, TerseLMError
from terselm.extras import first_line
from terselm.files import atomic_file, locked, remove_partials
from terselm.models.process import Process, current_process
from terselm.progress import Progress

__all__ = ["BulkSettings", "BulkSummary", "compress_file"]

_PATIENCE = 1800.0  # seconds without a sign of the other processes
_POLL = 0.5  # seconds
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
        ConfigError, BudgetError: values out of their range; all of them are named.
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
        if isinstance(self.keep, str | re.Pattern):
            object.__setattr__(self, "keep", (self.keep,))
        faults = list(self._faults())
        if len(faults) == 1:
            raise faults[0]
        refuse(map(str, faults))

    def _faults(self) -> Iterator[TerseLMError]:
        try:
            if self.budget is not None or self.rate is not None:
                Length(budget=self.budget, rate=self.rate)
        except BudgetError as error:
            yield error
        for item in self.keep:
            try:
                compile_keep([item])
            except ConfigError as error:
                yield error
        if self.batch_size < 1:
            yield ConfigError(f"batch_size is {self.batch_size}; expected at least 1 row")

    def binding(self) -> dict[str, Any]:
        """What a result depends on, as plain values."""
        compression = asdict(self.compression)
        del compression["cache_bytes"]  # changes no result
        keep = [(item.pattern, item.flags) if isinstance(item, re.Pattern) else repr(item) for item in self.keep]
        own = {name: getattr(self, name) for name in ("model", "dtype", "budget", "rate", "counter")}
        return own | {"keep": keep} | compression


@dataclass(frozen=True, kw_only=True)
class BulkSummary:
    """What a bulk run did.

    Attributes:
        out: the output.
        rows: in the source.
        rejected: of these, how many were set aside.
        reused: how many were done before, by a run that was cut short.
        original_tokens, compressed_tokens: of all compressed rows.
        rejected_path: where the rejected rows are; None if there are none.
    """

    out: Path
    rows: int
    rejected: int
    reused: int
    original_tokens: int
    compressed_tokens: int
    rejected_path: Path | None

    def __str__(self) -> str:
        text = (
            f"{self.rows - self.rejected:,} of {self.rows:,} prompts compressed ({self.reused:,} rows done before), "
            f"{self.original_tokens:,} tokens to {self.compressed_tokens:,}"
        )
        return f"{text}; {self.rejected:,} rows are set aside in {self.rejected_path}" if self.rejected else text


def compress_file(
    source: Path, out: Path, compressor_factory: Callable[[], PromptCompressor], settings: BulkSettings
) -> BulkSummary | None:
    """Compress every row of a JSON Lines or Parquet file.

    Each batch is committed to a journal beside ``out`` before the next begins, so a run that was killed goes on where
    it stopped when it is started again. ``out`` appears when all rows are done, in the order of the source. Rows that
    cannot be compressed are set aside in ``<name>.rejected.jsonl`` with their numbers and the reason.

    Several processes (see `current_process`) share the rows; all of them need to see the same folders.

    Args:
        source: rows as `read_prompt_row` takes them.
        out: file to make, ``.jsonl`` or ``.parquet``.
        compressor_factory: loads the compressor of ``settings.model``; called only if there is something to compress.
        settings: how to compress.

    Returns:
        what was done; None in all processes but the first.

    Raises:
        ConfigError: ``out`` exists, cannot be written, or belongs to an unfinished run of other settings or another
            source; another process writes it; or pyarrow is missing.
        DataFormatError: ``source`` cannot be read, changed meanwhile, or holds no row that can be compressed.
    """
    process = current_process()
    rows = open_source(source)
    output = open_output(out, rows)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        journals = Journals(out, {"input": rows.digest} | settings.binding(), process.count)
    with ExitStack() as stack:
        with _writing(out):
            stack.enter_context(locked(journals.path(process.index)))
        journals.refresh()
        if out.exists():
            if process.index:  # the first process has found everything done, or complains
                return None
            if not len(journals) == rows.count > 0:  # else it was killed before it could remove the journals
                raise ConfigError(f"{out} exists already; remove it, or name another output")
        run = _BulkRun(source=rows, output=output, out=out, journals=journals, process=process)
        reused = len(journals)
        run.work(compressor_factory, settings)
        if process.index:
            return None
        summary = run.finish(reused)
        journals.remove()
    return summary


@dataclass(frozen=True, kw_only=True)
class _BulkRun:
    """The part of one process in a bulk run."""

    source: RowSource
    output: Output
    out: Path
    journals: Journals
    process: Process

    def work(self, factory: Callable[[], PromptCompressor], settings: BulkSettings) -> None:
        """Compress what is left of this process's share; the first process then waits for the others."""
        pending = self._pending(settings.batch_size)
        first = next(pending, None)
        worker = Worker(factory(), self.output, settings) if first is not None else None
        with _writing(self.out), self._progress() as update:
            if first is not None and worker is not None:
                with self.journals.writer(self.process.index) as commit:
                    for batch in chain([first], pending):  # each is on disk before the next begins
                        commit(worker.entries(batch))
                        update()
            if not self.process.index:
                self._await_others(update)

    def _await_others(self, update: Callable[[], None]) -> None:
        """Wait until every row is in a journal.

        Raises:
            ConfigError: the other processes have given no sign for long.
        """
        heard, sizes = time.monotonic(), self.journals.sizes()
        while (left := self.source.count - len(self.journals)) > 0:
            assert self.process.count > 1
            time.sleep(_POLL)
            update()
            if sizes != (sizes := self.journals.sizes()):
                heard = time.monotonic()
            if time.monotonic() - heard > _PATIENCE:
                raise ConfigError(
                    f"{left} rows are left to other processes, which have written nothing for "
                    f"{_PATIENCE / 60:.0f} minutes; start all processes again, nothing that is done is lost"
                )

    def finish(self, reused: int) -> BulkSummary:
        """Write the outputs."""
        source, out, rejected = self.source, self.out, self.journals.rejected
        if open_source(source.path).digest != source.digest:
            raise DataFormatError(source.path, None, "has changed since the run began; restore it and run this again")
        aside = out.with_name(f"{out.stem}.rejected.jsonl")
        tokens = dict.fromkeys(("original_tokens", "compressed_tokens"), 0)
        with _writing(out), self.journals.open() as entry:

            def result(number: int) -> Json | None:
                outcome = entry(number)
                if "reason" in outcome:
                    return None
                values: Json = outcome["result"]
                for name in tokens:
                    tokens[name] += values[name]
                return values

            self._set_aside(aside, entry)
            if rejected and len(rejected) == source.count:
                reason = entry(min(rejected))["reason"]
                self.journals.remove()
                raise DataFormatError(
                    source.path, None, f"no row could be compressed, the first because: {reason}; {aside} holds all"
                )
            remove_partials(out)
            with atomic_file(out, binary=True) as file:
                self.output.write(file, result)
        path = aside if rejected else None
        return BulkSummary(
            out=out, rows=source.count, rejected=len(rejected), reused=reused, rejected_path=path, **tokens
        )

    def _set_aside(self, path: Path, entry: Callable[[int], Json]) -> None:
        remove_partials(path)
        if not self.journals.rejected:
            path.unlink(missing_ok=True)  # an earlier run's
            return
        with atomic_file(path) as file:
            for row in self.source.rows():
                if row.number in self.journals.rejected:
                    file.write(dump_row({**entry(row.number), "row": row.for_display()}) + "\n")

    def _pending(self, size: int) -> Iterator[list[SourceRow]]:
        """The batches of this process, without the rows that are done."""
        rows, turn = self.source.rows(), 0
        while batch := list(islice(rows, size)):
            left = [row for row in batch if row.number not in self.journals]
            if turn == self.process.index and left:
                yield left
            turn = (turn + 1) % self.process.count

    @contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """Yield a function that tells how far all processes are; it is for the first of them to tell."""
        if self.process.index:
            yield lambda: None
            return
        done = len(self.journals)
        with Progress(self.source.count, "compressing", "prompt", done=done) as progress:

            def update() -> None:
                nonlocal done
                self.journals.refresh()
                progress.update(len(self.journals) - done)
                done = len(self.journals)

            yield update


class Worker:
    """Turns rows into entries of a journal: compresses them together, and finds those that cannot be compressed.

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
                values = row.values()
                self._output.check(values)
                readable.append(read_prompt_row(row.number, values, self._settings.budget, self._settings.rate))
            except (TerseLMError, ValueError, TypeError, RecursionError) as error:
                entries[row.number] = _rejection(row.number, error)
        entries |= {entry["line"]: entry for entry in self._try(readable)}
        return [entries[row.number] for row in rows]

    def _try(self, rows: Sequence[PromptRow]) -> list[Json]:
        """Compress together; what fails is halved until the guilty row stands alone."""
        if not rows:
            return []
        prompts, lengths = [row.prompt for row in rows], [row.length for row in rows]
        try:
            results = self._compressor.compress_batch(
                prompts, lengths=lengths, keep=self._settings.keep, counter=self._count
            )
            values = map(result_values, results)
            return [{"line": row.number, "result": each} for row, each in zip(rows, values, strict=True)]
        except Exception as error:
            if len(rows) == 1:
                return [self._blame(rows[0], error)]
        # Not inside the handler: the error holds on to the tensors of the batch.
        half = len(rows) // 2
        return self._try(rows[:half]) + self._try(rows[half:])

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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {first_line(error)}; nothing that is done is lost: remove the cause and run it again"
        ) from None

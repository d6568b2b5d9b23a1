"""Compress a file of prompts: resumable, on any number of processes, with bad rows set aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from terselm.compress.bulk.files import Output, RowSource, SourceRow, dump_row, open_output, open_source
from terselm.compress.bulk.journals import Journals
from terselm.compress.bulk.work import BulkSettings, Worker
from terselm.compress.compressor import PromptCompressor
from terselm.data.journal import locked
from terselm.data.jsonl import Json
from terselm.errors import ConfigError, DataFormatError
from terselm.extras import first_line
from terselm.files import atomic_file, remove_partials
from terselm.models.process import Process, current_process
from terselm.progress import Progress

__all__ = ["BulkSettings", "BulkSummary", "compress_file"]

_PATIENCE = 1800.0  # seconds without a sign of the other processes
_POLL = 0.5  # seconds


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
                self._compress(worker, chain([first], pending), update)
            if not self.process.index:
                self._await_others(update)

    def _compress(self, worker: Worker, batches: Iterator[list[SourceRow]], update: Callable[[], None]) -> None:
        """Each batch is on disk before the next begins."""
        with self.journals.writer(self.process.index) as commit:
            for batch in batches:
                commit(worker.entries(batch))
                update()

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
        return BulkSummary(
            out=out,
            rows=source.count,
            rejected=len(rejected),
            reused=reused,
            rejected_path=aside if rejected else None,
            **tokens,
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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {first_line(error)}; nothing that is done is lost: remove the cause and run it again"
        ) from None

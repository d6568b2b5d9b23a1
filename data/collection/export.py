"""From the ledger to the files: records, what failed, log-probabilities. Each appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from terselm.data.collection.ledger import Ledger, State
from terselm.data.collection.plan import Request
from terselm.data.collection.settings import CollectSettings
from terselm.data.formats import Format, record_to_object
from terselm.data.journal import lock_of
from terselm.data.records import read_records
from terselm.data.rows import dump_object
from terselm.errors import ConfigError
from terselm.files import atomic_file
from terselm.models.process import Process


def failures_of(out: Path) -> Path:
    """Where requests without a record are listed."""
    return out.with_name(f"{out.stem}.failures.jsonl")


def logprobs_of(out: Path) -> Path:
    """Where the log-probabilities are."""
    return out.with_name(f"{out.stem}.logprobs.parquet")


def take_in(out: Path, ledger: Ledger, requests: Sequence[Request]) -> None:
    """Take the records that ``out`` holds into the ledger, so that writing the file anew loses none.

    Raises:
        ConfigError: it holds records that these instructions and settings do not make, and the ledger does not know.
        DataFormatError: it is damaged.
    """
    if not out.exists():
        return
    planned = {request.id for request in requests}
    states = ledger.states()
    strangers = 0
    for record in read_records(out, Format.RECORDS):
        if record.id in states and (states[record.id] is State.DONE or record.id not in planned):
            continue
        if record.id in planned and record.generation is not None:
            ledger.adopt(record.id, record_to_object(record))
        else:
            strangers += 1
    if strangers:
        raise ConfigError(
            f"{out} holds {strangers} records of other instructions or settings, which would be lost; "
            "name another file, or move this one away"
        )


def export_records(ledger: Ledger, requests: Iterable[Request], out: Path) -> int:
    """Write the records that there are, in the order of the requests; return how many. None are written as no file."""
    done = {name for name, state in ledger.states().items() if state is State.DONE}
    names = [request.id for request in requests if request.id in done]
    if names:
        with atomic_file(out) as file:
            for name in names:
                file.write(dump_object(ledger.record(name) or {}) + "\n")
    return len(names)


def export_failures(ledger: Ledger, requests: Sequence[Request], out: Path) -> int:
    """List the requests that will have no record, each with its reason; no file where there are none."""
    path = failures_of(out)
    without_record = ledger.without_record()
    lost = [request for request in requests if request.id in without_record]
    if not lost:
        path.unlink(missing_ok=True)
        return 0
    with atomic_file(path) as file:
        for request in lost:
            line = {"id": request.id, "instruction": request.instruction.id, "temperature": request.temperature}
            file.write(dump_object(line | asdict(without_record[request.id])) + "\n")
    return len(lost)


def export_all(
    ledger: Ledger, requests: Sequence[Request], out: Path, settings: CollectSettings, process: Process
) -> tuple[str, ...]:
    """Write the files; of several processes, the last one to finish does."""
    if process.count > 1 and not _all_done(ledger, requests, settings):
        return ()
    files = []
    lock = lock_of(out.with_name(f"{out.name}.export"))
    with FileLock(lock):  # two that finish at once write the same
        if export_records(ledger, requests, out):
            files.append(out)
        if export_failures(ledger, requests, out):
            files.append(failures_of(out))
        if files[:1] == [out] and settings.logprobs.keep:
            from terselm.data.collection.scores import export_logprobs

            export_logprobs(ledger, requests, logprobs_of(out), settings)
            files.append(logprobs_of(out))
    with suppress(OSError):
        lock.unlink()
    return tuple(map(str, files))


def _all_done(ledger: Ledger, requests: Sequence[Request], settings: CollectSettings) -> bool:
    from terselm.data.collection.scores import unscored

    states = ledger.states()
    if any(states[request.id] is State.WAITING for request in requests):
        return False
    names = [request.id for request in requests]
    return not (settings.logprobs.keep and unscored(ledger, names, settings.logprobs.top_k))

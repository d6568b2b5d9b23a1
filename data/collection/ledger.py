"""The ledger: every request, every attempt at it, and every answer, on disk before it counts.

A SQLite file in WAL mode beside the records. A request's row is keyed by the hash of all that was asked, so that a
changed parameter makes new rows and leaves the old ones alone. An attempt's row is written before the request is sent
and completed when its answer is there; one that was never completed was cut off by a kill, and what it may have cost
counts. Nothing is ever deleted. No other file knows the tables: each question to them has a name here.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from terselm.data.rows import Json, dump_object
from terselm.errors import DataFormatError, TargetLLMError

_VERSION = 1
_PATIENCE = 60.0  # seconds for another process's lock
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY,
    asked TEXT NOT NULL,                -- JSON: instruction, category, messages, model, parameters, sample
    state TEXT NOT NULL DEFAULT 'waiting',
    reason TEXT,                        -- why there is no record
    message TEXT,                       -- what the endpoint said of it
    record TEXT                         -- the record, as JSON, where there is one
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS states ON requests (state);
CREATE TABLE IF NOT EXISTS attempts (
    request TEXT NOT NULL REFERENCES requests (id),
    number INTEGER NOT NULL,
    started REAL NOT NULL,              -- seconds since 1970
    bound_tokens INTEGER NOT NULL,      -- what it could use at most
    bound_cost REAL NOT NULL,
    ended REAL,
    outcome TEXT,                       -- NULL: under way, or cut off by a kill
    message TEXT,
    raw BLOB,                           -- the response, as it came, compressed
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost REAL,
    PRIMARY KEY (request, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    request TEXT PRIMARY KEY REFERENCES requests (id),
    top_k INTEGER NOT NULL,             -- of how many of the likeliest tokens, too
    data BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    token TEXT PRIMARY KEY,             -- ours, also in the batch's metadata at the endpoint
    requests TEXT NOT NULL,             -- JSON: their ids
    batch TEXT,                         -- the endpoint's id, once it is known
    state TEXT NOT NULL DEFAULT 'created'  -- created, submitted, ended
) WITHOUT ROWID;
"""


class State(StrEnum):
    """What became of a request so far.

    Attributes:
        WAITING: to be asked, or asked again.
        DONE: there is a record.
        FAILED: the endpoint did not answer, however often it was asked, or refused.
        FILTERED: a content filter kept the answer back.
        DROPPED: there is an answer, but none that is fit for a record.
    """

    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    FILTERED = "filtered"
    DROPPED = "dropped"


ANSWERED = "answered"
"""Outcome of an attempt that brought a whole answer."""
INTERRUPTED = "interrupted"
"""Outcome of an attempt that a kill cut off; it may have been answered, and charged."""
IMPORTED = "imported"
"""Outcome that stands for a record that was in the file before there was a ledger."""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """An attempt that is about to be made."""

    request: str
    number: int
    bound_tokens: int = 0
    bound_cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, and what that means for its request."""

    request: str
    number: int
    outcome: str
    message: str | None = None
    raw: bytes | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0
    state: State = State.WAITING
    reason: str | None = None
    record: Json | None = None


@dataclass(frozen=True, kw_only=True)
class WithoutRecord:
    """A request that will have no record, and why."""

    state: State
    reason: str
    message: str | None


@dataclass(frozen=True, kw_only=True)
class Use:
    """What one answered request has used, all its draws together."""

    draws: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class OpenBatch:
    """A batch whose answers have not been fetched.

    Attributes:
        token: ours, also in the batch's metadata at the endpoint.
        requests: their ids.
        id: the endpoint's, once it is known.
    """

    token: str
    requests: tuple[str, ...]
    id: str | None


class Ledger:
    """One open ledger.

    Args:
        path: the SQLite file; made where there is none.
        read_only: look at it while another process may be writing.

    Raises:
        DataFormatError: the file is not a ledger, or is damaged.
        TargetLLMError: it cannot be written (in any method), such as on a full disk.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.is_file():
            raise DataFormatError(path, None, "no such ledger; has anything been collected yet?")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._clear_errors():
            # Answers are committed from a thread of their own, one at a time.
            self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            with self._clear_errors():
                self._prepare_in_turn(read_only)
        except BaseException:
            self._db.close()
            raise

    def _prepare_in_turn(self, read_only: bool) -> None:
        """SQLite does not wait by itself while another process switches to the write-ahead log."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._prepare(read_only)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            time.sleep(0.05)

    def _prepare(self, read_only: bool) -> None:
        self._db.execute("BEGIN")  # both from one state: another process may be making the tables
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        self._db.execute("COMMIT")
        if version not in (0, _VERSION) or (version == 0 and tables):
            raise DataFormatError(self.path, None, "is a database, but not a ledger of this version")
        if read_only:
            self._db.execute("PRAGMA query_only=ON")
            if version == 0:
                raise DataFormatError(self.path, None, "is an empty ledger")
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")  # a paid answer survives a power cut too
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}; PRAGMA user_version={_VERSION}; COMMIT;")

    def add(self, requests: Iterable[tuple[str, Json]]) -> None:
        """Note requests (id, what is asked); those that are there already stay as they are."""
        rows = ((name, dump_object(asked)) for name, asked in requests)
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO requests (id, asked) VALUES (?, ?)", rows)

    def states(self) -> dict[str, State]:
        """Of every request, by id."""
        return {name: State(state) for name, state in self._rows("SELECT id, state FROM requests")}

    def begin(self, intents: Iterable[Intent]) -> None:
        """Write down what is about to be sent."""
        now = time.time()
        with self.transaction():
            self._db.executemany(
                "INSERT INTO attempts (request, number, started, bound_tokens, bound_cost) VALUES (?, ?, ?, ?, ?)",
                ((i.request, i.number, now, i.bound_tokens, i.bound_cost) for i in intents),
            )

    def finish(self, outcomes: Iterable[Outcome]) -> None:
        """Commit how attempts ended, with their answers, and what became of their requests."""
        now = time.time()
        with self.transaction():
            for o in outcomes:
                raw = None if o.raw is None else zlib.compress(o.raw)
                self._db.execute(
                    "UPDATE attempts SET ended=?, outcome=?, message=?, raw=?, prompt_tokens=?, completion_tokens=?, "
                    "cost=? WHERE request=? AND number=?",
                    (now, o.outcome, o.message, raw, o.prompt_tokens, o.completion_tokens, o.cost, o.request, o.number),
                )
                self._db.execute(
                    "UPDATE requests SET state=?, reason=?, message=?, record=? WHERE id=? AND state != 'done'",
                    (o.state, o.reason, o.message, o.record and dump_object(o.record), o.request),
                )

    def close_interrupted(self, mine: set[str] | None = None) -> int:
        """Mark the attempts that a kill cut off; return how many. With ``mine``, only of these requests.

        What is in a batch that has not been fetched goes on without us.
        """
        open_ = [
            (request, number)
            for request, number in self._rows(
                "SELECT request, number FROM attempts WHERE outcome IS NULL AND request NOT IN "
                "(SELECT value FROM batches, json_each(batches.requests) WHERE batches.state != 'ended')"
            )
            if mine is None or request in mine
        ]
        with self.transaction():
            self._db.executemany(
                f"UPDATE attempts SET outcome='{INTERRUPTED}', cost=bound_cost WHERE request=? AND number=?", open_
            )
        return len(open_)

    def attempts(self, counting: Sequence[str] = ()) -> dict[str, int]:
        """By request, how many attempts there were; with ``counting``, only those with such outcomes."""
        where = f"WHERE outcome IN ({', '.join('?' * len(counting))})" if counting else ""
        return dict(self._rows(f"SELECT request, count(*) FROM attempts {where} GROUP BY request", counting))

    def used(self) -> tuple[float, int]:
        """(cost, requests sent) in all; what is under way or was cut off counts with what it may cost at most."""
        ((spent, sent),) = self._rows(
            "SELECT coalesce(sum(coalesce(cost, bound_cost)), 0), count(*) FROM attempts WHERE outcome IS NOT ?",
            (IMPORTED,),
        )
        return spent, sent

    def retry(self, states: Sequence[State]) -> int:
        """Let requests in these states be asked again; return how many."""
        with self.transaction():
            marks = ", ".join("?" * len(states))
            return self._db.execute(
                f"UPDATE requests SET state='waiting' WHERE state IN ({marks})", [*map(str, states)]
            ).rowcount

    def adopt(self, request: str, record: Json) -> None:
        """Take in a record that was made before there was a ledger."""
        usage = record["generation"]["usage"]
        with self.transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO attempts (request, number, started, ended, bound_tokens, bound_cost, outcome, "
                f"prompt_tokens, completion_tokens, cost) VALUES (?, 1, 0, 0, 0, 0, '{IMPORTED}', ?, ?, 0)",
                (request, usage["prompt_tokens"], usage["completion_tokens"]),
            )
            self._db.execute("UPDATE requests SET state='done', record=? WHERE id=?", (dump_object(record), request))

    def record(self, request: str) -> Json | None:
        """The record of a request, if there is one."""
        for (text,) in self._rows("SELECT record FROM requests WHERE id=? AND record IS NOT NULL", (request,)):
            return dict(json.loads(text))
        return None

    def raw(self, request: str) -> bytes | None:
        """The response that a request's record was made from, as it came."""
        query = f"SELECT raw FROM attempts WHERE request=? AND outcome='{ANSWERED}' ORDER BY number DESC LIMIT 1"
        for (raw,) in self._rows(query, (request,)):
            return None if raw is None else zlib.decompress(raw)
        return None

    def put_scores(self, scores: Iterable[tuple[str, bytes]], top_k: int) -> None:
        """Commit the log-probabilities of requests' texts, with those of the ``top_k`` likeliest tokens."""
        with self.transaction():
            rows = ((request, top_k, data) for request, data in scores)
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def scored(self, top_k: int) -> set[str]:
        """The requests that have scores, with at least so many likeliest tokens."""
        return {request for (request,) in self._rows("SELECT request FROM scores WHERE top_k >= ?", (top_k,))}

    def scores(self, request: str) -> bytes | None:
        """What `put_scores` was given."""
        for (data,) in self._rows("SELECT data FROM scores WHERE request=?", (request,)):
            return bytes(data)
        return None

    def sent_since(self, when: float) -> list[tuple[float, int]]:
        """(seconds since 1970, tokens used or that it may have used) of each attempt that began after ``when``."""
        return list(
            self._rows(
                "SELECT started, CASE WHEN outcome = ? THEN prompt_tokens + completion_tokens "
                "WHEN outcome = ? OR cost > 0 THEN bound_tokens ELSE 0 END FROM attempts WHERE started > ? "
                "ORDER BY started",
                (ANSWERED, INTERRUPTED, when),
            )
        )

    def asked(self, request: str) -> Json:
        """What `add` was given."""
        ((text,),) = self._rows("SELECT asked FROM requests WHERE id=?", (request,))
        return dict(json.loads(text))

    def without_record(self) -> dict[str, WithoutRecord]:
        """By id, the requests that will have no record unless they are asked again."""
        rows = self._rows(
            "SELECT id, state, reason, message FROM requests WHERE state IN (?, ?, ?)",
            (State.FAILED, State.FILTERED, State.DROPPED),
        )
        return {
            name: WithoutRecord(state=State(state), reason=reason, message=message)
            for name, state, reason, message in rows
        }

    def uses(self) -> dict[str, Use]:
        """By id, what the requests that were answered for good have used."""
        rows = self._rows(
            "SELECT request, count(*), sum(prompt_tokens), sum(completion_tokens) "
            "FROM attempts JOIN requests ON id=request WHERE outcome IN (?, ?) AND state != ? GROUP BY request",
            (ANSWERED, IMPORTED, State.WAITING),
        )
        return {
            name: Use(draws=draws, prompt_tokens=prompt, completion_tokens=completion)
            for name, draws, prompt, completion in rows
        }

    def begin_batch(self, token: str, intents: Sequence[Intent]) -> None:
        """Write down a batch, with its requests, before it is submitted."""
        with self.transaction():
            names = json.dumps([intent.request for intent in intents])
            self._db.execute("INSERT INTO batches (token, requests) VALUES (?, ?)", (token, names))
            self.begin(intents)

    def submitted_batch(self, token: str, name: str) -> None:
        """Note the endpoint's id of a batch."""
        with self.transaction():
            self._db.execute("UPDATE batches SET batch=?, state='submitted' WHERE token=?", (name, token))

    def end_batch(self, token: str) -> None:
        """Note that all answers of a batch have been fetched."""
        with self.transaction():
            self._db.execute("UPDATE batches SET state='ended' WHERE token=?", (token,))

    def open_batches(self) -> list[OpenBatch]:
        """Batches that have not been fetched."""
        rows = self._rows("SELECT token, requests, batch FROM batches WHERE state != 'ended'")
        return [OpenBatch(token=token, requests=tuple(json.loads(names)), id=name) for token, names, name in rows]

    def report(self) -> dict[str, Any]:
        """What the ledger holds, in figures.

        ``requests`` by state; ``without_record`` by reason; ``attempts`` by outcome, those under way as ``open``;
        tokens of all answers, dropped ones too; ``cost`` with what attempts without an answer may have cost.
        """
        states = dict(self._rows("SELECT state, count(*) FROM requests GROUP BY state"))
        reasons = self._rows(
            "SELECT reason, count(*) FROM requests WHERE state IN (?, ?, ?) GROUP BY reason ORDER BY 2 DESC",
            (State.FAILED, State.FILTERED, State.DROPPED),
        )
        outcomes = self._rows("SELECT coalesce(outcome, 'open'), count(*) FROM attempts GROUP BY 1 ORDER BY 2 DESC")
        ((prompt, completion),) = self._rows(
            "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM attempts "
            "WHERE outcome IS NOT ?",
            (IMPORTED,),
        )
        figures: dict[str, Any] = {
            "requests": {state.value: states.get(state.value, 0) for state in State},
            "without_record": dict(reasons),
            "attempts": dict(outcomes),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": round(self.used()[0], 6),
        }
        batches = dict(self._rows("SELECT state, count(*) FROM batches GROUP BY state"))
        return figures | ({"batches": batches} if batches else {})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and on disk at the end; one within another is part of it."""
        if self._busy():
            yield
            return
        with self._clear_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._busy():
                    self._db.execute("ROLLBACK")
                raise

    def _busy(self) -> bool:
        return self._db.in_transaction

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        with self._clear_errors():
            yield from self._db.execute(sql, values)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise TargetLLMError(
                f"the ledger {self.path} cannot be used: {error}; what is committed in it is safe: remove the cause, "
                "and run the command again"
            ) from None
        except sqlite3.DatabaseError as error:
            raise DataFormatError(self.path, None, f"is not a ledger, or damaged: {error}") from None


def ledger_of(out: Path) -> Path:
    """Where the ledger of a records file is."""
    return out.with_name(out.name + ".ledger")


def status(path: Path) -> dict[str, Any]:
    """The figures (see `Ledger.report`) of a ledger that another process may be writing.

    Raises:
        DataFormatError: there is no such ledger, or it is damaged.
    """
    with Ledger(path, read_only=True) as ledger:
        return ledger.report()

"""Two thousand requests to a server that fails in every way, and a hundred kill -9 on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from faulty_server import answer_to, fate

from terselm.data.records import read_records

REQUESTS, KILLS = 2000, 100
KEY = "sk-test-0123456789abcdef"
TAGS = ("refused", "filtered", "cut", "broken", "empty")
REASONS = {
    "refused": ("failed", "bad_request"),
    "filtered": ("filtered", "content_filter"),
    "cut": ("filtered", "content_filter"),
    "broken": ("failed", "server_error"),
    "empty": ("dropped", "empty"),
}
COMMAND = [sys.executable, "-c", "from terselm.cli import main; main()", "collect"]
# The server fails a third of the attempts by chance: fifteen tries more leave none of 2,000 requests to it.
SETTINGS = ["concurrency=16", "timeout=2", "backoff=0.02", "longest_pause=1", "retries=15"]
SETTINGS = [f"limits.{setting}" for setting in SETTINGS]


@pytest.fixture
def endpoint() -> Iterator[str]:
    script = Path(__file__).with_name("faulty_server.py")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


class Watch:
    """Looks at the ledger from outside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def ended(self) -> int:
        """Requests that are done or given up."""
        try:
            return int(self.rows("SELECT count(*) FROM requests WHERE state != 'waiting'")[0][0])
        except sqlite3.OperationalError:  # not there yet
            return 0

    def rows(self, sql: str) -> list[tuple[str, ...]]:
        if self._db is None:
            self._db = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, timeout=60)
        return self._db.execute(sql).fetchall()


def prompt(number: int) -> str:
    tag = f"[{TAGS[number // 40 % len(TAGS)]}] " if number % 40 == 39 else ""
    return f"{tag}Question number {number}?"


def kill_at_random(process: subprocess.Popen[bytes], watch: Watch, chance: random.Random) -> None:
    """At some time after the start, or after some more answers; at the latest before the work is done."""
    until = time.monotonic() + chance.uniform(0.1, 2.0) if chance.random() < 0.2 else float("inf")
    more = watch.ended() + (30 if until < float("inf") else chance.randint(0, 22))
    while time.monotonic() < until and watch.ended() < more:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_nothing_that_was_committed_is_lost_or_doubled(tmp_path: Path, endpoint: str) -> None:
    ask, out = tmp_path / "ask.jsonl", tmp_path / "out" / "records.jsonl"
    out.parent.mkdir()
    ask.write_text("".join(json.dumps({"id": f"i{n}", "prompt": prompt(n)}) + "\n" for n in range(REQUESTS)))
    command = [*COMMAND, "--instructions", ask, "--out", out, "--endpoint", f"{endpoint}/v1", "--model", "m"]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    watch, chance = Watch(out.with_name("records.jsonl.ledger")), random.Random(0)
    committed: dict[str, str] = {}
    with (tmp_path / "out" / "log").open("wb") as log:
        for _ in range(KILLS):
            process = subprocess.Popen([*command, *SETTINGS], env=environment, stdout=log, stderr=log)
            kill_at_random(process, watch, chance)
            if watch.ended():
                found = dict(watch.rows("SELECT id, record FROM requests WHERE state = 'done'"))
                assert committed.items() <= found.items()
                committed = found  # type: ignore[assignment]
        before = len(committed)
        subprocess.run([*command, *SETTINGS], env=environment, stdout=log, stderr=log, check=True)

    lines = out.read_text().splitlines()
    records = {record.id: record for record in read_records(out)}
    assert len(records) == len(lines)
    assert all(
        json.loads(committed[name]) == json.loads(line)
        for line in lines
        if (name := json.loads(line)["id"]) in committed
    )
    assert committed.keys() <= records.keys()
    assert Counter(r.messages[0].content for r in records.values()) == Counter(
        prompt(n) for n in range(REQUESTS) if fate(prompt(n)) is None
    )
    assert all(record.response == answer_to(record.messages[0].content) for record in records.values())
    failures = [json.loads(line) for line in out.with_name("records.failures.jsonl").read_text().splitlines()]
    expected = {f"i{n}": REASONS[str(fate(prompt(n)))] for n in range(REQUESTS) if fate(prompt(n))}
    for failure in failures:
        state, reason = expected.pop(failure["instruction"])
        assert failure["state"] == state
        # The last of many attempts may have met another fault of the server's.
        assert reason in (failure["reason"], "server_error")
        assert failure["message"]
    assert not expected
    assert len(failures) + len(records) == REQUESTS
    twice = watch.rows("SELECT request FROM attempts WHERE outcome = 'answered' GROUP BY request HAVING count(*) > 1")
    assert not twice
    secret = [path for path in out.parent.iterdir() if KEY.encode() in path.read_bytes()]
    assert not secret
    outcomes = watch.rows("SELECT outcome, count(*) FROM attempts GROUP BY outcome ORDER BY 2 DESC")
    injected = json.load(urlopen(f"{endpoint}/stats"))["injected"]
    print(f"\n{KILLS} kills, {before} answers committed before the last run; {len(records)} records, each once;")
    print(f"failed for good: {dict(Counter(f['reason'] for f in failures))}; attempts: {dict(outcomes)}")
    print(f"faults of the server: {injected}")

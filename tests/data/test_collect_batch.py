"""The batch interface, against a server of the tests' own, with kill -9 in every step."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import KEY, assert_right, gather, instructions, settings
from faulty_server import Reply, Server, completion, error, fate, serving
from test_collect_remote import command, write

from terselm.data.collection import batch as batches
from terselm.data.collection.batch import split
from terselm.data.collection.ledger import ledger_of, status
from terselm.data.collection.plan import Request, plan_requests
from terselm.data.records import read_records


class BatchServer:
    """Files and batches. A step named in ``hold`` is done, but never replied to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.hold: str | None = None
        self.held = threading.Event()
        self.polls_until_done = 2
        self.polls: Counter[str] = Counter()
        self.leaves_out = 0
        self.refuses = False

    async def __call__(self, server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        step, value = self.act(path, body)
        if step == self.hold:
            self.hold = None
            self.held.set()
            await asyncio.sleep(3600)
        if isinstance(value, Reply):
            return value
        return Reply(body=value if isinstance(value, bytes) else json.dumps(value).encode())

    def act(self, path: str, body: bytes) -> tuple[str, Any]:
        if path == "POST /v1/files":
            content = body.split(b"\r\n\r\n", 1)[1] if b'name="file"' in body.split(b"\r\n\r\n")[0] else body
            lines = re.findall(rb'^\{"custom_id".*\}$', content.replace(b"\r", b""), re.MULTILINE)
            name = f"file-{len(self.files)}"
            self.files[name] = b"\n".join(lines)
            return "upload", {"id": name, "object": "file"}
        if path == "POST /v1/batches":
            asked = json.loads(body)
            name = f"batch-{len(self.batches)}"
            self.batches[name] = {"id": name, "object": "batch", "status": "in_progress", **asked}
            return "create", self.batches[name]
        if path.startswith("GET /v1/batches?"):
            return "list", {"object": "list", "data": list(self.batches.values()), "has_more": False}
        if found := re.fullmatch(r"GET /v1/batches/(\S+)", path):
            return "poll", self.poll(found[1])
        if found := re.fullmatch(r"GET /v1/files/(\S+)/content", path):
            return "fetch", self.files[found[1]]
        return "?", error(404, f"no such thing as {path}")

    def poll(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        self.polls[name] += 1
        if self.refuses:
            errors = {"object": "list", "data": [{"message": "the file is not as it should be", "code": "x"}]}
            return batch | {"status": "failed", "errors": errors}
        if self.polls[name] >= self.polls_until_done and batch["status"] == "in_progress":
            self.answer(batch)
        return batch

    def answer(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for number, line in enumerate(self.files[batch["input_file_id"]].splitlines()):
            asked = json.loads(line)
            prompt = asked["body"]["messages"][-1]["content"]
            if number < self.leaves_out:
                bad.append({"custom_id": asked["custom_id"], "error": {"code": "batch_expired", "message": "expired"}})
            elif fate(prompt) == "refused":
                response = {"status_code": 400, "body": {"error": {"message": f"too long {KEY}", "code": "x"}}}
                bad.append({"custom_id": asked["custom_id"], "response": response, "error": None})
            else:
                response = {"status_code": 200, "body": completion(asked["body"], prompt)}
                good.append({"custom_id": asked["custom_id"], "response": response, "error": None})
        self.leaves_out = 0
        batch["status"] = "completed"
        for kind, lines in (("output_file_id", good), ("error_file_id", bad)):
            batch[kind] = f"{batch['id']}-{kind}" if lines else None
            self.files[f"{batch['id']}-{kind}"] = "\n".join(map(json.dumps, lines[::-1])).encode()


@pytest.fixture
def api() -> BatchServer:
    return BatchServer()


@pytest.fixture
def endpoint(api: BatchServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    server.handle = api
    with serving(server) as url:
        yield url


def test_all_is_asked_in_batches_of_the_allowed_size(
    tmp_path: Path, api: BatchServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = batches.BatchLimits(most_requests=40)
    monkeypatch.setattr(batches, "BatchLimits", lambda: small)
    ask = instructions(99) + instructions(1, "[refused] Question {}?")[:1]
    ask[-1] = type(ask[-1])(id="long", messages=ask[-1].messages)
    api.leaves_out = 3
    summary, records = gather(ask, tmp_path / "r.jsonl", settings(endpoint), batch=True)
    assert (summary.records, summary.without_record, summary.waiting) == (99, {"bad_request": 1}, 0)
    assert_right(records)
    sizes = [len(api.files[batch["input_file_id"]].splitlines()) for batch in api.batches.values()]
    assert (sorted(sizes[:3]), sizes[3:]) == ([20, 40, 40], [3])
    found = status(ledger_of(tmp_path / "r.jsonl"))
    assert (found["attempts"], found["batches"]) == ({"answered": 99, "expired": 3, "bad_request": 1}, {"ended": 4})
    (line,) = (tmp_path / "r.failures.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == "HTTP 400: too long [key]"
    assert not [path for path in tmp_path.iterdir() if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_kill_9_in_every_step_loses_nothing_and_pays_nothing_twice(
    tmp_path: Path, api: BatchServer, endpoint: str
) -> None:
    ask, out = write(tmp_path / "ask.jsonl", 30), tmp_path / "r.jsonl"
    run = command(endpoint, ask, out, "--batch", "limits.batch_poll=0.05")
    for step in ("upload", "create", "list", "poll", "fetch"):
        api.hold = step
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        assert api.held.wait(60), step
        api.held.clear()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    subprocess.run(run, check=True, capture_output=True)
    assert len(api.batches) == 1
    assert len([name for name in api.files if name.startswith("file-")]) == 2  # the first upload had no reply
    records = list(read_records(out))
    assert len(records) == 30
    assert_right(records)
    assert status(ledger_of(out))["attempts"] == {"answered": 30}


def test_a_batch_of_other_settings_is_fetched_all_the_same(tmp_path: Path, api: BatchServer, endpoint: str) -> None:
    """It is paid for, though this run does not ask for it."""
    api.polls_until_done = 10**9
    ask, out = write(tmp_path / "ask.jsonl", 5), tmp_path / "r.jsonl"
    api.hold = "poll"
    process = subprocess.Popen(command(endpoint, ask, out, "--batch"))
    assert api.held.wait(60)
    process.kill()
    process.wait()
    api.polls_until_done = 1
    others, _ = gather(instructions(3), out, settings(endpoint, max_new_tokens=99, limits={}), batch=True)
    assert others.records == 3
    assert status(ledger_of(out))["requests"]["done"] == 8


def test_a_refused_batch_stops_with_the_endpoints_words(tmp_path: Path, api: BatchServer, endpoint: str) -> None:
    from terselm.errors import TargetLLMError

    api.refuses = True
    with pytest.raises(TargetLLMError, match="the endpoint refused the batch \\(the file is not as it should be\\)"):
        gather(instructions(3), tmp_path / "r.jsonl", settings(endpoint), batch=True)
    api.refuses = False
    assert gather(instructions(3), tmp_path / "r.jsonl", settings(endpoint), batch=True)[0].records == 3


def test_costs_are_a_hard_stop(tmp_path: Path, api: BatchServer, endpoint: str) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("m: {input: 1000, output: 5000}\n")
    options = {"batch": True, "prices": prices, "max_cost": 2}
    summary, _ = gather(instructions(50), tmp_path / "r.jsonl", settings(endpoint), **options)
    assert 0 < summary.records < 50
    assert summary.cost <= 2
    assert str(summary.stopped).startswith("max_cost: ")


def test_files_are_split_by_requests_and_bytes() -> None:
    requests = plan_requests(instructions(10), settings("https://x/v1"))

    def line(request: Request) -> bytes:
        return b"x" * 30

    assert [len(part) for part in split(requests, line, 4, 10**9)] == [4, 4, 2]
    assert [len(part) for part in split(requests, line, 100, 95)] == [3, 3, 3, 1]
    assert [len(part) for part in split(requests, line, 100, 10)] == [1] * 10
    assert [request for part in split(requests, line, 4, 95) for request in part] == requests

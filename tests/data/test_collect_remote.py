"""Collecting from an endpoint that fails in every way; the server is our own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from endpoints import KEY, assert_right, gather, instructions, settings
from faulty_server import Faults, Reply, Server, answer_to, chat, error, serving
from test_limits import most_in_a_window

from terselm.data.collection import admission
from terselm.data.collection.admission import RollingLimit
from terselm.data.collection.collect import collect
from terselm.data.collection.ledger import Ledger, ledger_of, status
from terselm.data.collection.settings import Api, CollectSettings, LogProbSettings, Options, PromptTemplate
from terselm.data.logprobs import Given, LogProbFile
from terselm.errors import ConfigError, TargetLLMError


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(server) as url:
        yield url


def test_a_record_says_what_was_asked_and_who_answered(tmp_path: Path, server: Server, endpoint: str) -> None:
    server.keep_requests = True
    given = settings(endpoint, temperatures=[0.0, 0.7], samples=2, seed=3, extra_body={"tier": {"fast": True}})
    summary, records = gather(instructions(5), tmp_path / "r.jsonl", given)
    assert (summary.records, summary.waiting, summary.stopped, summary.without_record) == (15, 0, None, {})
    assert_right(records)
    asked = {str(body["seed"]) + body["messages"][0]["content"]: body for _, body, _ in server.requests}
    for record in records:
        made = record.generation
        assert made is not None
        body = asked[f"{made.parameters['seed']}{record.messages[0].content}"]
        assert body.pop("tier") == {"fast": True}
        sent = {name: value for name, value in body.items() if name not in ("model", "messages")}
        assert made.parameters == sent | {"extra_body": '{"tier": {"fast": true}}'}
        assert (made.model, made.served_model, made.system_fingerprint) == ("m", "served-1", "fp_1")
        assert (made.finish_reason, made.attempts) == ("stop", 1)
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (7, 6)
        assert set(made.versions) == {"terselm", "openai"}
    assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}


def test_every_passing_fault_is_outlasted(tmp_path: Path, server: Server, endpoint: str) -> None:
    server.faults = Faults(
        rate_limit=0.2, server_error=0.1, hang=0.02, drop=0.08, torn=0.05, malformed=0.1, hang_for=10.0
    )
    given = settings(endpoint, limits={"timeout": 1.0, "retries": 20})
    summary, records = gather(instructions(150), tmp_path / "r.jsonl", given)
    assert summary.records == len(records) == 150
    assert_right(records)
    attempts = status(ledger_of(tmp_path / "r.jsonl"))["attempts"]
    assert attempts.keys() == {"answered", "rate_limit", "server_error", "timeout", "connection", "malformed"}
    assert attempts["answered"] == 150
    server.injected["connection"] = server.injected["drop"] + server.injected["torn"]
    for name in ("rate_limit", "server_error", "malformed", "connection"):
        assert 0 < attempts[name] <= server.injected[name]  # on a busy machine, some time out before they are told


def test_what_fails_for_good_is_listed_with_its_reason(tmp_path: Path, server: Server, endpoint: str) -> None:
    ask = [
        replace(instructions(1, f"[{tag}] Question?")[0], id=tag)
        for tag in ("refused", "filtered", "cut", "broken", "empty", "fine")
    ]
    out = tmp_path / "r.jsonl"
    given = settings(endpoint, limits={"retries": 2})
    summary, (record,) = gather(ask, out, given)
    assert record.messages[0].content == "[fine] Question?"
    failures = {f["instruction"]: f for f in map(json.loads, (tmp_path / "r.failures.jsonl").read_text().splitlines())}
    assert {name: (f["state"], f["reason"]) for name, f in failures.items()} == {
        "refused": ("failed", "bad_request"),
        "filtered": ("filtered", "content_filter"),
        "cut": ("filtered", "content_filter"),
        "broken": ("failed", "server_error"),
        "empty": ("dropped", "empty"),
    }
    assert failures["refused"]["message"] == "HTTP 400: This model's maximum context length is exceeded"
    assert summary.without_record == {"bad_request": 1, "content_filter": 2, "server_error": 1, "empty": 1}
    assert status(ledger_of(out))["attempts"]["server_error"] == 3

    again, _ = gather(ask, out, given)
    assert again == replace(summary, reused=1)
    assert status(ledger_of(out))["attempts"]["server_error"] == 3
    server.handle = fine
    more, records = gather(ask, out, given, retry_failed=True)
    assert (more.records, more.without_record) == (3, {"content_filter": 2, "empty": 1})
    assert_right(records)


async def fine(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
    """Answers all but what the filter keeps back."""
    text = json.loads(body)["messages"][0]["content"]
    message = {"role": "assistant", "content": answer_to(text)}
    return Reply(body=json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())


def test_retry_after_is_obeyed(tmp_path: Path, server: Server, endpoint: str) -> None:
    times: list[float] = []

    async def handle(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        times.append(time.monotonic())
        if len(times) < 3:
            return (
                error(429, "slow down", retry_after="0.4") if len(times) == 1 else error(503, "x", retry_after_ms="300")
            )
        return await chat(server, path, headers, body)

    server.handle = handle
    gather(instructions(1), tmp_path / "r.jsonl", settings(endpoint))
    assert times[1] - times[0] >= 0.4
    assert times[2] - times[1] >= 0.3


def test_a_refused_key_stops_everything_and_is_never_shown(
    tmp_path: Path, server: Server, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        server.answered["sent"] += 1
        shown = headers["authorization"].removeprefix("Bearer ")
        return error(401, f"Incorrect API key provided: {shown} or sk-te****cdef. Find yours in the dashboard.")

    server.handle = handle
    with pytest.raises(TargetLLMError) as caught:
        collect(instructions(300), tmp_path / "r.jsonl", settings(endpoint))
    assert "HTTP 401: Incorrect API key provided: [key] or [key]. Find yours in the dashboard." in str(caught.value)
    assert server.answered["sent"] <= 8
    assert KEY not in str(caught.value) + caplog.text
    assert status(ledger_of(tmp_path / "r.jsonl"))["requests"]["waiting"] == 300
    assert not [path for path in tmp_path.iterdir() if b"sk-te" in path.read_bytes()]


def test_a_dead_endpoint_does_not_use_up_all_requests(tmp_path: Path, server: Server, endpoint: str) -> None:
    out = tmp_path / "r.jsonl"
    gather(instructions(30), out, settings(endpoint))
    server.faults = Faults(drop=1.0)
    summary, records = gather(instructions(300), out, settings(endpoint, limits={"retries": 1}))
    assert str(summary.stopped).startswith("the endpoint answered none of 20 requests in a row (")
    assert (len(records), summary.records) == (30, 30)
    assert 20 <= summary.without_record["connection"] <= 20 + 8
    assert summary.waiting == 270 - summary.without_record["connection"]
    server.faults = Faults()
    assert gather(instructions(300), out, settings(endpoint), retry_failed=True)[0].records == 300


def test_the_key_comes_from_a_file_and_reaches_nothing_else(
    tmp_path: Path, server: Server, endpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    (tmp_path / "key").write_text(f"{KEY}\n")
    server.keep_requests = True
    server.faults = Faults(server_error=0.3, malformed=0.1)  # its messages repeat the key
    out = tmp_path / "out" / "r.jsonl"
    gather(instructions(10, "[broken] {}") + instructions(40), out, settings(endpoint), key_file=tmp_path / "key")
    assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in out.parent.iterdir())
    assert KEY.encode() not in written + "".join(capfd.readouterr()).encode()
    messages = [json.loads(line)["message"] for line in out.with_name("r.failures.jsonl").read_text().splitlines()]
    assert any("Always broken" in message for message in messages)
    with pytest.raises(ConfigError, match=r"key file .* cannot be read: No such file"):
        gather(instructions(1), out, settings(endpoint), key_file=tmp_path / "none")


def test_the_number_of_requests_is_a_hard_stop_over_all_runs(tmp_path: Path, server: Server, endpoint: str) -> None:
    server.faults = Faults(rate_limit=0.3)
    server.keep_requests = True
    out = tmp_path / "r.jsonl"
    for most in (30, 30, 55):
        summary, records = gather(instructions(100), out, settings(endpoint), max_requests=most)
        assert len(server.requests) == most
        assert summary.records == len(records) == most - server.injected["rate_limit"]
        assert summary.stopped == f"max_requests: {most} requests were sent"
    assert gather(instructions(100), out, settings(endpoint))[0].stopped is None


def test_the_cost_is_a_hard_stop_over_all_runs(tmp_path: Path, server: Server, endpoint: str) -> None:
    prices, out = tmp_path / "prices.yaml", tmp_path / "r.jsonl"
    prices.write_text("m: {input: 1000, output: 5000}\n")
    server.faults = Faults(malformed=0.1, latency=(0.0, 0.02))
    for most in (1.0, 1.0, 2.5):
        summary, records = gather(instructions(200), out, settings(endpoint), prices=prices, max_cost=most)
        answered, torn = sum(server.answered.values()), server.injected["malformed"]
        true = (answered + torn) * (7 * 1000 + 6 * 5000) / 1e6
        assert true <= summary.cost <= most
        assert summary.cost <= true + 0.15 * torn  # a request may cost 0.15 at most, and one that is torn is taken to
        assert summary.cost > most - 0.15  # no other would have fitted
        assert summary.stopped is not None
        assert summary.stopped.startswith("max_cost: ")
        assert len(records) == sum(server.answered.values())
    with pytest.raises(ConfigError, match="has no price for 'other'; it has m"):
        gather(instructions(1), out, settings(endpoint, model="other"), prices=prices)
    with pytest.raises(ConfigError, match="max_cost needs a price table"):
        Options(max_cost=1.0)


def test_a_changed_setting_asks_only_for_what_it_changes(tmp_path: Path, server: Server, endpoint: str) -> None:
    out = tmp_path / "r.jsonl"
    gather(instructions(10), out, settings(endpoint))
    gather(instructions(15), out, settings(endpoint, temperatures=[0.0, 0.5]))
    assert sum(server.answered.values()) == 30
    gather(instructions(10), out, settings(endpoint, max_new_tokens=21))
    assert sum(server.answered.values()) == 40
    _, records = gather(instructions(10), out, settings(endpoint))
    assert (len(records), sum(server.answered.values())) == (10, 40)


def test_tokens_per_minute_through_the_whole_client(
    tmp_path: Path, server: Server, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of a second; the server measures.

    The limit holds as long as no request takes longer than ``lag`` to arrive. On a busy machine one may take any time;
    since a request's answer comes before that, a long ``lag`` slows nothing down.
    """
    window = 1.0
    monkeypatch.setattr(admission, "RollingLimit", partial(RollingLimit, window=window, lag=60.0))
    server.keep_requests = True
    server.faults = Faults(latency=(0.0, 0.05))
    given = settings(endpoint, limits={"concurrency": 32, "tokens_per_minute": 2000})
    gather(instructions(400), tmp_path / "r.jsonl", given)
    assert most_in_a_window([(when, 13) for when, _, _ in server.requests], window) <= 2000
    assert len(server.requests) == 400


def test_azure_is_asked_by_deployment_and_version(tmp_path: Path, server: Server, endpoint: str) -> None:
    seen: list[tuple[str, dict[str, str]]] = []

    async def handle(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        seen.append((path, headers))
        return await chat(server, path, headers, body)

    server.handle = handle
    given = settings(endpoint.removesuffix("/v1"), model="my-gpt", azure_api_version="2024-10-21")
    gather(instructions(1), tmp_path / "r.jsonl", given)
    ((path, headers),) = seen
    assert path == "POST /openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"
    assert headers["api-key"] == KEY


def test_a_base_model_is_asked_through_a_template(tmp_path: Path, server: Server, endpoint: str) -> None:
    server.keep_requests = True
    templates = {"default": PromptTemplate(text="Q: {prompt}\nA:", stop=["\n"])}
    given = settings(endpoint, api=Api.COMPLETIONS, templates=templates, omit=["seed"])
    _, (record,) = gather(instructions(1), tmp_path / "r.jsonl", given)
    assert record.response == answer_to("Q: Question number 0?\nA:")
    ((_, body, _),) = server.requests
    assert body["prompt"] == "Q: Question number 0?\nA:"
    assert body["stop"] == ["\n"]
    assert "seed" not in body


def test_log_probabilities_lie_beside_the_records(tmp_path: Path, server: Server, endpoint: str) -> None:
    given = settings(endpoint, logprobs=LogProbSettings(keep=True, top_k=2))
    summary, records = gather(instructions(7, "Wie heißt {}? 👍"), tmp_path / "r.jsonl", given)
    assert str(tmp_path / "r.logprobs.parquet") in summary.files
    file = LogProbFile(tmp_path / "r.logprobs.parquet")
    assert (file.about.model, file.about.source) == ("m", endpoint)
    for record, scored in zip(records, file, strict=True):
        assert (scored.id, scored.text, scored.given) == (record.id, record.response, Given.PROMPT)
        assert scored.tokens is not None
        assert b"".join(scored.tokens).decode() == record.response
        spans = zip(scored.starts, scored.ends, scored.tokens, strict=True)
        assert all(scored.text[start:end].encode() == token for start, end, token in spans)
        assert scored.logprobs.tolist() == [-0.25 * (n % 4) for n in range(len(scored.tokens))]
        assert scored.top_logprobs is not None
        assert scored.top_logprobs.shape == (len(scored.tokens), 2)


RUN = """
import sys
from terselm.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "numpy", "datasets"} & sys.modules.keys()), file=sys.stderr)
"""


def command(endpoint: str, ask: Path, out: Path, *more: str) -> list[str]:
    given = ["--instructions", str(ask), "--out", str(out), "--endpoint", endpoint, "--model", "m"]
    return [sys.executable, "-c", RUN, "collect", *given, *more]


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"Question number {n}?"}) + "\n" for n in range(count)))
    return path


def test_the_command_loads_no_model_library(tmp_path: Path, endpoint: str) -> None:
    ask, out = write(tmp_path / "ask.jsonl", 3), tmp_path / "r.jsonl"
    done = subprocess.run(command(endpoint, ask, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["records"] == 3
    shown = subprocess.run(command(endpoint, ask, out, "--status"), capture_output=True, text=True)
    assert json.loads(shown.stdout)["requests"]["done"] == 3


def test_an_interrupt_waits_for_the_answers_on_their_way(tmp_path: Path, server: Server, endpoint: str) -> None:
    server.faults = Faults(latency=(0.3, 0.6))
    ask, out = write(tmp_path / "ask.jsonl", 500), tmp_path / "r.jsonl"
    process = subprocess.Popen(command(endpoint, ask, out), stdout=subprocess.PIPE, text=True)
    while sum(server.answered.values()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    second = subprocess.run(command(endpoint, ask, out), capture_output=True, text=True)
    assert second.returncode == 2
    assert f"error: another process is writing {out}; wait for it, or name another file" in second.stderr
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=20)
    summary = json.loads(shown)
    assert (process.returncode, summary["stopped"]) == (0, "interrupted")
    assert summary["records"] == sum(server.answered.values()) == len(out.read_text().splitlines())
    assert summary["records"] + summary["waiting"] == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": "ftp://x"}, "expected http"),
        ({"endpoint": "https://user:pw@host/v1"}, "holds a password or a query"),
        ({"endpoint": "https://host/v1?api-key=abc"}, "holds a password or a query"),
        ({"endpoint": "local:"}, "expected a model after it"),
        ({"model": " "}, "model is empty"),
        ({"api": Api.COMPLETIONS}, r"api=completions needs templates\.default"),
        ({"templates": {"default": PromptTemplate(text="{prompt}")}}, "templates are for plain text"),
        ({"omit": ["top"]}, "omit holds 'top'"),
        ({"samples": 0}, "samples is 0"),
        ({"limits": {"tokens_per_minute": 0}}, r"limits\.tokens_per_minute is 0"),
        ({"limits": {"timeout": 0}}, r"limits\.timeout is 0"),
        ({"limits": {"retries": -1}}, r"limits\.retries is -1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings(**{"endpoint": "https://host/v1"} | changes)
    assert "pw" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_request_larger_than_the_limit(tmp_path: Path, endpoint: str) -> None:
    given: CollectSettings = settings(endpoint, limits={"tokens_per_minute": 30})
    with pytest.raises(ConfigError, match="one request may use up to"):
        gather(instructions(3), tmp_path / "r.jsonl", given)


def test_a_full_disk_stops_at_once_and_loses_nothing_that_was_committed(
    tmp_path: Path, server: Server, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.jsonl"
    prepare = Ledger._prepare

    def small(ledger: Ledger, read_only: bool) -> None:
        prepare(ledger, read_only)
        if not read_only:
            ledger._db.execute("PRAGMA max_page_count=60")  # SQLite then says what it says of a full disk

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_prepare", small)
        with pytest.raises(TargetLLMError, match="cannot be used: database or disk is full; what is committed"):
            collect(instructions(300), out, settings(endpoint))
    done = status(ledger_of(out))["requests"]["done"]
    assert 0 < done < 300
    assert sum(server.answered.values()) <= done + 8
    summary, records = gather(instructions(300), out, settings(endpoint))
    assert (summary.reused, summary.records) == (done, 300)
    assert_right(records)


def test_an_endpoint_that_does_not_count_tokens_is_charged_at_most(
    tmp_path: Path, server: Server, endpoint: str
) -> None:
    server.handle = fine
    prices = tmp_path / "prices.yaml"
    prices.write_text("m: {input: 1000, output: 5000}\n")
    summary, _ = gather(instructions(50), tmp_path / "r.jsonl", settings(endpoint), prices=prices, max_cost=1.0)
    assert 0.8 < summary.cost <= 1.0
    assert 0 < summary.records < 50

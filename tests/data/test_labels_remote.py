"""Labels of utility from an endpoint that scores given texts, and the commands that ask it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import KEY, settings
from fakes import random_lm
from faulty_server import Reply, Server, answer_to, serving
from test_token_scores import vllm_reply
from typer.testing import CliRunner

from terselm.cli import app
from terselm.compress.label_units import read_prompts_to_label
from terselm.data.collection.label_estimate import estimate_labels
from terselm.data.collection.label_plan import LabelPlan, PromptToLabel
from terselm.data.collection.labels import collect_labels
from terselm.data.collection.ledger import Ledger, ledger_of
from terselm.data.collection.settings import (
    Api,
    CollectSettings,
    LabelSettings,
    LogProbSettings,
    Options,
    PromptScores,
)
from terselm.data.utility import LabelledPrompt, fit_utilities, read_labels
from terselm.errors import DataFormatError, TargetLLMError, TerseLMError

LIKELY, UNLIKELY = 0.5, 4.0  # nats of a word that has come before, and of one that has not


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    serve = Server()
    with serving(serve) as endpoint:
        yield serve, endpoint


def rows(path: Path, count: int, answers: bool = True) -> Path:
    """Prompts of 12 sentences, of which one holds the answer."""
    with path.open("w") as file:
        for number in range(count):
            sentences = [f"Filler {number} {place} words here." for place in range(12)]
            sentences[number % 12] = f"The code is {number}-secret okay."
            row: dict[str, Any] = {
                "id": f"p{number}",
                "demonstrations": [" ".join(sentences[:6]), " ".join(sentences[6:])],
                "question": "Question: what code?\nAnswer:",
            }
            file.write(json.dumps(row | ({"answers": [f" {number}-secret", "?"]} if answers else {})) + "\n")
    return path


def asking(endpoint: str, **changes: Any) -> CollectSettings:
    scores = LogProbSettings(of_texts=changes.pop("of_texts", PromptScores.ECHO))
    masks = LabelSettings(masks=changes.pop("masks", 12))
    return settings(endpoint, api=Api.COMPLETIONS, logprobs=scores, labels=masks, **changes)


def assert_right(labels: list[LabelledPrompt]) -> None:
    for number, label in enumerate(labels):
        assert label.id == f"p{number}"
        assert int(np.argmax(label.utility)) == number % 12
        assert (label.nats_whole, label.nats_none) == (LIKELY, UNLIKELY)


def known_utilities(prompt: PromptToLabel, secret: int, given: CollectSettings) -> Any:
    """What the server makes of a prompt whose sentence ``secret`` holds the answer."""
    masks = LabelPlan(given, chat=False).masks(prompt)
    return fit_utilities(masks, np.where(masks[:, secret], LIKELY, UNLIKELY), given.labels.ridge)


def test_an_endpoint_that_echoes(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    out = tmp_path / "labels.jsonl"
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 9))
    summary = collect_labels(prompts, out, asking(endpoint))
    assert (summary.labels, summary.waiting, summary.stopped) == (9, 0, None)
    assert_right(read_labels(out))
    assert sum(serve.answered.values()) == 9 * 14
    assert set(serve.answered.values()) == {1}
    collect_labels(prompts, out, asking(endpoint))
    assert sum(serve.answered.values()) == 9 * 14


def test_the_answer_alone_counts(tmp_path: Path, server: tuple[Server, str]) -> None:
    """The regression is that of what the server says, which is known in advance."""
    _, endpoint = server
    (prompt,) = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 1))
    collect_labels([prompt], tmp_path / "labels.jsonl", asking(endpoint))
    (label,) = read_labels(tmp_path / "labels.jsonl")
    np.testing.assert_allclose(label.utility, known_utilities(prompt, 0, asking(endpoint)), atol=1e-4)


def test_vllm_says_what_the_local_model_says(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    lm = random_lm("llama")

    async def score(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        asked = json.loads(body)
        return Reply(body=json.dumps(vllm_reply(lm, asked["prompt"], asked["prompt_logprobs"])).encode())

    serve.handle = score
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 2))
    collect_labels(prompts, tmp_path / "remote.jsonl", asking(endpoint, of_texts=PromptScores.VLLM, masks=6))
    here = CollectSettings(endpoint="local:tiny", labels=LabelSettings(masks=6))
    collect_labels(prompts, tmp_path / "local.jsonl", here, lm=lm)
    for remote, local in zip(*(read_labels(tmp_path / f"{name}.jsonl") for name in ("remote", "local")), strict=True):
        np.testing.assert_allclose(remote.utility, local.utility, atol=1e-3)
        assert remote.nats_whole == pytest.approx(local.nats_whole, abs=1e-3)
        assert (remote.target, local.target) == ("m", "tiny")


def test_own_answers_come_first(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    out = tmp_path / "labels.jsonl"
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 3, answers=False))
    summary = collect_labels(prompts, out, asking(endpoint))
    assert summary.labels == 3
    assert [label.answer for label in read_labels(out)] == [answer_to(prompt.prompt.text()) for prompt in prompts]
    assert sum(serve.answered.values()) == 3 * (14 + 1)


def test_an_endpoint_that_fails_in_every_way(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    serve.faults.rate_limit, serve.faults.server_error, serve.faults.torn, serve.faults.malformed = 0.1, 0.1, 0.1, 0.1
    out = tmp_path / "labels.jsonl"
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 4))
    collect_labels(prompts, out, asking(endpoint, limits={"retries": 40}))
    assert_right(read_labels(out))


def test_an_endpoint_that_does_not_tell(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 1))

    async def mute(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        return Reply(body=json.dumps({"choices": [{"text": "x", "finish_reason": "stop"}]}).encode())

    serve.handle = mute
    with pytest.raises(TargetLLMError, match=r"could be labelled by m .* the response holds no log-probabilities; the"):
        collect_labels(prompts, tmp_path / "labels.jsonl", asking(endpoint, limits={"retries": 0}))


def test_hard_stops_hold(tmp_path: Path, server: tuple[Server, str]) -> None:
    serve, endpoint = server
    out = tmp_path / "labels.jsonl"
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 4))
    with pytest.raises(TargetLLMError, match="there is no label by m yet: max_requests: 10 requests were sent"):
        collect_labels(prompts, out, asking(endpoint), Options(max_requests=10))
    summary = collect_labels(prompts, out, asking(endpoint), Options(max_requests=40))
    assert serve.answered.total() == 40
    assert (summary.labels, summary.waiting, summary.stopped) == (2, 2, "max_requests: 40 requests were sent")


def test_the_estimate_is_what_is_used(tmp_path: Path, server: tuple[Server, str]) -> None:
    _, endpoint = server
    out, prices = tmp_path / "labels.jsonl", tmp_path / "prices.yaml"
    prices.write_text("m: {input: 1000, output: 1}\n")
    prompts = read_prompts_to_label(rows(tmp_path / "rows.jsonl", 12, answers=False))
    given, options = asking(endpoint, max_new_tokens=80), Options(prices=prices)
    rough = estimate_labels(prompts, out, given, options)
    assert (rough.requests, rough.prompt_basis, rough.answers_known) == (12 * 15, "bytes", 0)
    informed = estimate_labels(prompts, out, given, options, pilot=4)
    assert (informed.requests, informed.prompt_basis, informed.answers_known) == (8 * 15, "answers", 4)
    with Ledger(ledger_of(out)) as ledger:
        before = ledger.report()
    summary = collect_labels(prompts, out, given, options)
    used = summary.cost - before["cost"]
    assert informed.cost.expected == pytest.approx(used, rel=0.1)
    assert rough.cost.at_most > informed.cost.at_most >= used
    assert estimate_labels(prompts, out, given, options).requests == 0


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "One sentence only."}, "the demonstrations hold one unit only; a utility needs two"),
        ({"question": "What?"}, "the demonstrations hold no text"),
        ({"text": "One. Two.", "answer": " "}, "the answer is empty; leave it out for what the target itself says"),
        ({"text": "One. Two.", "answers": []}, r"the answer is \[\]; expected a text"),
        ({"text": "One. Two.", "answer": 3}, r"the answer is \[3\]; expected a text"),
        ({"answer": "x"}, "the row holds no prompt; expected one of text"),
        ({"id": "1", "text": "One. Two."}, "id '1' came before"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "One. Two.", "question": "What?", "answer": "x"}) + "\n" + json.dumps(row))
    with pytest.raises(DataFormatError, match=rf"rows\.jsonl:2: {complaint}"):
        read_prompts_to_label(path)


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(done.exception, TerseLMError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands(tmp_path: Path, server: tuple[Server, str]) -> None:
    _, endpoint = server
    source, out = rows(tmp_path / "rows.jsonl", 3), tmp_path / "labels.jsonl"
    whom = ["--instructions", source, "--out", out, "--endpoint", endpoint, "--model", "m", "--utility"]
    whom += ["api=completions", "logprobs.of_texts=echo", "labels.masks=8"]
    assert run("collection", "estimate", *whom)["requests"] == 3 * 10
    found = run("collect", *whom)
    assert (found["labels"], found["files"]) == (3, [str(out)])
    assert run("collection", "status", "--out", out)["requests"]["done"] == 30
    assert run("collection", "estimate", *whom)["requests"] == 0
    again = run("collect", *["--instructions", out, *whom[2:]])  # labels are rows, too
    assert (again["labels"], again["reused"]) == (3, 3)


COMMAND = [sys.executable, "-c", "from terselm.cli import main; main()", "collect", "--utility"]


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    """No answer that is committed is asked for again, and the labels are those of what the server says."""
    source, out = rows(tmp_path / "rows.jsonl", 40), tmp_path / "out" / "labels.jsonl"
    script = Path(__file__).with_name("faulty_server.py")
    settings = ["api=completions", "logprobs.of_texts=echo", "labels.masks=8", "limits.concurrency=8"]
    settings += ["limits.timeout=2", "limits.backoff=0.02", "limits.longest_pause=0.5", "limits.retries=15"]
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    with subprocess.Popen([sys.executable, script, "--latency", "0.1"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        command = [*COMMAND, "--instructions", source, "--out", out, "--endpoint", endpoint, "--model", "m", *settings]
        for _ in range(10):
            before = done(out)
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while done(out) < before + chance.randint(5, 30):
                assert process.poll() is None, "ended before it could be killed"
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert done(out) >= before
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server.kill()
    prompts, labels = read_prompts_to_label(source), read_labels(out)
    for number, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        known = known_utilities(prompt, number % 12, asking(endpoint, masks=8))
        np.testing.assert_allclose(label.utility, known, atol=1e-4)
    with Ledger(ledger_of(out), read_only=True) as ledger:
        answered = ledger.attempts(["answered"])
    assert len(answered) == 40 * 10
    assert set(answered.values()) == {1}


def done(out: Path) -> int:
    if not ledger_of(out).is_file():
        return 0
    try:
        with Ledger(ledger_of(out), read_only=True) as ledger:
            return int(ledger.report()["requests"]["done"])
    except (DataFormatError, TargetLLMError):  # it is being made
        return 0

"""What a collection will use, said before and counted after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoints import KEY, gather, instructions, settings
from faulty_server import Server, serving

from terselm.data.collection.collect import collect
from terselm.data.collection.estimate import estimate
from terselm.data.collection.ledger import ledger_of, status
from terselm.data.collection.settings import CollectSettings, Options, PromptTemplate
from terselm.data.instructions import read_instructions

SAMPLE = Path(__file__).parents[2] / "data" / "sample" / "instructions.jsonl"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Server()) as url:
        yield url


def test_nothing_is_known_at_first_but_the_most(tmp_path: Path, endpoint: str) -> None:
    found = estimate(instructions(50), tmp_path / "r.jsonl", settings(endpoint))
    assert (found.requests, found.answers_known, found.prompt_basis) == (50, 0, "bytes")
    assert found.completion_tokens.expected is found.cost.expected is None
    assert found.completion_tokens.at_most == 50 * 20
    assert found.prompt_tokens.at_most >= 50 * 7
    assert not (tmp_path / "r.jsonl").exists()


def test_a_pilot_is_asked_paid_and_learnt_from(tmp_path: Path, endpoint: str) -> None:
    (tmp_path / "prices.yaml").write_text("m: {input: 1000, output: 2000}\n")
    out, options = tmp_path / "r.jsonl", Options(prices=tmp_path / "prices.yaml")
    long = instructions(60, "A longer question is {}, " + "and why is that so? " * 4)
    ask = [*instructions(60, "Question {}?"), *(replace(one, id=f"long-{one.id}") for one in long)]
    found = estimate(ask, out, settings(endpoint), options, pilot=30)
    assert (found.requests, found.answers_known, found.prompt_basis) == (90, 30, "answers")
    before = status(ledger_of(out))
    assert before["requests"]["done"] == 30
    summary = collect(ask, out, settings(endpoint), options)
    after = status(ledger_of(out))
    for name, guess in (
        ("prompt_tokens", found.prompt_tokens),
        ("completion_tokens", found.completion_tokens),
        ("cost", found.cost),
    ):
        used = after[name] - before[name]
        assert guess.expected == pytest.approx(used, rel=0.1), name
        assert used <= guess.at_most
    assert summary.reused == 30
    done = estimate(ask, out, settings(endpoint), options)
    assert (done.requests, done.cost.expected, done.cost.at_most) == (0, 0, 0)


def test_what_other_settings_used_says_nothing(tmp_path: Path, endpoint: str) -> None:
    gather(instructions(20), tmp_path / "r.jsonl", settings(endpoint))
    assert estimate(instructions(20), tmp_path / "r.jsonl", settings(endpoint, max_new_tokens=9)).answers_known == 0


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_uses_what_chance_allows(tmp_path: Path) -> None:
    """SmolLM2 in this process, from a pilot of two in five.

    What it answers depends on the processor's rounding, and so does which answers the pilot has met. So the answers'
    length is held to the interval of the estimate: twice its half-width is four standard errors, which chance passes
    once in ten thousand times. The prompts' length is counted, not estimated.
    """
    ask = [one for one in read_instructions(SAMPLE) if one.category not in ("long_context", "few_shot")][::3][:60]
    template = PromptTemplate(text="Question: {prompt}\nAnswer:", stop=["\nQuestion"])
    given: dict[str, Any] = {"temperatures": [0.0], "max_new_tokens": 24}
    asked = CollectSettings(endpoint="local:smollm2-135m", templates={"default": template}, **given)
    out = tmp_path / "r.jsonl"
    estimated = estimate(ask, out, asked, pilot=24)
    before = status(ledger_of(out))
    collect(ask, out, asked)
    after = status(ledger_of(out))
    assert estimated.prompt_basis == "tokenizer"
    assert estimated.prompt_tokens.expected == after["prompt_tokens"] - before["prompt_tokens"]
    used, answers = after["completion_tokens"] - before["completion_tokens"], estimated.completion_tokens
    assert answers.expected is not None
    assert answers.low is not None
    assert answers.high is not None
    assert abs(used - answers.expected) <= answers.high - answers.low
    assert answers.high - answers.low < answers.expected  # else it would say nothing
    assert used <= answers.at_most


def test_the_command_prints_it(tmp_path: Path, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from terselm.cli import app

    ask = tmp_path / "ask.jsonl"
    ask.write_text("".join(json.dumps({"prompt": f"Number {n}?"}) + "\n" for n in range(30)))
    given = ["--instructions", str(ask), "--out", str(tmp_path / "r.jsonl"), "--endpoint", endpoint, "--model", "m"]
    done = CliRunner().invoke(app, ["collection", "estimate", *given, "--pilot", "10"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["requests"] == 20
    assert not done.stderr
    old = CliRunner().invoke(app, ["collect", *given, "--estimate"])  # a flag of earlier versions
    assert json.loads(old.stdout) == json.loads(done.stdout)
    (line,) = old.stderr.splitlines()
    assert line.startswith("terselm collect --estimate is now terselm collection estimate")
    shown = [["collection", "status", "--out", given[3]], ["collect", "--out", given[3], "--status"]]
    new, old = (CliRunner().invoke(app, command) for command in shown)
    assert json.loads(new.stdout)["requests"]["done"] == 10
    assert (new.stdout, new.stderr) == (old.stdout, "")
    assert old.stderr.startswith("terselm collect --status is now terselm collection status")

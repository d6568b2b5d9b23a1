"""Tool output and conversations made from a seed, and what counts as keeping an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from terselm.cli import app
from terselm.compress.label_units import read_prompts_to_label
from terselm.errors import ConfigError
from terselm.evaluate.dialogue import conversations
from terselm.evaluate.items import full_text
from terselm.evaluate.settings import SuiteName, SuiteSettings
from terselm.evaluate.suites import load_suite
from terselm.evaluate.tool_output import KINDS, Owner, holds, tool_outputs


def test_the_same_seed_makes_the_same_items() -> None:
    assert tool_outputs(2, seed=5) == tool_outputs(2, seed=5)
    assert tool_outputs(2, seed=5) != tool_outputs(2, seed=6)
    assert conversations(3, seed=5) == conversations(3, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_once_with_what_it_belongs_to(kind: str) -> None:
    for item in tool_outputs(40, seed=1, kinds=[kind]):
        assert item.kept(item.text)
        assert item.text.count(item.answer) >= 1
        assert item.answer not in item.question
        assert not item.kept(item.text.replace(item.answer, ""))


def test_json_output_is_json() -> None:
    assert all(json.loads(item.text) for item in tool_outputs(12, seed=2, kinds=["json"]))


def test_a_port_without_its_service_is_no_answer() -> None:
    owner = Owner(name='"mail"', rivals=('"shop"',))
    assert holds('"mail": {\n "port": 25', '"port": 25', [owner])
    assert not holds('"port": 25', '"port": 25', [owner])
    assert not holds('"mail": {\n"shop": {\n"port": 25', '"port": 25', [owner])
    assert holds('"shop": {"port": 9}\n"mail": {\n"port": 25', '"port": 25', [owner])
    assert holds('"shop" beside "mail" on "port": 25', '"port": 25', [owner])  # in one line


def test_a_fact_is_asked_for_forty_turns_later() -> None:
    items = conversations(200, seed=3)
    assert any(item.outdated for item in items)
    for item in items:
        stated = max(i for i, (_, text) in enumerate(item.turns) if item.answer in text)
        assert len(item.turns) - stated >= 40
        text = "\n\n".join(text for _, text in item.turns)
        assert item.kept(text)
        assert not item.kept(text.replace(item.owner, ""))
        if item.outdated:
            assert not item.kept(text + item.outdated)


def test_the_suites_read_answers_and_look_for_them_in_prompts() -> None:
    suite = load_suite(SuiteSettings(name=SuiteName.TOOLS, questions=2, tasks=["json", "diff"]))
    assert [item.id for item in suite.items] == ["json/0", "json/1", "diff/0", "diff/1"]
    assert suite.right is not None
    assert suite.kept is not None
    for item in suite.items:
        value = item.answers[0].split(" ")[-1]
        assert suite.right(f"It is {value}.", item)
        assert not suite.right("It is 7.", item)
        assert suite.kept(full_text(item.prompt), item)
        assert not suite.kept(item.answers[0], item)
    talk = load_suite(SuiteSettings(name=SuiteName.DIALOGUE, questions=3))
    assert talk.kept is not None
    assert all(talk.kept(full_text(item.prompt), item) for item in talk.items)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown kinds of tool output: csv; there are log, json"):
        load_suite(SuiteSettings(name=SuiteName.TOOLS, tasks=["csv"]))


def test_rows_of_suites_are_prompts_to_label(tmp_path: Path) -> None:
    for seed in (1, 2):
        for name in ("tools", "dialogue"):
            arguments = ["data", "suite", name, "--out", str(tmp_path / f"{name}{seed}.jsonl"), "--questions", "2"]
            done = CliRunner().invoke(app, [*arguments, "--seed", str(seed)])
            assert done.exit_code == 0, done.output
    prompts = read_prompts_to_label(tmp_path / "tools1.jsonl")
    items = load_suite(SuiteSettings(name=SuiteName.TOOLS, questions=2, seed=1)).items
    for prompt, item in zip(prompts, items, strict=True):
        assert prompt.prompt.text() == full_text(item.prompt)
        assert prompt.answer == item.gold
    names = [one.id for path in sorted(tmp_path.iterdir()) for one in read_prompts_to_label(path)]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("tools-", "dialogue-")) for name in names)


def test_rows_of_a_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "nq.jsonl"
    rows = [
        {"question": f"who {n}?", "answers": [f"A{n}"], "ctxs": [{"title": f"T{n}", "text": f"A{n} did. So it was."}]}
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    for part in ("0:12", "12:"):
        out = tmp_path / f"rows{part[:2].strip(':')}.jsonl"
        arguments = ["data", "suite", "nq", "--out", str(out), "--questions", "9", "--rows", part, "--data", str(path)]
        done = CliRunner().invoke(app, [*arguments, "documents=5"])
        assert done.exit_code == 0, done.output
        seen.append({text.split("(")[1] for one in read_prompts_to_label(out) for text in one.prompt.demonstrations})
    assert all(len(titles) > 9 for titles in seen)
    assert not seen[0] & seen[1]
    with pytest.raises(ConfigError, match=r"suite\.rows is '1-2'; expected a range such as '1000:2000'"):
        SuiteSettings(name=SuiteName.NQ, rows="1-2")
    with pytest.raises(ConfigError, match=r"suite\.rows is for rows of a file; tools is generated"):
        SuiteSettings(name=SuiteName.TOOLS, rows="0:5")

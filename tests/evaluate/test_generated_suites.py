"""Tool output and conversations made from a seed, and what counts as keeping an answer."""

from __future__ import annotations

import json

import pytest

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

"""Instruction files, and the requests that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import random_lm

from terselm.config import load_config
from terselm.data.collection.plan import plan_requests, prompt_text
from terselm.data.collection.settings import CollectSettings, PromptTemplate
from terselm.data.instructions import Instruction, read_instructions
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError, DataFormatError

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def line(**changes: Any) -> str:
    value = {"id": "a", "messages": [{"role": "user", "content": "Add 1 and 2."}]} | changes
    return json.dumps({key: item for key, item in value.items() if item is not None})


def instruction(*contents: str, category: str | None = None, first: Role = Role.USER) -> Instruction:
    roles = [first, *[Role.USER] * (len(contents) - 1)]
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, contents, strict=True))
    return Instruction(id="a", category=category, messages=messages)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "instructions.jsonl"
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]
    path.write_text(line() + "\n" + line(id="b", category="maths", messages=other))
    first, second = read_instructions(path)
    assert (first.id, first.category, first.messages) == ("a", None, instruction("Add 1 and 2.").messages)
    assert second.messages == instruction("Be brief.", "Add.", first=Role.SYSTEM).messages


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (line(id=None), "missing key 'id'"),
        (line(id="b", messages=None), "missing key 'messages'"),
        (line(messages=[{"role": "user", "content": "Other."}]), "id 'a' is already that of line 1"),
        (line(id="b"), "is already that of line 1"),
        (line(id="b", messages=[{"role": "assistant", "content": "Hi."}]), "the prompt ends with an assistant message"),
        (line(id="b", messages=[{"role": "user", "content": " "}]), "message 1: the content of a message is empty"),
        ("{", "broken JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: str, message: str) -> None:
    path = tmp_path / "instructions.jsonl"
    path.write_text(line() + "\n" + second)
    with pytest.raises(DataFormatError) as caught:
        read_instructions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(DataFormatError, match="holds no instructions"):
        read_instructions(tmp_path / "none.jsonl")


def test_one_request_for_each_temperature_each_with_its_own_id_and_seed() -> None:
    settings = CollectSettings(endpoint="local:m", temperatures=[0.0, 0.7, 0.7])
    asked = plan_requests([instruction("One."), instruction("Two.")], settings)
    assert [(request.temperature, request.sample) for request in asked] == [(0.0, 0), (0.7, 0), (0.7, 1)] * 2
    assert len({request.id for request in asked}) == len({request.seed for request in asked}) == 6
    assert asked == plan_requests([instruction("One."), instruction("Two.")], settings)


def test_a_changed_setting_changes_only_the_ids_that_it_concerns() -> None:
    ask = [instruction("One.", category="x"), instruction("Two.")]

    def ids(**changes: Any) -> set[str]:
        return {request.id for request in plan_requests(ask, CollectSettings(endpoint="local:m", **changes))}

    templates = {"x": PromptTemplate(text="Q: {prompt}")}
    assert len(ids() & ids(templates=templates)) == 1
    assert ids() < ids(temperatures=[0.5, 0.0])
    assert ids() == ids(batch_size=7, attempts=9, device="cpu")
    for change in ({"seed": 1}, {"top_p": 0.9}, {"max_new_tokens": 9}, {"dtype": "bfloat16"}):
        assert not ids() & ids(**change)


def test_the_template_of_the_category_else_the_default_else_the_chat_template() -> None:
    templates = {"x": PromptTemplate(text="X {prompt} {x}"), "default": PromptTemplate(text="D {prompt}", stop=["!"])}
    settings = CollectSettings(endpoint="local:m", templates=templates)
    asks = [instruction("One.", category=name) for name in ("x", "y", None)]
    requests = plan_requests(asks, settings)
    tokenizer = random_lm().tokenizer
    assert [prompt_text(request, tokenizer) for request in requests] == ["X One. {x}", "D One.", "D One."]
    assert requests[1].parameters["prompt_template"] == "D {prompt}"
    assert requests[1].parameters["stop"] == ["!"]
    two = plan_requests([instruction("Be brief.", "Add {prompt}.", first=Role.SYSTEM)], settings)[0]
    assert prompt_text(two, tokenizer) == "D Be brief.\n\nAdd {prompt}."

    (chat,) = plan_requests(asks[:1], CollectSettings(endpoint="local:m"))
    with pytest.raises(ConfigError, match=r"the model has no chat template; give one under templates\.default"):
        prompt_text(chat, tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    try:
        assert prompt_text(chat, tokenizer) == "user: One.\nassistant:"  # the start token comes with encoding
    finally:
        tokenizer.chat_template = None
    assert chat.parameters["prompt_template"] == "chat"


def test_a_plain_template_holds_no_turns_of_the_assistant() -> None:
    talk = Instruction(
        id="talk",
        messages=tuple(Message(role=role, content="x") for role in (Role.USER, Role.ASSISTANT, Role.USER)),
    )
    settings = CollectSettings(endpoint="local:m", templates={"default": PromptTemplate(text="{prompt}")})
    with pytest.raises(DataFormatError, match="instruction talk: a plain template cannot hold a turn of the assistant"):
        prompt_text(plan_requests([talk], settings)[0], None)


@pytest.mark.parametrize(
    "override",
    [
        "temperatures=[]",
        "temperatures=[-0.1]",
        "temperatures=[.inf]",
        "temperatures=[.nan]",
        "top_p=0",
        "top_p=1.1",
        "top_k=-1",
        "max_new_tokens=0",
        "batch_size=0",
        "attempts=0",
        "templates.default.text=Answer",
        "templates.default.text='{prompt} {prompt}'",
        "templates={default: {text: '{prompt}', stop: ['']}}",
        "tempratures=[0]",
    ],
)
def test_bad_settings(override: str) -> None:
    assert load_config(CollectSettings, None, ["endpoint=local:m"]).target == "m"
    with pytest.raises(ConfigError):
        load_config(CollectSettings, None, ["endpoint=local:m", override])

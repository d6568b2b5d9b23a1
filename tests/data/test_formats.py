"""Files in the formats of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from terselm.data.records import Format, Message, Record, Role, read_records
from terselm.errors import DataFormatError

USER, SYSTEM, ASSISTANT = Role.USER, Role.SYSTEM, Role.ASSISTANT
ASKED: dict[str, tuple[dict[str, Any], list[tuple[Role, str]]]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [(USER, "Add.\n\n1 and 2")]),
    "alpaca, no input": ({"instruction": "Count.", "input": "", "output": "3", "text": "…"}, [(USER, "Count.")]),
    "alpaca, null input": ({"instruction": "Count.", "input": None, "output": "3"}, [(USER, "Count.")]),
    "alpaca, response": ({"instruction": "Count.", "response": "3", "domain": "x"}, [(USER, "Count.")]),
    "prompt_completion": ({"prompt": "One, two,", "completion": "3"}, [(USER, "One, two,")]),
    "messages": (
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"}]},
        [(SYSTEM, "Be brief."), (USER, "1 + 2?")],
    ),
    "messages, several turns": (
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "And 1 more?"},
            ]
        },
        [(USER, "1 + 1?"), (ASSISTANT, "2"), (USER, "And 1 more?")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 + 2?"}]},
        [(SYSTEM, "Be brief."), (USER, "1 + 2?")],
    ),
}
ENDS = {"messages": {"role": "assistant", "content": "3"}, "conversations": {"from": "gpt", "value": "3"}}


def write(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ASKED)
def test_a_plain_file_just_works(tmp_path: Path, name: str) -> None:
    value, prompt = ASKED[name]
    value = {key: [*item, ENDS[key]] if key in ENDS else item for key, item in value.items()}
    path = write(tmp_path / "data.jsonl", value)
    (record,) = read_records(path)
    assert [(message.role, message.content) for message in record.messages] == prompt
    assert (record.response, record.generation) == ("3", None)
    assert list(read_records(path, Format(name.split(",")[0]))) == [record]


def test_the_same_row_twice_is_two_records_and_ids_do_not_depend_on_other_rows(tmp_path: Path) -> None:
    row, other = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
    first = [record.id for record in read_records(write(tmp_path / "1.jsonl", row, row, other))]
    second = [record.id for record in read_records(write(tmp_path / "2.jsonl", other, row, row))]
    assert len(set(first)) == 3
    assert set(first) == set(second)


BAD: list[tuple[list[dict[str, Any]], str]] = [
    ([{"text": "Once upon a time"}], ":1: no known record format has these keys ('text'); expected"),
    ([{}], ":1: no known record format has these keys (none)"),
    ([{"instruction": "a"}], ":1: missing key 'output' (read as format alpaca)"),
    ([{"instruction": "a", "output": ""}], ":1: response is empty"),
    ([{"instruction": "a", "input": 3, "output": "b"}], ":1: input is int; expected a string"),
    ([{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}], ":2: missing key 'instruction'"),
    ([{"prompt": ["a"], "completion": "b"}], ":1: the content of a message is list; expected a string"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "collect the target's answers first"),
    ([{"messages": [ENDS["messages"]]}], ":1: messages is empty"),
    ([{"messages": [{"role": "user"}]}], ":1: message 1: missing key 'content'"),
    ([{"conversations": [{"from": "human", "value": "a"}]}], "does not end with the assistant"),
    ([{"conversations": [{"from": "bing", "value": "a"}]}], ":1: message 1: unknown role 'bing'; expected one of"),
    ([{"conversations": {}}], ":1: the conversation is dict; expected a list"),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=[message for _, message in BAD])
def test_one_sentence_when_it_does_not(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(DataFormatError) as caught:
        list(read_records(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_json_array_is_told_how_to_become_lines(tmp_path: Path) -> None:
    """As alpaca_data.json comes, one array over many lines; under its own name it is read."""
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}], indent=2))
    assert [record.response for record in read_records(path)] == ["b"]
    path = path.rename(tmp_path / "alpaca.jsonl")
    with pytest.raises(DataFormatError, match=r"alpaca\.jsonl:1: a JSON array; .*jq -c"):
        list(read_records(path))


def test_keys_that_mean_nothing_here_are_passed_over(tmp_path: Path) -> None:
    value = {"id": "a", "messages": [{"role": "user", "content": "x", "name": "Jo"}], "response": "y", "score": 0.5}
    (record,) = read_records(write(tmp_path / "data.jsonl", value))
    assert record == Record(id="a", messages=(Message(role=USER, content="x"),), response="y")

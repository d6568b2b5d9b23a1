"""Records: round trip, ids, errors, and the split."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.data.records import (
    Generation,
    Message,
    Record,
    Role,
    Usage,
    prompt_hash,
    read_records,
    record_id,
    split_by_instruction,
    write_records,
)
from terselm.errors import ConfigError, DataFormatError

# Every character but halves of surrogate pairs, which are none; line separators of all kinds come first.
CHARACTERS = st.one_of(st.sampled_from('\n\r\x0b\x0c\x1c\x85\u2028\u2029\ufeff\x00"\\'), st.characters(codec="utf-8"))
TEXTS = st.text(CHARACTERS, min_size=1, max_size=40).filter(str.strip)
PROMPTS = st.lists(
    st.builds(Message, role=st.sampled_from([Role.SYSTEM, Role.USER, Role.TOOL]), content=TEXTS), min_size=1, max_size=3
).map(tuple)
PARAMETERS = st.dictionaries(
    TEXTS,
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXTS,
        st.lists(TEXTS),
    ),
    max_size=4,
)
GENERATIONS = st.builds(
    Generation,
    model=TEXTS,
    parameters=PARAMETERS,
    sample=st.integers(0, 9),
    attempts=st.integers(1, 9),
    created=st.datetimes().map(lambda date: date.isoformat()),
    finish_reason=TEXTS,
    usage=st.builds(Usage, prompt_tokens=st.integers(0, 9999), completion_tokens=st.integers(0, 9999)),
    versions=st.dictionaries(TEXTS, TEXTS, max_size=2),
)
RECORDS = st.builds(
    Record,
    id=TEXTS,
    messages=PROMPTS,
    response=TEXTS,
    generation=st.none() | GENERATIONS,
    category=st.none() | TEXTS,
)


@settings(max_examples=150)
@given(st.lists(RECORDS, min_size=1, max_size=5, unique_by=lambda record: record.id))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    path = tmp_path_factory.mktemp("round") / "records.jsonl"
    write_records(path, records)
    assert list(read_records(path)) == records
    assert path.read_bytes().count(b"\n") == len(records)


def record(prompt: str = "Say hello.", response: str = "Hello.", sample: int = 0) -> Record:
    messages = (Message(role=Role.USER, content=prompt),)
    return Record(
        id=record_id(messages, "target", {"temperature": 0.5}, sample),
        messages=messages,
        response=response,
        category="greeting",
        generation=Generation(
            model="target",
            parameters={"temperature": 0.5},
            sample=sample,
            created="2025-01-31T12:00:00+00:00",
            finish_reason="stop",
            usage=Usage(prompt_tokens=4, completion_tokens=3),
        ),
    )


def as_json(**changes: Any) -> dict[str, Any]:
    """A good record as JSON, with some keys changed; None takes a key away."""
    value: dict[str, Any] = {
        "id": "a",
        "messages": [{"role": "user", "content": "Say hello."}],
        "response": "Hello.",
        "generation": {
            "model": "target",
            "parameters": {"temperature": 0.5},
            "created": "2025-01-31",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 4, "completion_tokens": 3},
        },
    } | changes
    return {key: item for key, item in value.items() if item is not None}


def generation(**changes: Any) -> dict[str, Any]:
    made = as_json()["generation"] | changes
    return {"generation": {key: item for key, item in made.items() if item is not None}}


BAD_LINES = {
    '{"id": "a", "messages": [': "broken JSON at character 27: Expecting value",
    "[1, 2]": "a JSON array; expected one JSON object a line",
    '"text"': "a JSON str; expected an object",
    "\udcff": "not UTF-8",
    '{"id": NaN}': "NaN is not a JSON value",
    json.dumps(as_json(id=None)): "missing key 'id'",
    json.dumps(as_json(id=7)): "id is int; expected a string",
    json.dumps(as_json(id="good")): "id 'good' is already that of line 1",
    json.dumps(as_json(messages=None)): "missing key 'messages'",
    json.dumps(as_json(messages="Say hello.")): "messages is str; expected a list",
    json.dumps(as_json(messages=[])): "messages is empty",
    json.dumps(as_json(messages=["Say hello."])): "message 1: item is str; expected an object",
    json.dumps(
        as_json(messages=[{"role": "user", "content": "x"}, {"role": "user"}])
    ): "message 2: missing key 'content'",
    json.dumps(
        as_json(messages=[{"role": "wizard", "content": "x"}])
    ): "message 1: unknown role 'wizard'; expected one",
    json.dumps(as_json(messages=[{"role": ["user"], "content": "x"}])): "message 1: unknown role ['user']",
    json.dumps(
        as_json(messages=[{"role": "user", "content": None}])
    ): "message 1: the content of a message is NoneType",
    json.dumps(as_json(messages=[{"role": "assistant", "content": "x"}])): "the prompt ends with an assistant message",
    json.dumps(as_json(response=" \n")): "response is empty",
    json.dumps(as_json(response="\ud83d")): "response holds half a surrogate pair",
    json.dumps(as_json(category=3)): "category is int; expected a string",
    json.dumps(as_json(generation=[])): "generation is list; expected an object",
    json.dumps(as_json(**generation(model=None))): "missing key 'generation.model'",
    json.dumps(as_json(**generation(created="yesterday"))): "generation.created is 'yesterday'; expected an ISO-8601",
    json.dumps(as_json(**generation(parameters={"logit_bias": {"5": 1}}))): "generation.parameters.logit_bias is",
    json.dumps(as_json(**generation(usage={"prompt_tokens": 1}))): "missing key 'usage.completion_tokens'",
    json.dumps(as_json(**generation(usage={"prompt_tokens": -1, "completion_tokens": 0}))): "prompt_tokens is -1",
    json.dumps(as_json(**generation(sample=True))): "generation.sample is True; expected an integer",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    good = json.dumps(as_json(id="good"))
    path.write_bytes(f"{good}\n\n{line}\n".encode(errors="surrogateescape"))
    records = read_records(path)
    assert next(records).id == "good"
    with pytest.raises(DataFormatError) as caught:
        next(records)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (caught.value.path, caught.value.line) == (path, 3)


def test_a_torn_last_line_is_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record("1"), record("2")])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataFormatError, match=r"records\.jsonl:2: broken JSON"):
        list(read_records(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"cannot be read: No such file") as caught:
        list(read_records(tmp_path / "records.jsonl"))
    assert caught.value.line is None


def test_a_folder_without_data(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(.* contain any data files"):
        list(read_records(tmp_path))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("\n \n")
    with pytest.raises(DataFormatError, match="holds no records"):
        list(read_records(tmp_path / "records.jsonl"))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record("1"), record("2")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_records(path)) == [record("1"), record("2")]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record()])

    def fail() -> Any:
        yield record("another")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_records(path, fail())
    assert list(read_records(path)) == [record()]
    assert list(tmp_path.iterdir()) == [path]


def test_an_id_changes_with_what_was_asked_and_with_nothing_else() -> None:
    messages = (Message(role=Role.USER, content="Say hello."),)
    plain = record_id(messages, "m", {"temperature": 0, "seed": 1}, 0)
    assert plain == record_id(list(messages), "m", {"seed": 1.0, "temperature": 0.0}, 0)
    others = {
        record_id((Message(role=Role.SYSTEM, content="Say hello."),), "m", {"temperature": 0, "seed": 1}, 0),
        record_id(messages, "n", {"temperature": 0, "seed": 1}, 0),
        record_id(messages, "m", {"temperature": 0.5, "seed": 1}, 0),
        record_id(messages, "m", {"temperature": 0, "seed": "1"}, 0),
        record_id(messages, "m", {"temperature": 0, "seed": 1}, 1),
    }
    assert len(others) == 5
    assert plain not in others


def test_ids_are_the_same_on_every_machine() -> None:
    """Records in users' files bear these ids, so they may never change."""
    messages = (Message(role=Role.USER, content="Grüß Gott, 世界"),)
    assert record_id(messages, "m", {"temperature": 0.7, "stop": ["\n"]}, 2) == "4369127f85e5d27832b0"
    assert prompt_hash(messages) == "fd9f1ed2d5e8fb5fc494"


@settings(max_examples=60)
@given(
    prompts=st.lists(st.integers(0, 60), min_size=2, max_size=120),
    held_out=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_split_never_parts_an_instruction(
    prompts: list[int], held_out: float, seed: int, data: st.DataObject
) -> None:
    records = [record(f"Prompt {number}", sample=index) for index, number in enumerate(prompts)]
    try:
        training, held = split_by_instruction(records, held_out, seed)
    except ConfigError:  # a side would be empty; tested below
        return
    sides = [{prompt_hash(r.messages) for r in side} for side in (training, held)]
    assert not sides[0] & sides[1]
    assert sorted(training + held, key=lambda r: r.id) == sorted(records, key=lambda r: r.id)
    assert [r for r in records if r in training] == training  # in the given order

    shuffled = data.draw(st.permutations(records))
    again = split_by_instruction([*shuffled, *(record(f"New {n}") for n in range(40))], held_out, seed)
    assert {r.id for r in training} <= {r.id for r in again[0]}
    assert {r.id for r in held} <= {r.id for r in again[1]}


def test_the_held_out_share_is_about_what_was_asked() -> None:
    records = [record(f"Prompt {number}") for number in range(4000)]
    training, held = split_by_instruction(records, 0.1, 0)
    assert 350 < len(held) < 450  # 400 expected; 2.6 standard deviations are 50
    assert held != split_by_instruction(records, 0.1, 1)[1]
    assert split_by_instruction(records, 0, 0) == (records, [])
    assert len(training) + len(held) == 4000


@pytest.mark.parametrize("held_out", [-0.1, 1.0, 5, float("nan")])
def test_a_share_out_of_range(held_out: float) -> None:
    with pytest.raises(ConfigError, match="expected a share"):
        split_by_instruction([record()], held_out, 0)


def test_a_side_that_would_be_empty() -> None:
    with pytest.raises(ConfigError, match="leaves no held-out records out of 9"):
        split_by_instruction([record(sample=n) for n in range(9)], 1e-9, 0)
    with pytest.raises(ConfigError, match="leaves no training records"):
        split_by_instruction([record()], 1 - 1e-9, 0)


def test_reading_records_needs_no_torch() -> None:
    code = "import sys, terselm.data; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

"""Instructions from every kind of source, and what is taken out of them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from terselm.data.instructions import (
    Instruction,
    load_instructions,
    load_texts,
    read_instructions,
    without_near_duplicates,
    without_overlap,
    write_instructions,
)
from terselm.data.rows import read_rows
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError, DataFormatError

ALPACA = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Say yes.", "input": "", "output": ""},
]
PROMPTS = ["Add.\n\n1, 2", "Say yes."]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    {
        "conversations": [
            {"from": "human", "value": "A?"},
            {"from": "gpt", "value": "B."},
            {"from": "human", "value": "C?"},
        ]
    },
]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(source: str) -> list[str]:
    return ["|".join(message.content for message in one.messages) for one in load_instructions(source).instructions]


def instruction(text: str, name: str = "") -> Instruction:
    return Instruction(id=name or text[:20], messages=(Message(role=Role.USER, content=text),))


def test_json_lines_json_csv_and_parquet_are_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(ALPACA)
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "a.parquet")
    sources = [
        jsonl(tmp_path / "a.jsonl", ALPACA),
        *(str(tmp_path / f"a.{kind}") for kind in ("json", "csv", "parquet")),
    ]
    for source in sources:
        assert prompts(source) == PROMPTS


def test_a_json_file_may_hold_its_rows_as_examples(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"canary": "x", "examples": ALPACA}))
    assert [number for number, _ in read_rows(tmp_path / "task.json")] == [1, 2]
    assert prompts(str(tmp_path / "task.json")) == PROMPTS


def test_a_data_set_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ALPACA)
    jsonl(folder / "test.jsonl", [{"instruction": "Why?", "input": "", "output": ""}])
    assert prompts(str(folder)) == PROMPTS
    assert prompts(f"{folder}#test") == ["Why?"]
    with pytest.raises(ConfigError, match="has no split 'dev'; it has "):
        prompts(f"{folder}#dev")
    jsonl(folder / "test.jsonl", [{"other": 1}])
    with pytest.raises(DataFormatError, match="cannot be read as a data set: "):
        prompts(f"{folder}#test")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, streaming: bool) -> Any:
        asked.append((name, config))
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ConfigError,
        match=r"data set 'owner/name' cannot be loaded \(the hub is away\); check the name, or give a local file",
    ):
        prompts("hub:owner/name:small#train")
    assert asked == [("owner/name", "small")]


def test_conversations_end_before_the_last_answer(tmp_path: Path) -> None:
    assert prompts(jsonl(tmp_path / "a.jsonl", SHAREGPT)) == ["Hi.", "A?|B.|C?"]
    own = [
        {
            "id": 7,
            "category": "x",
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        }
    ]
    (one,) = load_instructions(jsonl(tmp_path / "b.jsonl", own)).instructions
    assert (one.id, one.category, one.messages[0].content, len(one.messages)) == ("7", "x", "Q", 1)


def test_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ("One?", "Two?", "One?", "One?")]
    loaded = load_instructions(jsonl(tmp_path / "a.jsonl", rows))
    assert ([i.messages[0].content for i in loaded.instructions], loaded.duplicates) == (["One?", "Two?"], 2)
    assert len({i.id for i in loaded.instructions}) == 2
    write_instructions(tmp_path / "b.jsonl", loaded.instructions)
    assert read_instructions(tmp_path / "b.jsonl") == loaded.instructions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, r"no known instruction has these keys \('x'\)"),
        ({"prompt": 3}, "prompt is int; expected a string"),
        ({"prompt": " "}, "is empty"),
        ({"id": "a", "prompt": "Other?"}, "id 'a' came before with another prompt"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"id": "a", "prompt": "One?"}, row])
    with pytest.raises(DataFormatError, match=message) as caught:
        load_instructions(source)
    assert str(caught.value).startswith(f"{source}:2: ")


def test_a_torn_csv_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,x\n"one",1\n"two"\n')
    with pytest.raises(DataFormatError, match=r"a\.csv:3: has another number of fields"):
        prompts(str(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataFormatError, match="holds no instructions"):
        prompts(str(tmp_path / "b.jsonl"))


def test_texts_to_score(tmp_path: Path) -> None:
    (first, second) = load_texts(jsonl(tmp_path / "a.jsonl", [{"id": "x", "text": "One."}, {"text": "Two."}]))
    assert (first.id, first.text, first.response_start, second.id) == ("x", "One.", None, "2")
    (record, _) = load_texts(jsonl(tmp_path / "b.jsonl", [ALPACA[0], {"instruction": "a", "output": "b"}]))
    assert record.text == "Add.\n\n1, 2\n\n3"
    assert record.response_start is not None
    assert record.text[record.response_start :] == "3"


def test_near_duplicates() -> None:
    words = [f"w{n}" for n in range(400)]
    chance = random.Random(0)
    texts = [" ".join(chance.sample(words, 60)) for _ in range(40)]
    near = [" ".join(["changed" if n == 30 else word for n, word in enumerate(text.split())]) for text in texts]
    kept, gone = without_near_duplicates([instruction(t, str(n)) for n, t in enumerate([*texts, *near])], 0.8)
    assert [one.id for one in kept] == [str(n) for n in range(40)]
    assert gone == 40
    with pytest.raises(ConfigError, match="near_duplicates is 1"):
        without_near_duplicates(kept, 1.0)


def test_overlap_with_a_benchmark(tmp_path: Path) -> None:
    long = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May"
    short = "what is the capital city of the country France"
    jsonl(tmp_path / "bench.jsonl", [{"q": long, "nested": [{"a": short}, "tiny text"]}])
    thirteen = " ".join(long.split()[3:16])
    twelve = " ".join(long.split()[3:15])
    asks = [
        instruction(f"Solve this: {thirteen.upper()}, and more!", "thirteen"),
        instruction(f"Solve this: {twelve} but otherwise.", "twelve"),
        instruction(f"Tell me, {short}?", "short"),
        instruction("tiny text", "tiny"),
    ]
    kept, gone = without_overlap(asks, [tmp_path / "bench.jsonl"])
    assert ([one.id for one in kept], gone) == (["twelve", "tiny"], 2)
    (tmp_path / "empty.txt").write_text("few words")
    with pytest.raises(DataFormatError, match="holds no text of 8 words"):
        without_overlap(asks, [tmp_path / "empty.txt"])

"""The commands under ``terselm data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from terselm.cli import app
from terselm.data.instructions import load_instructions
from terselm.data.records import read_records
from terselm.errors import TerseLMError

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
ALPACA = [{"instruction": f"Say {n % 7}.", "output": f"It is {n}."} for n in range(20)]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if isinstance(done.exception, TerseLMError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    return path


def test_statistics(alpaca: Path) -> None:
    found: dict[str, Any] = json.loads(run("stats", SAMPLE / "records.jsonl"))
    lines = [json.loads(line) for line in (SAMPLE / "records.jsonl").read_text().splitlines()]
    assert (found["records"], found["with_origin"]) == (len(lines), len(lines))
    assert found["completion_tokens"] == sum(line["generation"]["usage"]["completion_tokens"] for line in lines)
    assert found["response_characters"]["largest"] == max(len(line["response"]) for line in lines)
    assert sum(found["finish_reasons"].values()) == sum(found["temperatures"].values()) == len(lines)
    foreign = json.loads(run("stats", alpaca))
    assert (foreign["records"], foreign["prompts"], foreign["with_origin"], foreign["models"]) == (20, 7, 0, {})


def test_validation(alpaca: Path, tmp_path: Path) -> None:
    assert run("validate", alpaca) == "20 records, all well-formed\n"
    with alpaca.open("a") as file:
        file.write('{"instruction": "No answer"}\n')
    with pytest.raises(TerseLMError, match=r"alpaca\.jsonl:21: missing key 'output'"):
        run("validate", alpaca)
    with pytest.raises(TerseLMError, match="missing key 'output'"):
        run("convert", alpaca, "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_conversion_of_every_kind_of_file(alpaca: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    run("convert", alpaca, "--out", tmp_path / "one.jsonl")
    run("convert", tmp_path / "a.json", "--out", tmp_path / "two.jsonl")
    assert list(read_records(tmp_path / "one.jsonl")) == list(read_records(tmp_path / "two.jsonl"))
    assert [record.response for record in read_records(tmp_path / "one.jsonl")] == [row["output"] for row in ALPACA]
    with pytest.raises(TerseLMError, match=r"one\.jsonl exists"):
        run("convert", alpaca, "--out", tmp_path / "one.jsonl")


def test_a_split_keeps_instructions_together(alpaca: Path, tmp_path: Path) -> None:
    sides = (tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    run("split", alpaca, "--out", sides[0], "--held-out", sides[1], "--share", 0.4, "--seed", 1)
    train, test = ({record.messages for record in read_records(side)} for side in sides)
    assert train
    assert test
    assert not train & test


def test_instructions_are_cleaned(tmp_path: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog while nine old men watch it from a bench"
    short = "Entirely different, and short."
    rows = [words, words + " now", short, words.upper() + "?", short]
    source = tmp_path / "ask.jsonl"
    source.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    (tmp_path / "bench.txt").write_text(words)
    shown = run("instructions", source, "--out", tmp_path / "a.jsonl", "--near-duplicates", 0.8)
    assert json.loads(shown) == {"instructions": 2, "duplicates": 1, "near_duplicates": 2}
    shown = run("instructions", source, "--out", tmp_path / "b.jsonl", "--benchmark", tmp_path / "bench.txt")
    assert json.loads(shown) == {"instructions": 1, "duplicates": 1, "overlapping": 3}
    (left,) = load_instructions(str(tmp_path / "b.jsonl")).instructions
    assert left.messages[0].content == short

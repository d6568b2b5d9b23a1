"""What the bundled sample promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from terselm.config import load_config
from terselm.data.collection.plan import plan_requests
from terselm.data.collection.settings import CollectSettings
from terselm.data.faults import find_fault
from terselm.data.instructions import Instruction, read_instructions
from terselm.data.records import Generation, Record, prompt_hash, read_records, record_id, split_by_instruction
from terselm.models import load_tokenizer

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
EQUATION = re.compile(r"((?:\d[\d.]*\s*[-+*/]\s*)+\d[\d.]*)\s*=\s*(\d+(?:\.\d+)?)")


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    return read_instructions(SAMPLE / "instructions.jsonl")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(read_records(SAMPLE / "records.jsonl"))


@pytest.fixture(scope="module")
def collect_settings() -> CollectSettings:
    return load_config(CollectSettings, SAMPLE / "collect.yaml")


def made(record: Record) -> Generation:
    assert record.generation is not None
    return record.generation


def test_the_instructions_are_many_and_varied(instructions: list[Instruction]) -> None:
    categories = Counter(instruction.category for instruction in instructions)
    assert len(instructions) >= 200
    assert len(categories) >= 15
    assert min(categories.values()) >= 8
    assert max(categories.values()) <= len(instructions) / 6
    openings = {instruction.messages[-1].content[:25] for instruction in instructions}
    assert len(openings) > 0.75 * len(instructions)
    assert sum(instruction.messages[0].role == "system" for instruction in instructions) >= 4


def test_few_shot_and_long_instructions(instructions: list[Instruction]) -> None:
    few = [i.messages[-1].content for i in instructions if i.category == "few_shot"]
    long = [i.messages[-1].content for i in instructions if i.category == "long_context"]
    assert len(few) >= 15
    assert all(text.count("\n\n") >= 3 for text in few)
    assert len(long) >= 10
    assert all(500 <= len(text.split()) <= 1200 for text in long)


def test_the_records_answer_the_instructions(instructions: list[Instruction], records: list[Record]) -> None:
    assert len(records) >= 640
    known = {prompt_hash(instruction.messages): instruction.category for instruction in instructions}
    assert all(known[prompt_hash(record.messages)] == record.category for record in records)
    asked = Counter(prompt_hash(record.messages) for record in records)
    assert len(asked) >= 0.95 * len(instructions)
    assert max(asked.values()) == 3
    assert (SAMPLE / "records.jsonl").stat().st_size < 1_500_000


def test_greedy_and_sampled_at_two_temperatures(records: list[Record]) -> None:
    counts = Counter(made(record).parameters["temperature"] for record in records)
    assert counts.keys() == {0.0, 0.5, 0.8}
    assert min(counts.values()) >= 200
    seeds = {made(record).parameters["seed"] for record in records}
    assert len(seeds) == len(records)


def test_each_record_is_what_its_settings_ask_for(
    instructions: list[Instruction], records: list[Record], collect_settings: CollectSettings
) -> None:
    """So the command in the card, run again, finds nothing to ask but what was dropped."""
    requests = {request.id: request for request in plan_requests(instructions, collect_settings)}
    for record in records:
        generation = made(record)
        assert record.id == record_id(record.messages, generation.model, generation.parameters, generation.sample)
        assert generation.parameters == requests[record.id].parameters
        assert generation.model == collect_settings.target == "gemma3-270m"
        assert 1 <= generation.attempts <= collect_settings.attempts
        assert 0 < generation.usage.completion_tokens <= collect_settings.max_new_tokens
        assert set(generation.versions) == {"terselm", "transformers"}


def test_no_answer_is_empty_or_loops_or_repeats_the_prompt(records: list[Record]) -> None:
    for record in records:
        prompt = "\n\n".join(message.content for message in record.messages)
        template = str(made(record).parameters["prompt_template"])
        unfinished = made(record).finish_reason == "length"
        assert find_fault(record.response, prompt, template, unfinished=unfinished) is None, record.id
        assert "###" not in record.response
    reasons = Counter(made(record).finish_reason for record in records)
    assert reasons.keys() == {"stop", "length", "loop"}
    assert reasons["stop"] > 0.75 * len(records)


def test_the_split_keeps_instructions_apart(records: list[Record]) -> None:
    training, held_out = split_by_instruction(records, 0.1, 0)
    assert len(training) + len(held_out) == len(records)
    assert 0.05 * len(records) < len(held_out) < 0.2 * len(records)
    assert not {record.messages for record in training} & {record.messages for record in held_out}


def test_the_card_counts_rightly(instructions: list[Instruction], records: list[Record]) -> None:
    card = (SAMPLE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", card, re.MULTILINE)
    asked = Counter(str(instruction.category) for instruction in instructions)
    answered = Counter(str(record.category) for record in records)
    tokens: Counter[str] = Counter()
    for record in records:
        tokens[str(record.category)] += made(record).usage.completion_tokens
    expected = {(name, str(asked[name]), str(answered[name]), f"{tokens[name]:,}") for name in asked}
    expected.add(("all", str(len(instructions)), str(len(records)), f"{tokens.total():,}"))
    assert set(rows) == expected
    assert f"{sum(made(record).usage.prompt_tokens for record in records):,}" in card


def prompt_parts(name: str) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((SAMPLE / "prompts" / name).read_text(encoding="utf-8"))
    assert parts.keys() == {"instruction", "demonstrations", "question"}
    return parts


def test_the_maths_prompt_calculates_rightly() -> None:
    demonstrations = prompt_parts("few_shot_maths.json")["demonstrations"]
    assert 10 <= len(demonstrations) <= 14
    for text in demonstrations:
        equations = EQUATION.findall(text)
        assert len(equations) >= 3
        for left, right in equations:
            assert eval(left) == pytest.approx(float(right)), (left, right)
        (answer,) = re.findall(r"The answer is (\d+(?:\.\d+)?) ", text)
        assert float(answer) in {float(right) for _, right in equations}


def test_the_minutes_are_documents() -> None:
    parts = prompt_parts("meeting_minutes.json")
    assert 5 <= len(parts["demonstrations"]) <= 8
    assert all(text.startswith("Minutes, ") for text in parts["demonstrations"])


@pytest.mark.model
@pytest.mark.parametrize(("name", "least", "most"), [("few_shot_maths", 1500, 2300), ("meeting_minutes", 1200, 2300)])
def test_how_long_the_prompts_are(name: str, least: int, most: int) -> None:
    parts = prompt_parts(f"{name}.json")
    text = "\n\n".join([parts["instruction"], *parts["demonstrations"], parts["question"]])
    assert least <= len(load_tokenizer("smollm2-135m")(text, add_special_tokens=False).input_ids) <= most

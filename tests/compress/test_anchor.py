"""Demonstrations kept whole, and units wider than a token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from fakes import random_lm

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.layout import cut_units, merge_lines, merge_sentences
from terselm.compress.modes import anchor_for
from terselm.compress.settings import EXAMPLES_ANCHOR
from terselm.errors import ConfigError

DEMONSTRATIONS = [f"Question: Sam had {n} apples and ate 2.\nAnswer: {n - 2} are left." for n in range(5, 13)]
QUESTION = "Question: Ada reads 12 pages a day. How many in a week?"


def compress(rate: float, **options: Any) -> Any:
    options = {"anchor": 0.0, "anchor_by": "last"} | options
    settings = CompressionSettings(segment_size=20, question_rate=1.0, **options)
    return PromptCompressor(random_lm(), settings=settings).compress(
        demonstrations=DEMONSTRATIONS, question=QUESTION, rate=rate
    )


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.7])
def test_an_anchor_of_one_is_the_end_of_the_demonstrations(rate: float) -> None:
    result = compress(rate, anchor=1.0)
    before, question = result.text.rsplit("\n\n", 1)
    assert question == QUESTION
    assert "\n\n".join(DEMONSTRATIONS).endswith(before)
    assert result.compressed_tokens >= result.budget - 3


def test_the_shortest_are_anchors_first() -> None:
    settings = CompressionSettings(anchor=1.0, anchor_by="shortest", question_rate=1.0)
    result = PromptCompressor(random_lm(), settings=settings).compress(
        demonstrations=["one two three four " * 5, "five six", "seven eight nine " * 5], question="ten?", budget=30
    )
    assert "five six" in result.text.split("\n\n")


def test_an_anchor_leaves_the_rest_to_the_other_demonstrations() -> None:
    result = compress(0.5, anchor=0.5)
    kept = [
        sum(t.token_count for t in result.tokens if t.kept and t.index == i and t.part == "demonstration")
        for i in range(8)
    ]
    whole = [sum(t.token_count for t in result.tokens if t.index == i and t.part == "demonstration") for i in range(8)]
    assert kept[-1] == whole[-1]
    assert any(0 < some < everything for some, everything in zip(kept[:4], whole[:4], strict=True))
    assert result.compressed_tokens <= result.budget


def test_whole_demonstrations_are_kept_or_dropped() -> None:
    result = compress(0.5, unit="demonstration")
    parts = result.text.split("\n\n")
    assert parts[-1] == QUESTION
    assert len(parts) > 2
    assert set(parts[:-1]) <= set(DEMONSTRATIONS)


def test_lines_are_kept_or_dropped() -> None:
    result = compress(0.5, unit="line")
    lines = {line for demonstration in DEMONSTRATIONS for line in demonstration.split("\n")}
    assert {line for line in result.text.removesuffix(QUESTION).split("\n") if line} <= lines


@pytest.mark.parametrize(
    ("merge", "text", "expected"),
    [
        (merge_lines, "a b\n\n \nc\n  d", ["a b\n\n \n", "c\n", "  d"]),
        (merge_lines, "\n\na", ["\n\n", "a"]),
        (merge_lines, "a\n", ["a\n"]),
        (merge_sentences, "He ran. She ran 3.5 km (or so)", ["He ran.", " She ran 3.5 km (or so)"]),
        (merge_sentences, 'So he said "Go!" Then\nthey left.', ['So he said "Go!"', " Then\n", "they left."]),
        (merge_sentences, "一。二！三", ["一。", "二！", "三"]),
        (merge_sentences, "End.  \n\n  Next", ["End.  \n\n", "  Next"]),
    ],
)
def test_wide_units(merge: Any, text: str, expected: list[str]) -> None:
    units = merge(cut_units(range(len(text)), [(i, i + 1) for i in range(len(text))], text), text)
    bounds = units.bounds.tolist()
    assert [text[start:end] for start, end in pairwise(bounds)] == expected


def test_anchor_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"anchor is 1\.5; expected a share in"):
        CompressionSettings(anchor=1.5)


@pytest.mark.parametrize(
    ("demonstrations", "question", "examples"),
    [
        (DEMONSTRATIONS, QUESTION, True),
        (["", *DEMONSTRATIONS, " \n"], QUESTION, True),
        (["### a", "### b"], "### c", True),
        (["Q: a", "Q: b"], "Question: c", False),
        ([*DEMONSTRATIONS, "Answer: 5"], QUESTION, False),
        (DEMONSTRATIONS[:1], QUESTION, False),
        (DEMONSTRATIONS, "", False),
        (["What is a?", "What is b?"], "What is c?", False),  # turns of a talk, not labelled examples
        (["Document [1] a", "Document [2] b"], "Document [3]", False),
    ],
)
def test_worked_examples_are_recognised(demonstrations: list[str], question: str, examples: bool) -> None:
    assert anchor_for(Prompt(demonstrations=demonstrations, question=question)) == (EXAMPLES_ANCHOR if examples else 0)


def test_worked_examples_stay_whole_by_default() -> None:
    result = PromptCompressor(random_lm()).compress(demonstrations=DEMONSTRATIONS, question=QUESTION, rate=0.4)
    *examples, question = result.text.split("\n\n")
    assert question == QUESTION
    assert len(examples) > 1
    assert sum(example not in DEMONSTRATIONS for example in examples) <= 1
    assert all(any(whole.endswith(example) for whole in DEMONSTRATIONS) for example in examples)


@pytest.mark.parametrize(
    ("missing", "instruction", "question"), [(-5, True, True), (0, True, True), (1, False, True), (9, False, False)]
)
def test_question_and_instruction_stay_whole_where_the_budget_holds_them(
    missing: int, instruction: bool, question: bool
) -> None:
    parts = {"instruction": "Add up, and say nothing else.", "question": "How many apples and pears are there?"}
    lm = random_lm()
    budget = len(lm.tokenizer("\n\n".join(parts.values()), add_special_tokens=False).input_ids) - missing
    result = PromptCompressor(lm).compress(**parts, demonstrations=["There are 5 apples. " * 9], budget=budget)
    assert (parts["instruction"] in result.text) == instruction
    assert (parts["question"] in result.text) == question
    assert result.compressed_tokens <= budget

"""Demonstrations kept whole, and units wider than a token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from agreement import Case, assert_agrees
from fakes import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.layout import cut_units, merge_lines, merge_sentences
from terselm.compress.prompt import labels_of, most_similar
from terselm.compress.settings import AnchorOrder
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
    assert Prompt(demonstrations=demonstrations, question=question).holds_worked_examples == examples


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


LABELLED = [
    "Review: The food was cold and the waiter rude, and nobody said sorry.\nFeeling: bad",
    "Review: Lovely garden, friendly people, and the best bread in town!\nFeeling: good",
    "Review: Fine.\nFeeling: good",
    "Review: It closes at nine.\nFeeling: neither",
    "Review: Good tea.\nFeeling: good",
    "Review: My soup came late and the bread was hard as stone.\nFeeling: bad",
]


@pytest.mark.parametrize(
    ("examples", "labels"),
    [
        (LABELLED, ["bad", "good", "good", "neither", "good", "bad"]),
        (["Q: a?\nSo the answer is Yes.", "Q: b?\nSo the answer is no", "Q: c?\nYes."], ["yes", "no", "yes"]),
        (["Text: a => New York !", "Text: b => new york", "Text: c\nParis\n\n"], ["new york", "new york", "paris"]),
        (["情感：好", "情感：坏", "情感：好"], ["好", "坏", "好"]),
        (["a: 1", "b: 2"], None),  # as many as examples
        (["a: 1", "b: 1"], None),
        (["a: one", "b: one", "c:  "], None),
        (["a: one", "b: one", "c: quite a long answer"], None),
        ([], None),
    ],
)
def test_labels_are_recognised(examples: list[str], labels: list[str] | None) -> None:
    assert labels_of(examples) == labels


@pytest.mark.parametrize(
    ("question", "similar"),
    [
        ("Review: The waiter was so rude!\nFeeling:", 0),
        ("Review: BREAD in the garden\nFeeling:", 1),
        ("Review: late bread\nFeeling:", 5),
        ("Review: good\nFeeling:", 4),
        ("Review:\nFeeling:", None),  # the template alone says nothing
        ("", None),
    ],
)
def test_the_most_similar_example_shares_rare_words(question: str, similar: int | None) -> None:
    assert most_similar(question, LABELLED) == similar


def test_of_equally_similar_examples_the_later_counts() -> None:
    assert most_similar("Q: apples?", ["Q: apples", "Q: pears", "Q: apples"]) == 2
    assert most_similar("Q: 我们去公园", ["Q: 公园", "Q: 天气"]) == 0


def count(text: str) -> int:
    return len(random_lm().tokenizer(text, add_special_tokens=False)["input_ids"])


def whole(result: Any, examples: list[str]) -> set[int]:
    """The numbers of the examples that are kept whole."""
    kept = dict.fromkeys(range(len(examples)), "")
    for token in result.tokens:
        if token.kept and token.part == "demonstration":
            kept[token.index] += token.text
    return {number for number, text in kept.items() if text == examples[number]}


def compress_labelled(question: str, numbers: list[int], spare: int = 0, **options: Any) -> set[int]:
    """What is kept whole where the budget holds the question and these examples."""
    budget = spare + count("\n\n".join([*(LABELLED[n] for n in numbers), question]))
    compressor = PromptCompressor(random_lm(), settings=CompressionSettings(**options))
    return whole(compressor.compress(demonstrations=LABELLED, question=question, budget=budget), LABELLED)


def test_every_label_stays_while_the_budget_holds_one_of_each() -> None:
    question = "Review: How nice.\nFeeling:"
    assert compress_labelled(question, [0, 2, 3]) >= {2, 3, 5}  # 5 is the shorter bad one
    assert compress_labelled(question, [5, 2, 3]) == {2, 3, 5}
    assert compress_labelled(question, [5, 2, 3], anchor_by="shortest") == {2, 3, 4}
    assert compress_labelled(question, [5, 2, 3], anchor=1.0) == {2, 3, 4}


def test_the_most_similar_example_stays_beside_the_labels() -> None:
    question = "Review: The garden!\nFeeling:"
    assert compress_labelled(question, [1, 3, 5]) == {1, 3, 5}
    assert compress_labelled(question, [1, 3, 5], -1) >= {2, 3, 5}  # labels go first
    assert 1 not in compress_labelled(question, [1, 3, 5], -1)
    assert compress_labelled(question, [1]) == {1}  # no room for all labels: then the similar one


EXAMPLES = st.lists(
    st.builds(
        "Text: {}\nLabel: {}".format,
        st.lists(
            st.sampled_from(["red", "green", "blue", "old", "new", "car", "house", "tree", "lake"]), max_size=8
        ).map(" ".join),
        st.sampled_from(["yes", "no", "maybe"]),
    ),
    min_size=3,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(EXAMPLES, st.sampled_from(["red car", "old tree by the lake", "", "what?"]), st.floats(0.1, 0.9))
def test_labels_and_the_similar_example_stay_where_they_fit(examples: list[str], asked: str, rate: float) -> None:
    question = f"Text: {asked}\nLabel:"
    prompt = Prompt(demonstrations=examples, question=question)
    case = Case(prompt=prompt, settings=CompressionSettings(), rate=rate)
    result = assert_agrees(random_lm(), case)
    kept = whole(result, examples)
    left = result.budget - count(question)
    size = [count(f"{text}\n\n") for text in examples]
    labels = labels_of(examples) or [""] * len(examples)
    cheapest = {label: min(s for s, other in zip(size, labels, strict=True) if other == label) for label in labels}
    similar = most_similar(question, examples)
    if labels[0] and sum(cheapest.values()) <= left:
        assert {labels[n] for n in kept} == set(labels)
    if similar is not None:
        others = sum(s for label, s in cheapest.items() if label and label != labels[similar])
        if size[similar] + others <= left or (size[similar] <= left < sum(cheapest.values()) and labels[0]):
            assert similar in kept


@pytest.mark.parametrize("options", [{"anchor": 1.0}, {"anchor": 0.5, "unit": "word"}, {"anchor": 0.0}])
def test_an_anchor_that_is_named_is_as_ever(options: dict[str, Any]) -> None:
    question = "Review: The garden!\nFeeling:"
    texts = [
        PromptCompressor(random_lm(), settings=CompressionSettings(**options, anchor_by=order))
        .compress(demonstrations=LABELLED, question=question, rate=0.5)
        .text
        for order in (AnchorOrder.AUTO, AnchorOrder.SHORTEST)
    ]
    assert texts[0] == texts[1]

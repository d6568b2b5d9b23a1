"""What a row may look like: any JSON object is a request or an error that says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from terselm.compress.bulk.files import dump_row
from terselm.compress.bulk.rows import READ_KEYS, RESULT_KEYS, passed_through, read_prompt_row
from terselm.compress.prompt import Prompt
from terselm.errors import BudgetError, PromptError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*READ_KEYS, *RESULT_KEYS[:1], "id"]) | st.text(max_size=3)
ROWS = st.dictionaries(KEYS, VALUES, max_size=5)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]))


@given(ROWS, st.none() | st.integers(1, 9))
@example({"question": "Why?", "pinned": 0.0}, None)
def test_a_request_or_a_reason(row: dict[str, Any], budget: int | None) -> None:
    try:
        request = read_prompt_row(3, row, budget, None if budget else 0.5)
    except (PromptError, BudgetError):
        return
    assert request.number == 3
    own = row.get("budget") is not None or row.get("rate") is not None
    target = (request.length.budget, request.length.rate)
    assert target == ((row.get("budget"), row.get("rate")) if own else (budget, None if budget else 0.5))
    whole = "".join(piece.text for piece in request.prompt.pieces())
    source = row.get("text") if row.get("text") is not None else row.get("prompt") or row
    if isinstance(source, dict):
        source = "".join(
            [source.get("instruction") or "", *(source.get("demonstrations") or []), source.get("question") or ""]
        )
    assert whole == source


@given(PLAIN, st.lists(PLAIN), PLAIN)
def test_three_forms_of_one_prompt(instruction: str, demonstrations: list[str], question: str) -> None:
    parts = {"instruction": instruction, "demonstrations": demonstrations, "question": question}
    flat = read_prompt_row(1, parts, 5, None)
    assert read_prompt_row(1, {"prompt": parts, "text": None}, 5, None) == flat
    assert read_prompt_row(1, {"prompt": {k: v or None for k, v in parts.items()}}, 5, None) == flat
    text = read_prompt_row(1, {"text": question}, 5, None)
    assert text.prompt == read_prompt_row(1, {"demonstrations": [question]}, 5, None).prompt


@given(ROWS)
def test_what_is_passed_through_survives_its_line(row: dict[str, Any]) -> None:
    rest = passed_through(row)
    assert rest.keys() == row.keys() - READ_KEYS
    try:
        line = dump_row(rest)
    except ValueError:
        assert "inf" in repr(rest)
        return
    assert b"\n" not in line.encode()
    assert json.loads(line) == rest


@given(PLAIN, PLAIN)
def test_a_question_beside_a_text_is_what_it_is_ranked_for(text: str, question: str) -> None:
    prompt = read_prompt_row(1, {"text": text, "question": question}, 5, None).prompt
    assert prompt == Prompt(demonstrations=[text], ranked_for=question)


@pytest.mark.parametrize("row", [{"text": "a", "question": 3}, {"text": "a", "question": "b", "instruction": "c"}])
def test_a_question_beside_a_text_that_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"question is a int; expected a string|the row holds text and instruction"):
        read_prompt_row(1, row, 5, None)

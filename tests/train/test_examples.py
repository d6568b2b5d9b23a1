"""From records to tokens: what is counted, where text begins and ends, what becomes of long records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terselm.data.records import Generation, Message, Record, Role, Usage
from terselm.train.examples import Encoding, encode_records, render_record
from terselm.train.settings import LossOn, Overlong, Template

START, END = 0, 1
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))


def record(prompt: str, response: str, finish_reason: str | None = None) -> Record:
    generation = None
    if finish_reason is not None:
        generation = Generation(
            model="target",
            parameters={},
            created="2026-01-01",
            finish_reason=finish_reason,
            usage=Usage(prompt_tokens=1, completion_tokens=1),
        )
    return Record(
        id=prompt, messages=(Message(role=Role.USER, content=prompt),), response=response, generation=generation
    )


@pytest.fixture(scope="module")
def encoding(tokenizer: Any) -> Encoding:
    return Encoding(
        tokenizer=tokenizer,
        start_id=START,
        end_id=END,
        template=Template.RAW,
        loss_on=LossOn.RESPONSE,
        max_length=10_000,
        overlong=Overlong.SPLIT,
    )


@given(prompt=TEXT, response=TEXT)
def test_the_mask_covers_the_response_and_its_end(encoding: Encoding, prompt: str, response: str) -> None:
    (example,) = encode_records([record(prompt, response)], encoding).examples
    decode = encoding.tokenizer.decode
    assert decode(example.ids[example.counted], clean_up_tokenization_spaces=False) == f"{response}</s>"
    assert decode(example.ids[~example.counted], clean_up_tokenization_spaces=False) == f"<s>{prompt}\n\n"
    first = example.counted.argmax()
    assert example.counted[first:].all()


def test_loss_on_all_counts_everything_but_the_start(encoding: Encoding) -> None:
    (example,) = encode_records([record("one two", "three")], replace(encoding, loss_on=LossOn.ALL)).examples
    assert not example.counted[0]
    assert example.counted[1:].all()


def test_text_that_looks_like_a_special_token_is_text(encoding: Encoding) -> None:
    (example,) = encode_records([record("</s> <s>", "<s></s>")], encoding).examples
    assert example.ids[0] == START
    assert example.ids[-1] == END
    assert not set(example.ids[1:-1].tolist()) & {START, END}


@pytest.mark.parametrize(("reason", "ends"), [("stop", True), ("length", False), ("loop", False), (None, True)])
def test_an_answer_that_was_cut_short_has_no_end(encoding: Encoding, reason: str | None, ends: bool) -> None:
    (example,) = encode_records([record("one", "two", reason)], encoding).examples
    assert (example.ids[-1] == END) == ends


def test_templates() -> None:
    messages = (Message(role=Role.SYSTEM, content="Be brief."), Message(role=Role.USER, content="Add {1} and 2."))
    both = Record(id="1", messages=messages, response="3")
    assert render_record(both, Template.RAW).prompt == "Be brief.\n\nAdd {1} and 2.\n\n"
    assert render_record(both, Template.ALPACA).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nBe brief.\n\nAdd {1} and 2.\n\n### Response:"
    )
    assert render_record(both, Template.ALPACA).response == render_record(both, Template.RAW).response == "3"


def test_a_record_that_just_fits_is_whole(encoding: Encoding) -> None:
    length = len(encode_records([record("one", "two three")], encoding).examples[0])
    assert encode_records([record("one", "two three")], replace(encoding, max_length=length)).split == 0
    assert encode_records([record("one", "two three")], replace(encoding, max_length=length - 1)).split == 1


def test_overlong_records_are_split_and_counted(encoding: Encoding) -> None:
    long, short = record("one " * 30, "two " * 50), record("a", "b")
    (whole,) = encode_records([long], encoding).examples
    encoded = encode_records([long, short], replace(encoding, max_length=16))
    pieces = [example for example in encoded.examples if example.record == 0]
    assert (encoded.split, encoded.dropped) == (1, 0)
    assert all(len(piece) <= 16 and piece.ids[0] == START and not piece.counted[0] for piece in pieces)
    assert all(piece.counted.any() for piece in pieces)
    counted = [token for piece in pieces for token in piece.ids[piece.counted].tolist()]
    assert counted == whole.ids[whole.counted].tolist()


def test_overlong_records_are_dropped_and_counted(encoding: Encoding) -> None:
    tight = replace(encoding, max_length=16, overlong=Overlong.DROP)
    encoded = encode_records([record("one " * 30, "two"), record("a", "b")], tight)
    assert (encoded.split, encoded.dropped) == (0, 1)
    assert [example.record for example in encoded.examples] == [1]


def test_nothing_left_is_no_example(encoding: Encoding) -> None:
    tight = replace(encoding, max_length=16, overlong=Overlong.DROP)
    assert not encode_records([record("one " * 30, "two")], tight).examples

"""Bits per byte by hand, and the interval of a difference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import make_model, surprisals

from terselm.data.records import Message, Record, Role
from terselm.train.examples import EncodedRecords, Encoding, encode_records
from terselm.train.held_out import HeldOutText, compare_scores, score_held_out
from terselm.train.packing import collate
from terselm.train.settings import LossOn, Overlong, Template
from terselm.train.surprisals import give_surprisals


def records() -> list[Record]:
    answers = [("one two", "red"), ("three", "naïve 🙂"), ("one two", "green and blue"), ("x y z", "x" * 90)]
    return [
        Record(id=str(i), messages=(Message(role=Role.USER, content=prompt),), response=response)
        for i, (prompt, response) in enumerate(answers)
    ]


def encoding(tokenizer: Any) -> Encoding:
    return Encoding(
        tokenizer=tokenizer,
        start_id=0,
        end_id=None,
        template=Template.RAW,
        loss_on=LossOn.RESPONSE,
        max_length=64,
        overlong=Overlong.SPLIT,
    )


def test_tokens_and_bytes_are_those_of_the_responses(tokenizer: Any) -> None:
    text = HeldOutText.of(records(), encode_records(records(), encoding(tokenizer)))
    assert text.prompt_of.tolist() == [0, 1, 0, 2]
    # The 90 letters do not fit into 64 tokens at once; no piece of them is lost.
    assert text.text_bytes.tolist() == [3 + 14, 6 + 1 + 4, 90]
    expected = [len(tokenizer(r.response, add_special_tokens=False)["input_ids"]) for r in records()]
    assert text.tokens.tolist() == [expected[0] + expected[2], expected[1], expected[3]]


def test_a_dropped_record_counts_for_nothing(tokenizer: Any) -> None:
    dropping = replace(encoding(tokenizer), overlong=Overlong.DROP)
    text = HeldOutText.of(records(), encode_records(records(), dropping))
    assert text.text_bytes.tolist() == [17, 11, 0]


@pytest.mark.parametrize("rows_per_pass", [1, 3])
def test_the_score_is_the_sum_over_the_response_tokens(tokenizer: Any, rows_per_pass: int) -> None:
    encoded = encode_records(records(), encoding(tokenizer))
    text = HeldOutText.of(records(), encoded)
    lm = make_model(len(tokenizer))
    give_surprisals(lm, autocast=None)
    shares = [
        score_held_out(lm, text, row_length=64, rows_per_pass=rows_per_pass, rank=0, processes=1),
    ]
    expected = np.zeros(3)
    with torch.no_grad():
        for example in encoded.examples:
            expected[text.prompt_of[example.record]] += surprisals(lm, collate([[example]])).sum().item()
    np.testing.assert_allclose(sum(shares), expected, rtol=1e-5)


def held_out(text_bytes: list[int], tokens: list[int]) -> HeldOutText:
    nothing = EncodedRecords(examples=[], split=0, dropped=0, tokens=0, counted_tokens=0)
    prompts = np.arange(len(tokens))
    return HeldOutText(nothing, prompts, np.array(tokens, dtype=np.float64), np.array(text_bytes, dtype=np.float64))


def test_bits_per_byte_by_hand() -> None:
    # 10 tokens of ln 8 nats are 30 bits; over 15 bytes, 2 bits per byte.
    text = held_out([5, 10], [4, 6])
    nats = np.array([4, 6]) * math.log(8)
    assert text.bits_per_byte(nats) == pytest.approx(2)
    assert text.nll_per_token(nats) == pytest.approx(math.log(8))


def test_a_difference_that_is_the_same_everywhere_has_no_width() -> None:
    text = held_out([5, 10, 20], [1, 1, 1])
    before = np.array([3.0, 4.0, 5.0])
    after = before - math.log(2) * text.text_bytes * 0.25
    result = compare_scores(text, before, after, seed=0)["difference"]
    assert result["bits_per_byte"] == pytest.approx(-0.25)
    assert result["bits_per_byte_interval"] == pytest.approx([-0.25, -0.25])


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    draw = np.random.default_rng(1)
    gains = draw.normal(-0.1, 1.0, 400)
    text = held_out([1] * 400, [1] * 400)
    low, high = compare_scores(text, np.zeros(400), gains * math.log(2), seed=0)["difference"]["bits_per_byte_interval"]
    half = 1.96 * gains.std() / 20
    assert low == pytest.approx(gains.mean() - half, abs=0.01)
    assert high == pytest.approx(gains.mean() + half, abs=0.01)


def test_the_interval_is_paired() -> None:
    """Prompts that differ much from each other, each a little better: the difference is certain all the same."""
    before = np.random.default_rng(2).uniform(10, 1000, 50)
    text = held_out([100] * 50, [30] * 50)
    low, high = compare_scores(text, before, before - 5, seed=0)["difference"]["bits_per_byte_interval"]
    assert high < 0
    assert high - low < 1e-9

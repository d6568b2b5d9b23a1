"""Labelled prompts as examples: where units end, what is counted, and that windows and packing change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_labels import label
from tiny_training import make_model

from terselm.train.examples import Encoding
from terselm.train.labelled import encode_labelled, read_prompts
from terselm.train.model import add_head
from terselm.train.packing import MODEL_INPUTS, collate
from terselm.train.settings import LossOn, Overlong, Template
from terselm.train.surprisals import Readings, give_surprisals


@pytest.fixture(scope="module")
def encoding(tokenizer: Any) -> Encoding:
    return Encoding(
        tokenizer=tokenizer,
        start_id=0,
        end_id=1,
        template=Template.RAW,
        loss_on=LossOn.RESPONSE,
        max_length=256,
        overlong=Overlong.SPLIT,
    )


def text_of(tokenizer: Any, ids: Any) -> str:
    found: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return found


def test_a_prompt_is_read_after_its_question_and_scored_at_the_units_ends(encoding: Encoding) -> None:
    prompt = label(3)
    (example,) = encode_labelled([prompt], encoding).examples
    tokenizer = encoding.tokenizer
    whole = f"<s>Question: {prompt.question}\n\n" + "\n\n".join(prompt.demonstrations)
    assert text_of(tokenizer, example.ids) == whole
    assert text_of(tokenizer, example.ids[example.counted]) == "".join(prompt.demonstrations)
    assert example.labels is not None
    ends = [text_of(tokenizer, example.ids[: end + 1]) for end in example.labels.ends]
    shown = ["", *prompt.demonstrations]
    for found, (number, _, end) in zip(ends, prompt.units, strict=True):
        before = "\n\n".join([*shown[1 : number + 1], shown[number + 1][:end]])
        assert found == f"<s>Question: {prompt.question}\n\n{before}"
    utility = np.asarray(prompt.utility)
    np.testing.assert_allclose(example.labels.values, (utility - np.mean(utility)) / np.std(utility), rtol=1e-6)
    assert example.labels.values.mean() == pytest.approx(0, abs=1e-6)
    assert example.labels.share == 1.0


def test_windows_share_out_units_and_count_each_token_once(encoding: Encoding) -> None:
    prompt = label(5, documents=4, units=5)
    narrow = replace(encoding, max_length=64)
    encoded = encode_labelled([prompt], narrow)
    (whole,) = encode_labelled([prompt], encoding).examples
    assert (encoded.split, encoded.dropped) == (1, 0)
    assert len(encoded.examples) > 1
    assert all(len(example) <= 64 for example in encoded.examples)
    (read,) = read_prompts([prompt], narrow)
    assert np.concatenate(read.units).tolist() == list(range(20))
    labels = [example.labels for example in encoded.examples if example.labels is not None]
    assert sum(each.share for each in labels) == pytest.approx(1.0)
    counted = [token for example in encoded.examples for token in example.ids[example.counted].tolist()]
    assert counted == whole.ids[whole.counted].tolist()
    dropped = encode_labelled([prompt], replace(narrow, overlong=Overlong.DROP))
    assert (len(dropped.examples), dropped.dropped) == (0, 1)


def test_questions_are_dropped_by_a_hash(encoding: Encoding) -> None:
    prompts = [label(index) for index in range(200)]

    def without(prompts: list[Any], share: float) -> set[int]:
        examples = encode_labelled(prompts, encoding, dropped=share, seed=1).examples
        return {e.record for e in examples if "Question" not in text_of(encoding.tokenizer, e.ids)}

    assert without(prompts, 0.0) == set()
    assert len(without(prompts, 1.0)) == 200
    some = without(prompts, 0.3)
    assert 35 < len(some) < 85
    assert without(prompts[:50], 0.3) == {index for index in some if index < 50}


def test_prompts_that_say_nothing_are_left_out_and_counted(encoding: Encoding) -> None:
    flat = replace(label(1), utility=(1.0,) * 6)
    long = replace(label(2), question="red " * 200)
    encoded = encode_labelled([flat, long, label(3)], encoding)
    assert (encoded.unordered, encoded.dropped, len(encoded.examples)) == (1, 1, 1)


def test_scores_of_packed_rows_are_those_of_each_prompt_alone(encoding: Encoding) -> None:
    lm = make_model(len(encoding.tokenizer))
    give_surprisals(lm, autocast=None)
    head = add_head(lm, seed=3)
    examples = list(encode_labelled([label(index) for index in range(5)], encoding).examples)
    rows = [examples[:3], examples[3:]]

    def scores(rows: list[Any]) -> torch.Tensor:
        batch = collate(rows)
        output = lm(**{name: batch[name] for name in MODEL_INPUTS})
        assert isinstance(output, Readings)
        return output.scores

    with torch.no_grad():
        packed = scores(rows)
        plain = []
        for example in examples:
            assert example.labels is not None
            states = lm.base_model(
                input_ids=torch.tensor(example.ids)[None], position_ids=torch.arange(len(example))[None]
            ).last_hidden_state[0]
            plain.append(states[example.labels.ends] @ head.weight + head.bias)
        torch.testing.assert_close(packed, torch.cat(plain), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed, torch.cat([scores([[e]]) for e in examples]), atol=1e-5, rtol=1e-5)

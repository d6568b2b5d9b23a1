"""Scores of local targets, against one text at a time, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fakes import bigram_lm, random_lm

from terselm.data.logprobs import ScoredText, score_texts
from terselm.data.schema import PlainText
from terselm.errors import ModelError
from terselm.models import CausalLM, scoring

TEXTS = ["The cat sat on the mat.", "", "我们今天 naïve 👍 café", "Question: 12 - 5 = 7. " * 9, "a"]


def score(lm: CausalLM, texts: list[str], top_k: int = 0) -> dict[str, ScoredText]:
    plain = [PlainText(id=str(number), text=text, response_start=0) for number, text in enumerate(texts)]
    return {scored.id: scored for batch in score_texts(lm, plain, top_k) for scored in batch}


def one_by_one(lm: CausalLM, ids: list[int]) -> list[float]:
    """The log-probability of each token, from a pass over what is before it."""
    found = []
    for place in range(len(ids)):
        logits = lm.model(input_ids=torch.tensor([[lm.start_id, *ids[:place]]])).logits[0, -1]
        found.append(float(logits.detach().double().log_softmax(-1)[ids[place]]))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_scores_are_those_of_one_token_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm(kind)
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 100)  # several passes
    scored = score(lm, TEXTS, top_k=3)
    assert len(scored) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        found = scored[str(number)]
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        assert found.token_ids is not None
        assert found.token_ids.tolist() == ids
        np.testing.assert_allclose(found.logprobs, one_by_one(lm, ids), atol=2e-4)
        if ids:
            assert found.top_ids is not None
            assert found.top_logprobs is not None
            assert (np.diff(found.top_logprobs, axis=1) <= 0).all()
            best = found.top_ids[:, 0] == found.token_ids
            np.testing.assert_allclose(found.top_logprobs[best, 0], found.logprobs[best])


def test_spans_cover_the_text_in_order() -> None:
    lm = random_lm("llama")
    for number, found in score(lm, TEXTS).items():
        starts, ends = found.starts.tolist(), found.ends.tolist()
        assert starts == sorted(starts)
        assert ends == sorted(ends)
        covered = {place for start, end in zip(starts, ends, strict=True) for place in range(start, end)}
        assert covered == set(range(len(TEXTS[int(number)])))


def test_known_probabilities() -> None:
    lm = bigram_lm("abc", {"<s>": {"a": 0.5}, "a": {"b": 0.9}, "b": {"c": 0.8}})
    found = score(lm, ["a b c"])["0"]
    np.testing.assert_allclose(found.logprobs, [math.log(p) for p in (0.5, 0.9, 0.8)], atol=1e-5)
    assert found.starts.tolist() == [0, 2, 4]


def test_a_text_longer_than_the_window() -> None:
    lm = random_lm("llama", window=41)
    text = TEXTS[3]
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > 100
    found = score(lm, [text])["0"]
    assert len(found.logprobs) == len(ids)
    np.testing.assert_allclose(found.logprobs[:40], one_by_one(lm, ids[:40]), atol=2e-4)
    np.testing.assert_allclose(found.logprobs[40:60], one_by_one(lm, ids[20:60])[20:], atol=2e-4)
    np.testing.assert_allclose(found.logprobs[60:80], one_by_one(lm, ids[40:80])[20:], atol=2e-4)


def test_a_pass_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm("llama")
    expected = score(lm, TEXTS, top_k=2)
    rows: list[int] = []

    def scarce(model: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        rows.append(len(ids))
        return last_states(model, ids)

    monkeypatch.setitem(scoring._FREE_PADDING, "cpu", 1 << 10)  # all texts in one pass
    last_states = scoring.last_states
    monkeypatch.setattr(scoring, "last_states", scarce)
    most = 2
    found = score(lm, TEXTS, top_k=2)
    assert max(rows) == 2
    for name, one in expected.items():
        np.testing.assert_allclose(found[name].logprobs, one.logprobs, atol=1e-5)
        np.testing.assert_array_equal(found[name].top_ids, one.top_ids)
    most = 0
    with pytest.raises(ModelError, match=r"the memory of cpu is too small to read \d+ tokens with 'random-llama'"):
        score(lm, TEXTS)

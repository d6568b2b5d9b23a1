"""Each part of the algorithm that can be taken out, taken out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import random_lm

from terselm import PromptCompressor
from terselm.compress.settings import Ablations, paper_settings
from terselm.errors import ConfigError

PROMPT: dict[str, Any] = {
    "instruction": "Answer the question. Use what the examples say, and nothing else.",
    "demonstrations": [f"Question: Sam had {n} apples and ate 2.\nAnswer: {n - 2} are left." for n in range(5, 13)],
    "question": "Question: Ada reads 12 pages a day. How many in a week?",
}


def compress(rate: float = 0.3, **ablations: Any) -> Any:
    settings = paper_settings(segment_size=20, ablations=Ablations(**ablations))
    return PromptCompressor(random_lm(), settings=settings).compress(**PROMPT, rate=rate)


def kept_share(result: Any, part: str) -> float:
    tokens = [token for token in result.tokens if token.part == part]
    return sum(token.token_count for token in tokens if token.kept) / sum(token.token_count for token in tokens)


def test_all_demonstrations_take_part() -> None:
    assert compress().selected != tuple(range(8))
    assert compress(selection="all").selected == tuple(range(8))


def test_random_demonstrations_are_as_many_and_stay_the_same() -> None:
    chosen, again = compress(selection="random"), compress(selection="random")
    assert chosen.selected == again.selected
    assert chosen.text == again.text
    assert chosen.selected != compress().selected
    assert abs(len(chosen.selected) - len(compress().selected)) <= 1  # they differ in length
    assert all(token.surprisal is None for token in chosen.tokens if token.segment is None)


def test_without_budget_controller_all_parts_are_thinned_alike() -> None:
    result = compress(selection="all", uniform_rates=True)
    shares = [kept_share(result, part) for part in ("instruction", "demonstration", "question")]
    assert max(shares) - min(shares) < 0.1
    assert kept_share(compress(), "instruction") > 0.8


def test_one_pass_scores_every_token_given_the_whole_text_before_it() -> None:
    lm = random_lm()
    result = compress(one_pass=True)
    part_taking = [token for token in result.tokens if token.segment is not None]
    selected = [PROMPT["demonstrations"][i] for i in result.selected]
    pieces = [PROMPT["instruction"], *selected, PROMPT["question"]]
    encode = lambda text: lm.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # noqa: E731
    ids, own = [lm.start_id], [False]
    for number, piece in enumerate(pieces):
        separator = encode("\n\n") if number else []
        ids += separator + encode(piece)
        own += [False] * len(separator) + [True] * len(encode(piece))
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1]
    expected = -torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].numpy()[np.array(own[1:])]
    assert [token.surprisal for token in part_taking] == pytest.approx(expected.tolist(), abs=1e-3)
    assert result.compressed_tokens <= result.budget


def test_next_token_scores_every_token_by_the_one_after_it() -> None:
    own, other = compress(0.6, one_pass=True), compress(0.6, one_pass=True, next_token=True)
    segments: dict[int, list[tuple[Any, Any]]] = {}
    for mine, shifted in zip(own.tokens, other.tokens, strict=True):
        if mine.part == "instruction":  # here both read the same text
            segments.setdefault(mine.segment, []).append((mine.surprisal, shifted.surprisal))
    assert len(segments) > 1
    for pairs in segments.values():
        mine, shifted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        assert shifted == pytest.approx([*mine[1:], mine[-1]])
    assert other.text != own.text


def test_random_tokens_need_no_model_and_stay_the_same() -> None:
    chosen, again = compress(random_tokens=True), compress(random_tokens=True)
    assert chosen.text == again.text
    assert chosen.text != compress().text
    assert chosen.compressed_tokens <= chosen.budget
    assert all(token.surprisal is None for token in chosen.tokens if token.part != "demonstration")


def test_unknown_selection() -> None:
    with pytest.raises(ConfigError, match="selection is 'best'; expected one of perplexity, random, all"):
        Ablations(selection="best")  # type: ignore[arg-type]

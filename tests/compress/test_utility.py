"""Compression by utility: against the brute-force reference, what is read for it, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from agreement import Case, assert_agrees, assert_same, count_bytes, run_reference
from fakes import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_pieces import tokenise
from reference_utility import question_ids, score_of
from test_memory import with_memory_for
from test_properties import PROMPTS
from test_ranking import APPLES, CATS, DATA, DOCUMENTS, LOG, PLAIN, QUESTION, prompt_of

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.compress.utility import longest_question, question_before, utility_windows
from terselm.errors import BudgetError, ConfigError, ContextLengthError, ModelError, PromptError
from terselm.models import CausalLM
from terselm.models.utility_head import UtilityHead

UTILITY = CompressionSettings(rank_by="utility")
EXAMPLES = tuple(f"Question: {n} + {n}?\nIt is twice {n}.\nThe answer is {2 * n}." for n in (1, 2, 3))


@cache
def with_head(kind: str = "llama", *, window: int = 4096) -> CausalLM:
    return replace(random_lm(kind, window=window), utility=UtilityHead(32, seed=1))


def compress(lm: CausalLM, prompt: Prompt, asked: CompressionSettings = UTILITY, **wishes: Any) -> Any:
    return PromptCompressor(lm, settings=asked).compress_batch([prompt], **wishes)[0]


def length(lm: CausalLM, text: str) -> int:
    return len(tokenise(lm.tokenizer, text))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_every_family(kind: str, rate: float) -> None:
    result = assert_agrees(with_head(kind), Case(prompt=prompt_of(*DOCUMENTS), settings=UTILITY, rate=rate))
    assert QUESTION in result.text


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "sentence"},
        {"unit": "line", "order": "ranked"},
        {"order": "first_and_last"},
        {"unit": "demonstration"},
        {"unit": "token", "segment_size": 20},
        {"unit": "word", "segment_size": 20, "rank_delta": 0.9, "order": "ranked"},
        {"unit": "sentence", "rank_delta": 0.4},
        {"contrast": True},
        {"question_rate": 0.9, "instruction_rate": 0.85, "segment_size": 20},
        {"separator": ""},
    ],
)
@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_settings(options: dict[str, Any], rate: float) -> None:
    asked = replace(UTILITY, **options)
    assert_agrees(with_head(), Case(prompt=prompt_of(*DOCUMENTS), settings=asked, rate=rate))


@pytest.mark.parametrize(
    "prompt",
    [
        prompt_of(APPLES),
        prompt_of(APPLES, question=""),
        prompt_of(*DOCUMENTS, question=" \n"),
        prompt_of("", CATS, " \n", PLAIN),
        prompt_of(APPLES, APPLES, PLAIN, APPLES),
        prompt_of(APPLES, PLAIN, CATS, pinned=(1,)),
        prompt_of(APPLES, PLAIN, question="", ranked_for="How many books?"),
        prompt_of(*EXAMPLES, question="Question: 6 + 6?"),
        prompt_of("{\n  [\n]\n}\n", DATA, "one line that is quite long and has no end"),
    ],
)
@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_shapes(prompt: Prompt, rate: float) -> None:
    assert_agrees(with_head(), Case(prompt=prompt, settings=UTILITY, rate=rate))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [64, 101, 150])
def test_windows_that_overlap(kind: str, window: int) -> None:
    prompt = prompt_of(*DOCUMENTS, question="How many?")
    assert_agrees(with_head(kind, window=window), Case(prompt=prompt, settings=UTILITY, rate=0.5))


def test_protected_spans_and_other_counters() -> None:
    case = Case(prompt=prompt_of(*DOCUMENTS), settings=UTILITY, rate=0.4, keep=["slow", "260"])
    assert "260" in assert_agrees(with_head(), case).text
    assert_agrees(with_head(), Case(prompt=prompt_of(*DOCUMENTS), settings=UTILITY, rate=0.4, counter=count_bytes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("window", [40, 90, 4096])
def test_scores_of_a_batch_are_those_of_one_text_at_a_time(kind: str, window: int) -> None:
    """A thousand units of prompts of all lengths, in float32."""
    lm, draw = with_head(kind, window=window), np.random.default_rng(0)
    separator = draw.integers(3, 300, 2)
    read, expected = [], []
    for _ in range(24):
        question = draw.integers(3, 300, draw.integers(0, 12))
        pieces = [draw.integers(3, 300, size) for size in draw.integers(1, 70, draw.integers(1, 5))]
        ends = [np.unique(draw.integers(0, len(ids), 1 + len(ids) // 10)) for ids in pieces]
        windows = utility_windows(question, pieces, ends, separator, lm.window)
        read += windows
        whole = np.concatenate([part for ids in pieces for part in (separator, ids)])[2:].tolist()
        begins = np.cumsum([0, *(len(ids) + 2 for ids in pieces)])
        places = [begin + end for begin, its in zip(begins, ends, strict=False) for end in its.tolist()]
        scores = [score_of(lm, question.tolist(), whole, place) for place in places]
        expected += [scores[unit] for window in windows for unit in window.units.tolist()]
    found = SurprisalEngine(lm).score_units(read)
    assert all(scores.dtype == np.float32 for scores in found)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-4)


def test_batches_and_the_cache_change_nothing() -> None:
    prompts = [prompt_of(*DOCUMENTS), prompt_of(PLAIN, CATS, question="Who slept?"), prompt_of(*DOCUMENTS)]
    compressor = PromptCompressor(with_head(), settings=UTILITY)
    together = compressor.compress_batch(prompts, rate=0.4)
    again = compressor.compress_batch(prompts, rate=0.4)
    for prompt, one, other in zip(prompts, together, again, strict=True):
        assert_same(one, run_reference(with_head(), Case(prompt=prompt, settings=UTILITY, rate=0.4)))
        assert one.text == other.text
    assert together[2].tokens_read == 0  # the first prompt again
    assert all(result.tokens_read == 0 and result.tokens_cached > 0 for result in again)
    shorter = compressor.with_settings(replace(UTILITY, order="ranked")).compress_batch(prompts, rate=0.3)
    assert all(result.tokens_read == 0 for result in shorter)  # other lengths need no other scores


def test_scores_and_surprisals_are_not_taken_for_each_other() -> None:
    prompt, lm = prompt_of(*DOCUMENTS), with_head()
    compressor = PromptCompressor(lm, settings=UTILITY)
    for asked in (UTILITY, CompressionSettings(rank_by="question"), UTILITY):
        result = compressor.with_settings(asked).compress_batch([prompt], rate=0.4)[0]
        assert_same(result, run_reference(lm, Case(prompt=prompt, settings=asked, rate=0.4)))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_long_prompt_is_read_once(cache_bytes: int) -> None:
    lm = with_head()
    documents = [f"{text} This is number {n}." for n in range(12) for text in (APPLES, CATS, PLAIN, LOG)]
    prompt = prompt_of(*documents)
    result = compress(lm, prompt, replace(UTILITY, cache_bytes=cache_bytes), rate=0.1)
    assert result.original_tokens > 2500
    read = length(lm, question_before(QUESTION)) + sum(length(lm, text) for text in documents)
    assert result.tokens_read == 1 + read + length(lm, "\n\n") * (len(documents) - 1)
    assert result.tokens_read <= 1.05 * result.original_tokens
    assert result.tokens_cached == 0


def test_auto_is_utility_where_it_was_the_question() -> None:
    auto, lm, prompt = CompressionSettings(), with_head(), prompt_of(*DOCUMENTS)
    assert compress(lm, prompt, auto, rate=0.4).text == compress(lm, prompt, rate=0.4).text
    assert_agrees(lm, Case(prompt=prompt, settings=auto, rate=0.4))
    text = PromptCompressor(lm).compress_text("\n".join(DOCUMENTS), question=QUESTION, rate=0.4)
    assert text.tokens_read == 1 + length(lm, question_before(QUESTION)) + length(lm, "\n".join(DOCUMENTS))


@pytest.mark.parametrize(
    "prompt", [prompt_of(*EXAMPLES, question="Question: 4 + 4?"), prompt_of(*DOCUMENTS, question="")]
)
def test_auto_leaves_the_rest_as_it_was(prompt: Prompt) -> None:
    for rate in (0.3, 0.7):
        with_one, without = (
            compress(lm, prompt, CompressionSettings(), rate=rate) for lm in (with_head(), random_lm())
        )
        assert (with_one.text, with_one.tokens_read) == (without.text, without.tokens_read)


def test_a_named_ranker_is_ahead_of_the_head() -> None:
    prompt = prompt_of(*DOCUMENTS)
    by_words = CompressionSettings(rank_by="bm25")
    with_one, without = (compress(lm, prompt, by_words, rate=0.4) for lm in (with_head(), random_lm()))
    assert with_one.text == without.text


def test_auto_reads_the_end_of_a_long_question() -> None:
    lm = with_head(window=128)
    long = prompt_of(*DOCUMENTS, question="", ranked_for="We went to see the shops again. " * 40 + "How many?")
    assert len(question_ids(lm, long.ranked_for)) > 256
    assert_agrees(lm, Case(prompt=long, settings=CompressionSettings(), rate=0.5))
    assert_agrees(with_head(), Case(prompt=long, settings=CompressionSettings(), rate=0.5))
    with pytest.raises(ContextLengthError, match=r"question has \d+ tokens, which leaves less than half"):
        compress(lm, long, rate=0.5)


def test_too_little_memory_reads_fewer_prompts_at_once() -> None:
    prompts = [prompt_of(*DOCUMENTS[: 1 + n % 5], question=f"{QUESTION} {n}") for n in range(10)]

    def run(tokens: int) -> tuple[list[str], list[int]]:
        lm, sizes = with_memory_for(tokens)
        compressor = PromptCompressor(replace(lm, utility=with_head().utility), settings=UTILITY)
        return [result.text for result in compressor.compress_batch(prompts, rate=0.5)], sizes

    expected, sizes = run(1 << 20)
    texts, smaller = run(max(sizes) - 1)
    assert texts == expected
    assert len(smaller) > len(sizes)
    with pytest.raises(ModelError, match="too small to read"):
        run(50)


def test_bfloat16_scores_are_float32_and_near() -> None:
    lm = with_head()
    windows = utility_windows(np.arange(5, 9), [np.arange(10, 250)], [np.arange(9, 240, 10)], np.arange(1), 4096)
    exact = SurprisalEngine(lm).score_units(windows)[0]
    half = replace(lm, model=copy.deepcopy(lm.model).to(torch.bfloat16))
    rounded = SurprisalEngine(half).score_units(windows)[0]
    assert rounded.dtype == np.float32
    assert np.corrcoef(exact, rounded)[0, 1] > 0.98


@given(
    prompt=PROMPTS,
    rate=st.floats(0.1, 0.95),
    window=st.sampled_from([48, 4096]),
    unit=st.sampled_from(["auto", "sentence", "line", "word"]),
)
@settings(max_examples=150, deadline=None)
def test_any_text_under_any_budget(prompt: Prompt, rate: float, window: int, unit: str) -> None:
    lm = with_head(window=window)
    try:
        result = compress(lm, prompt, replace(UTILITY, unit=unit, segment_size=20), rate=rate)
    except PromptError:
        assert not any(map(str.strip, prompt.demonstrations))
    except ContextLengthError:
        assert len(question_ids(lm, prompt.asks)) > longest_question(window) or unit == "word"
    except BudgetError:  # such as a word that is longer than the budget
        return
    else:
        assert result.compressed_tokens == length(lm, result.text) <= result.budget
        pieces = [(token.part, token.index) for token in result.tokens]
        for part, index in dict.fromkeys(pieces):
            mine = "".join(token.text for token in result.tokens if (token.part, token.index) == (part, index))
            assert mine == (prompt.demonstrations[index] if part == "demonstration" else getattr(prompt, part))


def test_without_a_head() -> None:
    with pytest.raises(ConfigError, match="rank_by is utility, but 'random-llama' was not aligned for use"):
        PromptCompressor(random_lm(), settings=UTILITY)
    with pytest.raises(ConfigError, match="was not aligned for use"):
        PromptCompressor(random_lm()).with_settings(UTILITY)


def test_nothing_to_rank_and_no_question_to_contrast_with() -> None:
    with pytest.raises(PromptError, match="rank_by is utility, but the prompt has no demonstrations to rank"):
        compress(with_head(), Prompt(instruction=APPLES, question=QUESTION), rate=0.5)
    with pytest.raises(PromptError, match="contrast needs a question, but the prompt has none"):
        compress(with_head(), prompt_of(APPLES, question=""), replace(UTILITY, contrast=True), rate=0.5)
    with pytest.raises(ConfigError, match="rank_by is utility, which needs no model"):
        replace(UTILITY, ranker="minilm-l6")

"""What results hold: plain arrays of their own, that can be pickled and compared."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from fakes import random_lm

from terselm import CompressionResult, CompressionSettings, Prompt, PromptCompressor
from terselm.compress.settings import Ablations, Order, paper_settings

EXAMPLES = [
    f"Question: Sam had {n} apples and ate {n // 3}.\nAnswer: {n - n // 3} are left, 我们 👍." for n in range(20, 26)
]
PROMPT = Prompt(instruction="Answer in one number.", demonstrations=EXAMPLES, question="Question: How many pears?")


def arrays_of(result: CompressionResult) -> list[np.ndarray[Any, Any]]:
    return [value for value in vars(result.arrays).values() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        CompressionSettings(),
        paper_settings(order=Order.RANKED, segment_size=15),
        paper_settings(unit="word"),
        paper_settings(ablations=Ablations(random_tokens=True)),
    ],
)
def test_a_result_comes_back_from_a_pickle(settings: CompressionSettings, rate: float) -> None:
    compressor = PromptCompressor(random_lm(), settings=settings)
    result = compressor.compress_batch([PROMPT], rate=rate)[0]
    back = pickle.loads(pickle.dumps(result))
    assert back == result
    assert hash(back) == hash(result)
    assert back.tokens == result.tokens
    assert pickle.loads(pickle.dumps(result)) == back  # now that the decisions were made
    other = compressor.compress_batch([PROMPT], rate=0.5)[0]
    assert other != result


def test_results_that_differ_in_a_decision_alone_are_not_equal() -> None:
    result = PromptCompressor(random_lm()).compress_batch([PROMPT], rate=0.5)[0]
    other = pickle.loads(pickle.dumps(result))
    other.arrays.reasons[3] += 1
    assert other != result
    other.arrays.reasons[3] -= 1
    other.arrays.surprisals[0] = 1e9
    assert other != result
    assert result != "a text"


def test_decisions_are_kept_in_small_types() -> None:
    result = PromptCompressor(random_lm()).compress_batch([PROMPT], rate=0.5)[0]
    assert all(array.base is None for array in arrays_of(result)), "a view keeps the whole alive"
    assert sum(array.nbytes for array in arrays_of(result)) <= 16 * len(result.tokens) + 64


@pytest.mark.parametrize("count", [30, pytest.param(1_000, marks=pytest.mark.slow)])
def test_results_hold_no_more_than_their_own_arrays(count: int) -> None:
    """Of 2,500 tokens each; what was read once is in the cache, so the model has little to do."""
    compressor = PromptCompressor(random_lm(), settings=paper_settings())
    text = " ".join(EXAMPLES)
    prompt = Prompt(demonstrations=[text] * 11, question="How many?")
    first = compressor.compress_batch([prompt], rate=0.3)[0]
    assert first.original_tokens >= 2_500
    results = []
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count // 10):
            results += compressor.compress_batch([prompt] * 10, rate=0.3)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    own = sum(array.nbytes for result in results for array in arrays_of(result))
    own += sum(result.text.__sizeof__() for result in results)
    assert len(results) == count
    objects = 1_500 + 200 * len(first.arrays.pieces)  # around the arrays, and one for each piece
    assert held <= own + objects * count
    assert held < 60_000 * count

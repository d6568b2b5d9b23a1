"""Too little memory: prompts advance in smaller groups, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fakes import random_lm

from terselm import Prompt, PromptCompressor
from terselm.compress.settings import paper_settings
from terselm.errors import ModelError
from terselm.models import CausalLM

PROMPTS = [
    Prompt(
        instruction="Answer the question.",
        demonstrations=[
            f"Question: Sam had {n} apples and ate {i}. Answer: {n - i} are left." for n in range(9, 9 + i)
        ],
        question=f"Question: Ada reads {i} pages a day. How many in a week?",
    )
    for i in range(2, 9)
]


def with_memory_for(tokens: int) -> tuple[CausalLM, list[int]]:
    """A model that is out of memory beyond ``tokens`` in a pass, and the sizes of the passes that succeeded."""
    lm = random_lm()
    model = copy.deepcopy(lm.model)
    sizes: list[int] = []

    def watch(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        size = keywords["input_ids"].numel()
        if size > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(size)

    model.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    return CausalLM(model=model, tokenizer=lm.tokenizer, name=lm.name), sizes


def compress(lm: CausalLM, **settings: Any) -> list[Any]:
    compressor = PromptCompressor(lm, settings=paper_settings(segment_size=20, **settings))
    return [(r.text, r.selected) for r in compressor.compress_batch(PROMPTS, rate=0.5)]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("tokens", [60, 190, 240])
def test_groups_are_halved_until_they_fit(tokens: int, cache_bytes: int) -> None:
    plenty, all_sizes = with_memory_for(1 << 20)
    expected = compress(plenty)
    assert max(all_sizes) > tokens
    lm, sizes = with_memory_for(tokens)
    assert compress(lm, cache_bytes=cache_bytes) == expected
    assert len(sizes) > len(all_sizes)


def test_what_does_not_fit_by_itself_is_refused() -> None:
    lm, _ = with_memory_for(30)
    with pytest.raises(ModelError, match="too small to read"):
        compress(lm)


def test_rows_are_limited_by_the_memory_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty, all_sizes = with_memory_for(1 << 20)
    expected = compress(plenty)
    monkeypatch.setattr("terselm.models.memory._ELSEWHERE", 1 << 20)
    lm, sizes = with_memory_for(1 << 20)
    assert compress(lm) == expected
    assert max(sizes) <= max(all_sizes)
    assert len(sizes) > len(all_sizes)

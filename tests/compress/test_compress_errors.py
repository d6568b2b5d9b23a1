"""A user's mistake is one clear sentence, of the right class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from fakes import random_lm
from transformers import AutoConfig, AutoModelForCausalLM

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.length import Length
from terselm.errors import BudgetError, ConfigError, ContextLengthError, ModelError, PromptError, TerseLMError
from terselm.models import CausalLM

TEXT = "Sam had 12 apples and gave 5 of them away. How many apples does he have left now?"


@pytest.fixture
def compressor() -> PromptCompressor:
    return PromptCompressor(random_lm())


def fails(error: type[TerseLMError], call: Callable[[], Any]) -> str:
    """The message of the error that ``call`` raises."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert len(message) > 15
    assert "\n" not in message
    return message


def test_no_such_model(tmp_path: Any) -> None:
    folder = tmp_path / "not-there"
    message = fails(ModelError, lambda: PromptCompressor.from_pretrained(str(folder)))
    assert "not-there" in message


@pytest.mark.parametrize("wrong", [3, 3.0, True, "one"])
def test_parts_that_are_no_lists(wrong: Any) -> None:
    assert fails(PromptError, lambda: Prompt(demonstrations=wrong)).startswith("demonstrations is ")
    assert fails(PromptError, lambda: Prompt(demonstrations=["a"], pinned=wrong)).startswith(f"pinned is {wrong!r};")


def test_a_model_with_recurrent_layers() -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **sizes))
    lm = CausalLM(model=model, tokenizer=random_lm().tokenizer, name="tiny-mamba")
    message = fails(ModelError, lambda: PromptCompressor(lm))
    assert "'tiny-mamba' (Mamba2ForCausalLM) has layers other than full and sliding attention" in message


@pytest.mark.parametrize("demonstrations", [[], [""], ["", ""]])
def test_empty_prompt(compressor: PromptCompressor, demonstrations: list[str]) -> None:
    fails(PromptError, lambda: compressor.compress(demonstrations=demonstrations, rate=0.5))


def test_empty_text(compressor: PromptCompressor) -> None:
    fails(PromptError, lambda: compressor.compress_text("", rate=0.5))


@pytest.mark.parametrize("part", ["instruction", "question", "demonstrations"])
def test_text_that_is_not_unicode(compressor: PromptCompressor, part: str) -> None:
    half = "a lone surrogate: \ud83d"
    arguments: dict[str, Any] = {part: [half] if part == "demonstrations" else half}
    fails(PromptError, lambda: compressor.compress(**arguments, rate=0.5))


@pytest.mark.parametrize("pinned", [[2], [-1], [True], ["0"], "0", 0, [0.0]])
def test_pinned_demonstration_that_there_is_not(compressor: PromptCompressor, pinned: Any) -> None:
    fails(PromptError, lambda: compressor.compress(demonstrations=["one", "two"], pinned=pinned, rate=0.5))


@pytest.mark.parametrize("budget", [0, -1, -100])
def test_budget_below_one(compressor: PromptCompressor, budget: int) -> None:
    assert str(budget) in fails(BudgetError, lambda: compressor.compress_text(TEXT, budget=budget))


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.01, 20, math.nan, math.inf])
def test_rate_out_of_range(compressor: PromptCompressor, rate: float) -> None:
    assert str(rate) in fails(BudgetError, lambda: compressor.compress_text(TEXT, rate=rate))


def test_both_budget_and_rate(compressor: PromptCompressor) -> None:
    message = fails(BudgetError, lambda: compressor.compress_text(TEXT, budget=5, rate=0.5))
    assert "budget" in message
    assert "rate" in message


def test_neither_budget_nor_rate(compressor: PromptCompressor) -> None:
    message = fails(BudgetError, lambda: compressor.compress_text(TEXT))
    assert "budget" in message
    assert "rate" in message


def test_budget_below_what_is_protected(compressor: PromptCompressor) -> None:
    kept = "apples and gave 5 of them away"
    with pytest.raises(BudgetError) as caught:
        compressor.compress_text(TEXT, budget=3, keep=[kept])
    smallest = caught.value.smallest
    assert smallest is not None
    assert str(smallest) in str(caught.value)
    result = compressor.compress_text(TEXT, budget=smallest, keep=[kept])
    assert kept in result.text
    fails(BudgetError, lambda: compressor.compress_text(TEXT, budget=smallest - 1, keep=[kept]))


def test_rate_that_leaves_no_token(compressor: PromptCompressor) -> None:
    with pytest.raises(BudgetError) as caught:
        compressor.compress_text(TEXT, rate=0.001)
    assert caught.value.smallest == 1


@pytest.mark.parametrize(
    "values",
    [
        {"k": 0},
        {"k": -2.0},
        {"k": math.nan},
        {"instruction_rate": 1.5},
        {"instruction_rate": -0.1},
        {"question_rate": 1.2},
        {"question_rate": math.nan},
        {"segment_size": 0},
        {"segment_size": -5},
        {"unit": "paragraph"},
        {"anchor": -0.1},
        {"anchor_by": "first"},
    ],
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    (name,) = values
    assert name in fails(ConfigError, lambda: CompressionSettings(**values))


def test_all_mistakes_of_the_settings_are_named_at_once() -> None:
    values: dict[str, Any] = {"k": 0, "anchor": 2.0, "unit": "page", "order": "random"}
    message = fails(ConfigError, lambda: CompressionSettings(**values))
    assert [fault.split(" is ")[0] for fault in message.split("; ") if " is " in fault] == [
        "k",
        "anchor",
        "unit",
        "order",
    ]


def test_segment_wider_than_the_window() -> None:
    compressor = PromptCompressor(random_lm(window=32), settings=CompressionSettings(segment_size=100))
    message = fails(ContextLengthError, lambda: compressor.compress_text(TEXT, rate=0.9))
    assert "32" in message


def test_prompts_and_settings_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        Prompt(question="a").question = "b"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        CompressionSettings().k = 3.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Prompt("a")  # type: ignore[misc]


def test_an_empty_batch_is_empty(compressor: PromptCompressor) -> None:
    assert list(compressor.compress_batch([], rate=0.5)) == []


def test_lengths_mix_budgets_and_rates(compressor: PromptCompressor) -> None:
    prompts = [Prompt(demonstrations=[TEXT]), Prompt(question=TEXT), Prompt(demonstrations=[TEXT, TEXT])]
    lengths = [Length(budget=9), Length(rate=0.5), Length(budget=500)]
    results = compressor.compress_batch(prompts, lengths=lengths)
    assert [result.budget for result in results] == [9, int(0.5 * results[1].original_tokens), 500]
    assert all(result.compressed_tokens <= result.budget for result in results)
    fails(BudgetError, lambda: compressor.compress_batch(prompts, lengths=lengths[:2]))
    fails(BudgetError, lambda: compressor.compress_batch(prompts, lengths=lengths, rate=0.5))

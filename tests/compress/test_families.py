"""Every family of causal LM that users bring: the same tokens as the brute-force reference, alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import Case, assert_agrees
from fakes import bytes_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.models import CausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-scaled-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-window": ("phi3", {"sliding_window": 24}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt-neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.3, "attention_multiplier": 0.35}),
}
INSTRUCTION = "Answer the question. Use what the examples say, and nothing else."
DEMONSTRATIONS = [
    "Question: Sam had 5 apples and ate 2. How many?\nAnswer: 3 apples are left.",
    "Question: A car drives 60 km in an hour. How far in three hours?\nAnswer: 180 km, of course.",
    "Question: Nine birds sit on 3 trees. How many on each?\nAnswer: three birds.",
]
QUESTION = "Question: Ada reads 12 pages a day. How many in a week?"


def family_lm(name: str, *, bos: bool = True) -> CausalLM:
    kind, changes = FAMILIES[name]
    tokenizer = bytes_tokenizer(bos=bos, trim=False)
    torch.manual_seed(0)
    sizes = SIZES if kind != "gpt2" else {"initializer_range": 0.4, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**sizes, **changes})
    return CausalLM(model=AutoModelForCausalLM.from_config(config).float().eval(), tokenizer=tokenizer, name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeps_the_references_tokens(name: str) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=DEMONSTRATIONS, question=QUESTION)
    settings = CompressionSettings(segment_size=20)
    for rate in (0.3, 0.6):
        assert_agrees(family_lm(name), Case(prompt=prompt, settings=settings, rate=rate))


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_of_mixed_lengths(name: str) -> None:
    prompts = [
        Prompt(demonstrations=(DEMONSTRATIONS * 2)[:n], instruction=INSTRUCTION[: 5 * n], question=QUESTION)
        for n in range(6)
    ]
    lm = family_lm(name)
    settings = CompressionSettings(segment_size=20)
    together = PromptCompressor(lm, settings=settings).compress_batch(prompts, rate=0.4)
    for prompt, result in zip(prompts, together, strict=True):
        alone = PromptCompressor(lm, settings=settings).compress_batch([prompt], rate=0.4)[0]
        assert [token.kept for token in result.tokens] == [token.kept for token in alone.tokens]


def test_a_model_without_bos() -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=DEMONSTRATIONS, question=QUESTION)
    assert_agrees(family_lm("qwen2", bos=False), Case(prompt=prompt, settings=CompressionSettings(), rate=0.4))

"""Tiny real transformers models for tests: a bigram LM whose surprisals are known, and random ones.

The bigram LM is a Llama whose attention and MLP write nothing (their output projections are 0) and whose hidden state
is the one-hot vector of the current token. So its logits are a row of a table that the test chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from terselm.models import CausalLM

_HIDDEN = 64  # a power of 4, so that the norm's square root is exact

_LINES = (
    "The cat sat on the mat, and the dog that chased it slept under the old table.",
    "Question: Sam had 12 apples and gave 5 of them away. How many apples does he have left?",
    "Let's think step by step. He had 12, he gave 5, so 12 - 5 = 7. The answer is 7.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\r\n\tend",
    "https://example.org/a?b=1 was visited 1,234 times on 2024-05-06; see also <s> and <|im_end|>.",
    "我们今天去公园散步。天气很好。 日本語の文章を短くする。 Быстрая лиса. naïve café 👍",
)


def bigram_lm(
    words: Sequence[str], table: dict[str, dict[str, float]], *, window: int = 64, bos: bool = True
) -> CausalLM:
    """An LM over ``words`` that gives ``table[before][word]`` as the probability of ``word`` after ``before``.

    Words are split at white space, which no token covers. What a row of the table leaves over is shared evenly by the
    vocabulary's other entries. The start token is ``<s>`` with ``bos``, else the end-of-text token ``</s>``.
    """
    vocabulary = ["<unk>", "<s>", "</s>", *words]
    if len(vocabulary) > _HIDDEN:
        raise ValueError(f"at most {_HIDDEN - 3} words")
    log_probabilities = torch.zeros(_HIDDEN, _HIDDEN)  # (before, next)
    for before in range(_HIDDEN):
        row = table.get(vocabulary[before], {}) if before < len(vocabulary) else {}
        rest = (1 - sum(row.values())) / (_HIDDEN - len(row))
        for after in range(_HIDDEN):
            word = vocabulary[after] if after < len(vocabulary) else None
            log_probabilities[before, after] = math.log(row.get(word, rest) if word is not None else rest)
    config = LlamaConfig(
        vocab_size=_HIDDEN,
        hidden_size=_HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(_HIDDEN))
        model.model.norm.weight.fill_(_HIDDEN**-0.5)
        model.lm_head.weight.copy_(log_probabilities.T)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return CausalLM(model=model, tokenizer=_fast(backend, bos=bos), name="bigram")


@cache
def random_lm(kind: str = "llama", *, window: int = 4096, bos: bool = True, seed: int = 0) -> CausalLM:
    """A tiny LM with random weights, large enough that surprisals differ.

    ``kind``: ``llama`` (rotary positions, byte-level BPE), ``gpt2`` (learned positions: one beyond the window is an
    error; byte-level BPE whose offsets leave out white space) or ``gemma`` (attention in a sliding window of 16 tokens
    in every other layer; BPE with byte fallback).
    """
    build = {"llama": _llama, "gpt2": _gpt2, "gemma": _gemma}[kind]
    tokenizer = fallback_tokenizer(bos=bos) if kind == "gemma" else bytes_tokenizer(bos=bos, trim=kind == "gpt2")
    torch.manual_seed(seed)
    return CausalLM(model=build(len(tokenizer), window).float().eval(), tokenizer=tokenizer, name=f"random-{kind}")


def bytes_tokenizer(*, bos: bool, trim: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 entries; with ``trim`` its offsets leave out white space, as GPT-2's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_LINES, trainer)
    return _fast(backend, bos=bos)


def fallback_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as SentencePiece makes them: ``▁`` for a space, bytes for characters that it does not know."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", "<|im_end|>", *pieces], show_progress=False
    )
    source = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    source.normalizer = normalizers.Replace(" ", "▁")
    source.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    source.train_from_iterator([line.split("我")[0] for line in _LINES], trainer)
    return _fast(source, bos=bos)


def _fast(backend: Tokenizer, *, bos: bool) -> PreTrainedTokenizerFast:
    names = {"eos_token": "</s>", "bos_token": "<s>"} if bos else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _llama(vocabulary: int, window: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=window,
            initializer_range=0.4,
            tie_word_embeddings=False,
        )
    )


def _gpt2(vocabulary: int, window: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=window,
            initializer_range=0.4,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _gemma(vocabulary: int, window: int) -> PreTrainedModel:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            max_position_embeddings=window,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.4,
        )
    )

"""Attention by example: equal to a mask over the whole row, in models with and without a sliding window."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_training import IGNORED, example, labels, make_model, surprisals
from torch import Tensor

from terselm.train.attention import PACKED_ATTENTION, packed_attention
from terselm.train.packing import collate
from terselm.train.surprisals import give_surprisals


def masked(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, window: int | None) -> Tensor:
    """Softmax over an explicit mask, in float64."""
    example_of = (positions == 0).cumsum(-1)
    length = positions.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    allowed = (example_of[:, :, None] == example_of[:, None]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~allowed[:, None], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 50, 1000])
@pytest.mark.parametrize("lengths", [[(300, 1, 19), (320,)], [(5, 100, 15), (1, 1, 118)]])
def test_it_equals_a_mask_over_the_row(lengths: list[tuple[int, ...]], window: int | None) -> None:
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    batch, total = positions.shape
    query, key, value = (torch.randn(batch, heads, total, 8, requires_grad=True) for heads in (6, 2, 2))
    arguments = {"scaling": 0.3, "position_ids": positions, "sliding_window": window}
    ours, _ = packed_attention(None, query, key, value, None, **arguments)  # type: ignore[arg-type]
    expected = masked(query, key, value, positions, 0.3, window)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (query, key, value), upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (query, key, value), upstream.double()), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=0)


def gemma3(vocab_size: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.5,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_model, gemma3])
def test_a_model_scores_packed_rows_as_its_own_attention_does_alone(make: Any) -> None:
    lm = make(300)
    rows = [[example(20, 1), example(7, 2), example(30, 3)], [example(11, 4), example(25, 5)]]
    alone = []
    with torch.inference_mode():
        for one in itertools.chain(*rows):
            batch = collate([[one]], pad_id=0)
            logits = lm(input_ids=batch["input_ids"], use_cache=False).logits
            tokens = labels(batch)
            kept = tokens != IGNORED
            alone.append(torch.nn.functional.cross_entropy(logits[kept], tokens[kept], reduction="none"))
        give_surprisals(lm, autocast=None)
        assert lm.config._attn_implementation == PACKED_ATTENTION
        packed = surprisals(lm, collate(rows, pad_id=0))
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-5)

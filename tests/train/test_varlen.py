"""Attention through torch's varlen kernel: around a stand-in for it on the CPU, and the kernel itself on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_attention import gemma3, masked
from tiny_training import example, labels, make_model, surprisals
from torch import Tensor
from torch.nn import functional

from terselm.train import attention
from terselm.train import surprisals as module
from terselm.train.attention import (
    VARLEN_ATTENTION,
    UnsupportedAttentionError,
    attention_candidates,
    varlen_attention,
)
from terselm.train.model import add_adapter
from terselm.train.packing import collate, cu_seqlens
from terselm.train.settings import LoraSettings
from terselm.train.surprisals import give_surprisals

ROWS = [[example(20, 1), example(7, 2), example(30, 3)], [example(11, 4), example(25, 5)]]


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What the kernel is documented to do, example by example, in torch's plain operations."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(query)
    assert all(0 <= b - a <= max_q == max_k for a, b in itertools.pairwise(bounds))
    parts = []
    for start, end in itertools.pairwise(bounds):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        part = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_GROUPED", {"enable_gqa": True})
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    monkeypatch.setattr(module, "attention_candidates", lambda lm: attention_candidates(lm) and [VARLEN_ATTENTION])
    return


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("window", [None, 5, 1000])
def test_it_equals_a_mask_over_the_row(window: int | None) -> None:
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (30, 1, 19, 50)])[None]
    query, key, value = (torch.randn(1, heads, 100, 8) for heads in (6, 2, 2))
    ours, _ = varlen_attention(
        None,
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seqlens=cu_seqlens(positions),
        longest=50,
        position_ids=positions,
        sliding_window=window,
    )
    torch.testing.assert_close(ours.double(), masked(query, key, value, positions, 0.3, window), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("make", [make_model, gemma3])
def test_a_model_scores_rows_as_its_own_attention_does(make: Any) -> None:
    """In one shape or just enough."""
    lm, plain = make(300), make(300)
    give_surprisals(lm, autocast=None)
    assert lm.config._attn_implementation == VARLEN_ATTENTION
    batch, padded = collate(ROWS, pad_id=0), collate(ROWS, pad_id=0, shape=(3, 64))
    with torch.inference_mode():
        ours = surprisals(lm, batch)
        filled = surprisals(lm, padded)
        for one, (start, end) in zip([e for row in ROWS for e in row], _parts(), strict=True):
            alone = collate([[one]], pad_id=0)
            logits = plain(input_ids=alone["input_ids"]).logits
            kept = labels(alone) >= 0
            expected = functional.cross_entropy(logits[kept], labels(alone)[kept], reduction="none")
            torch.testing.assert_close(ours[start:end], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filled, ours, atol=1e-5, rtol=1e-5)


def _parts() -> list[tuple[int, int]]:
    ends = torch.tensor([int(e.counted.sum()) for row in ROWS for e in row]).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_spans_end_in_empty_examples() -> None:
    positions = collate(ROWS, pad_id=0)["position_ids"]
    spans = cu_seqlens(positions)
    assert len(spans) == 65
    assert spans.dtype == torch.int32
    assert spans[:7].tolist() == [0, 20, 27, 57, 68, 93, 114]
    assert set(spans[6:].tolist()) == {2 * 57}


@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"dropout": 0.1}, {}])
def test_what_it_does_not_know_is_refused(extra: dict[str, float]) -> None:
    """The last: float32, which the kernel has not."""
    tensor = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnsupportedAttentionError):
        varlen_attention(
            None, tensor, tensor, tensor, None, scaling=1.0, cu_seqlens=torch.tensor([0, 4]), longest=4, **extra
        )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
def test_the_kernel_equals_a_mask(window: int | None) -> None:
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (300, 1, 19, 200)])[None]
    query, key, value = (
        torch.randn(1, heads, 520, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for heads in (9, 3, 3)
    )
    ours, _ = varlen_attention(
        None,
        query,
        key,
        value,
        None,
        scaling=0.125,
        cu_seqlens=cu_seqlens(positions).cuda(),
        longest=520,
        sliding_window=window,
    )
    leaves = [t.detach().cpu().float().requires_grad_() for t in (query, key, value)]
    expected = masked(*leaves, positions, 0.125, window)
    torch.testing.assert_close(ours.cpu().double(), expected, atol=0.02, rtol=0.02)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream.cpu().double())
    for grad, wanted in zip(grads, theirs, strict=True):
        torch.testing.assert_close(grad.cpu().float(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [make_model, gemma3])
def test_on_a_gpu_rows_equal_the_cpu(make: Any, compiled: bool) -> None:
    """Values and gradients of the adapter, in bfloat16 against float32."""
    from terselm.train.hardware import apply_engine
    from terselm.train.settings import EngineSettings

    found = []
    for device in ("cpu", "cuda"):
        lm = make(300).to(device)
        half = device == "cuda"
        lm = lm.to(torch.bfloat16) if half else lm
        give_surprisals(lm, autocast=torch.bfloat16 if half else None)
        assert not half or lm.config._attn_implementation == VARLEN_ATTENTION
        torch.manual_seed(0)
        model = add_adapter(lm, LoraSettings(rank=4))
        apply_engine(lm, EngineSettings(compile=compiled and half))
        batch = {name: tensor.to(device) for name, tensor in collate(ROWS, pad_id=0, shape=(2, 64)).items()}
        values = surprisals(model, batch)
        values.mean().backward()
        grads = [p.grad.cpu() for name, p in model.named_parameters() if "lora_B" in name]
        found.append((values.detach().cpu(), torch.cat([g.flatten() for g in grads])))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.1, rtol=0.05)
    assert functional.cosine_similarity(found[1][1], found[0][1], dim=0) > 0.98

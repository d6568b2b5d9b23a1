"""Attention for packed rows: each example sees only itself, where transformers would mask the whole row.

On a CPU the example's square is all that is computed, and short squares go through plain matrix products, whose
backward pass is several times faster than that of torch's fused kernel there. Measured with SmolLM2-135M on one core,
rows of 1,024 tokens, examples of 128: 270 tokens/s with the mask, 400 tokens/s so. On a GPU torch's varlen kernel never
looks across the border of an example.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before 2.10
    varlen_attn = None  # type: ignore[assignment]

PACKED_ATTENTION = "terselm_packed"
VARLEN_ATTENTION = "terselm_varlen"

# Read here, since code that is compiled cannot ask for it.
_TAKES = set() if varlen_attn is None else inspect.signature(varlen_attn).parameters.keys()
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _TAKES else {}

_SHORT = 256  # tokens; the probabilities of longer examples would take too much memory until the backward pass
_HALF = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256  # of the varlen kernel
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models add to attention, and ours does not


class UnsupportedAttentionError(Exception):
    """The model's attention does more than ours."""


def attention_candidates(lm: Any) -> list[str]:
    """Attention implementations of a transformers model, the fastest first; the last is the model's own."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
    its_own = lm.config._attn_implementation
    match lm.device.type:
        case "cpu":
            return [PACKED_ATTENTION, its_own]
        case "cuda" if {"scale", "window_size"} <= _TAKES:  # torch 2.10 has the kernel, but neither of them
            return [VARLEN_ATTENTION, its_own]
    return [its_own]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    position_ids: Tensor,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example; an example starts where its position is 0. The signature is transformers'.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H / groups, T, D)``.
        value: likewise.
        position_ids: ``(B, T)``.

    Returns:
        ``(B, T, H, D)``, and no weights.

    Raises:
        UnsupportedAttentionError: the model wants something else besides.
    """
    if additions := [name for name in _UNKNOWN if other.get(name) is not None]:
        raise UnsupportedAttentionError(", ".join(additions))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = []
    for row, positions in enumerate(position_ids.expand(len(query), -1)):
        starts = torch.cat([(positions == 0).nonzero().flatten(), positions.new_tensor([len(positions)])])
        lengths = starts.diff().tolist()
        parts = zip(*(torch.split(tensor[row], lengths, dim=1) for tensor in (query, key, value)), strict=True)
        rows.append(torch.cat([_attend(q, k, v, scaling, dropout, sliding_window) for q, k, v in parts], dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous(), None


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seqlens: Tensor,
    longest: int,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of one long row. The signature is transformers'.

    Args:
        query: ``(1, H, T, D)``.
        key: ``(1, H / groups, T, D)``.
        value: likewise.
        cu_seqlens: ``(E + 1,)`` int32, where each example starts, then T; may end in empty examples.
        longest: tokens that no example exceeds; a constant, since each value compiles anew.

    Returns:
        ``(1, T, H, D)``, and no weights.

    Raises:
        UnsupportedAttentionError: the model wants something else besides.
    """
    additions = [name for name in _UNKNOWN if other.get(name) is not None]
    if additions or dropout or query.dtype not in _HALF or query.shape[-1] > _WIDEST_HEAD:
        raise UnsupportedAttentionError(", ".join(additions) or f"{query.dtype}, heads of {query.shape[-1]}")
    window = (-1, 0) if sliding_window is None or sliding_window >= longest else (sliding_window - 1, 0)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window, **_GROUPED)
    assert isinstance(out, Tensor)
    return out[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None) -> Tensor:
    """``(H, n, D)`` each."""
    length = q.shape[1]
    banded = window is not None and length > window
    if length > _SHORT and not banded:
        return functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling, dropout_p=dropout
        )[0]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)  # (n, n)
    if banded:
        hidden |= torch.ones(length, length, dtype=torch.bool).tril(-int(window or 0))
    scores = (q @ k.transpose(1, 2) * scaling).masked_fill(hidden, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return functional.dropout(probabilities, dropout) @ v

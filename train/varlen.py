"""Attention for packed rows on a GPU: torch's varlen kernel, which never looks across the border of an example."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before 2.10
    varlen_attn = None  # type: ignore[assignment]

VARLEN_ATTENTION = "terselm_varlen"

# Read here, since code that is compiled cannot ask for it.
_TAKES = set() if varlen_attn is None else inspect.signature(varlen_attn).parameters.keys()
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _TAKES else {}

_HALF = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256  # of the kernel
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models add to attention, and the kernel does not


class UnsupportedAttentionError(Exception):
    """The model's attention does more than ours."""


def register() -> None:
    """Make ``set_attn_implementation(VARLEN_ATTENTION)`` work."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)


def is_available() -> bool:
    """Whether this torch has the kernel with a scale and a window; 2.10 has neither."""
    return {"scale", "window_size"} <= _TAKES


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
    asked = [name for name in _UNKNOWN if other.get(name) is not None]
    if asked or dropout or query.dtype not in _HALF or query.shape[-1] > _WIDEST_HEAD:
        raise UnsupportedAttentionError(", ".join(asked) or f"{query.dtype}, heads of {query.shape[-1]}")
    window = (-1, 0) if sliding_window is None or sliding_window >= longest else (sliding_window - 1, 0)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window, **_GROUPED)
    assert isinstance(out, Tensor)
    return out[None], None

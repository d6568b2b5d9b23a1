"""−log p from logits in one pass over them, where PyTorch's operations make seven. Needs Triton, so a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for GPUs
    triton = None

_BLOCK = 4096


def fused_nll() -> Callable[[Tensor, Tensor], Tensor] | None:
    """`nll_from_logits`, where it can run."""
    return nll_from_logits if triton is not None else None


def nll_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of ``targets`` ``(N,)`` under ``logits`` ``(N, V)`` of any float type: ``(N,)`` float32, nats."""
    out = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    if len(targets):
        _nll[(len(targets),)](logits, targets, out, logits.stride(0), logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _nll(logits, targets, out, stride, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program a row: log-sum-exp with a running maximum, in float32."""
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * stride
        highest = -float("inf")
        total = 0.0
        for begin in range(0, vocabulary, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            values = tl.load(start + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(values, axis=0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), axis=0)
            highest = higher
        wanted = tl.load(start + tl.load(targets + row)).to(tl.float32)
        tl.store(out + row, highest + tl.log(total) - wanted)

"""Surprisals and their slopes from logits: one Triton pass where it can run, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for GPUs
    triton = None

_BLOCK = 4096


def nll_and_slopes(logits: Tensor, wanted: Tensor, cap: float | None, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """−log p of the wanted tokens, and its derivative by each logit.

    Args:
        logits: ``(n, V)`` before the soft cap; may be overwritten.
        wanted: ``(n,)`` int64.
        cap: the model shows ``cap · tanh(logits / cap)``; None for none.
        slopes: whether the derivative is wanted.

    Returns:
        ``(n,)`` float32 nats; ``(n, V)`` in the logits' number format, or None.
    """
    if triton is not None and logits.is_cuda and cap is None:
        return _fused(logits, wanted, slopes)
    shown = logits.float() if cap is None else torch.tanh(logits.float() / cap) * cap
    nats = shown.logsumexp(-1) - shown.gather(1, wanted[:, None])[:, 0]
    if not slopes:
        return nats, None
    found = shown.softmax(-1)
    found.scatter_add_(1, wanted[:, None], found.new_full((len(wanted), 1), -1.0))
    if cap is not None:
        found *= 1 - (shown / cap) ** 2
    return nats, found.to(logits.dtype)


def _fused(logits: Tensor, wanted: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    nats = torch.empty(len(wanted), dtype=torch.float32, device=logits.device)
    if len(wanted):
        _nll_and_slopes[(len(wanted),)](
            logits, wanted, nats, logits.stride(0), logits.shape[1], SLOPES=slopes, BLOCK=_BLOCK, num_warps=8
        )
    return nats, logits if slopes else None


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _nll_and_slopes(logits, wanted, nats, stride, vocabulary, SLOPES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program a row: log-sum-exp with a running maximum, in float32, then p − [v = wanted] in place."""
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * stride
        target = tl.load(wanted + row)
        highest = -float("inf")
        total = 0.0
        for begin in range(0, vocabulary, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            values = tl.load(start + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(values, axis=0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), axis=0)
            highest = higher
        log_total = highest + tl.log(total)
        tl.store(nats + row, log_total - tl.load(start + target).to(tl.float32))
        if SLOPES:
            tl.debug_barrier()  # the wanted logit has been read by all before it is overwritten
            for begin in range(0, vocabulary, BLOCK):
                place = begin + tl.arange(0, BLOCK)
                inside = place < vocabulary
                values = tl.load(start + place, mask=inside, other=-float("inf")).to(tl.float32)
                slope = tl.exp(values - log_total) - tl.where(place == target, 1.0, 0.0)
                tl.store(start + place, slope.to(logits.dtype.element_ty), mask=inside)

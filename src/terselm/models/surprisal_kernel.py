"""Surprisals, and their slopes, from logits: one Triton pass where it can run; elsewhere a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for GPUs
    triton = None

_BLOCK = 4096
_IN_CACHE = 1 << 19  # float32 numbers


def nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """−log p of ``wanted`` ``(n,)`` under ``logits`` ``(n, V)`` of any float type: ``(n,)`` float32, nats.

    The Triton pass reads the logits once, where PyTorch's operations go over them seven times.
    """
    if triton is not None and logits.is_cuda:
        return _fused(logits, wanted, slopes=False)
    return _in_cache(logits, wanted, None, slopes=False)


def nll_and_slopes(logits: Tensor, wanted: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """−log p of the wanted tokens, and its derivative by each logit.

    Args:
        logits: ``(n, V)`` before the soft cap; may be overwritten.
        wanted: ``(n,)`` int64.
        cap: the model shows ``cap · tanh(logits / cap)``; None for none.

    Returns:
        ``(n,)`` float32 nats; ``(n, V)`` in the logits' number format.
    """
    if triton is not None and logits.is_cuda and cap is None:
        return _fused(logits, wanted, slopes=True), logits
    return _in_cache(logits, wanted, cap, slopes=True), logits


def _in_cache(logits: Tensor, wanted: Tensor, cap: float | None, *, slopes: bool) -> Tensor:
    """In one buffer for a few rows, where PyTorch's operations on all rows wait for memory.

    With ``slopes`` they take the logits' place.
    """
    count, vocabulary = logits.shape
    size = max(1, _IN_CACHE // vocabulary) if logits.device.type == "cpu" else max(1, count)
    room = torch.empty(min(size, count), vocabulary, dtype=torch.float32, device=logits.device)
    nats = torch.empty(count, dtype=torch.float32, device=logits.device)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        some, places = logits[rows], wanted[rows, None]
        values = room[: len(some)].copy_(some)
        bend = None  # the cap's slope
        if cap is not None:
            bend = 1 - values.div_(cap).tanh_().square()
            values.mul_(cap)
        its_own = values.gather(1, places)
        highest = values.amax(1, keepdim=True)
        total = values.sub_(highest).exp_().sum(1, keepdim=True)
        nats[rows] = (total.log() + highest - its_own)[:, 0]
        if slopes:
            values.div_(total).scatter_add_(1, places, values.new_full((len(some), 1), -1.0))
            some.copy_(values if bend is None else values.mul_(bend))
    return nats


def _fused(logits: Tensor, wanted: Tensor, *, slopes: bool) -> Tensor:
    """With ``slopes`` they take the logits' place."""
    nats = torch.empty(len(wanted), dtype=torch.float32, device=logits.device)
    if len(wanted):
        _nll_and_slopes[(len(wanted),)](
            logits, wanted, nats, logits.stride(0), logits.shape[1], SLOPES=slopes, BLOCK=_BLOCK, num_warps=8
        )
    return nats


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

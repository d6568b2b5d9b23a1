"""Collect the trained weights from all processes that hold parts of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from terselm.errors import CheckpointError


@torch.no_grad()
def gather_trained(model: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The trained weights, whole, on the CPU; every process has to call it.

    One weight at a time, so that no process needs memory for more: DDP holds them whole, FSDP2 as DTensors, ZeRO-3 as
    empty tensors that DeepSpeed fills for a moment.

    Args:
        model: with what was trained.
        keep: whether this process is to have them; the others get nothing, for which they need no memory.

    Raises:
        CheckpointError: a weight stayed empty.
    """
    found = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        with _whole(weight) as whole:
            if keep:
                found[name] = whole.detach().to("cpu", copy=True)
    if empty := [name for name, weight in found.items() if not weight.numel()]:
        raise CheckpointError(f"{len(empty)} trained weights came back empty, such as {empty[0]}; nothing was written")
    return found


def _whole(weight: Any) -> Any:
    """A context that gives the weight with all its parts."""
    if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3
        import deepspeed

        return _Gathered(weight, deepspeed.zero.GatheredParameters([weight]))
    return nullcontext(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)


class _Gathered:
    """DeepSpeed's context, which gives nothing, as one that gives the weight."""

    def __init__(self, weight: Tensor, context: Any) -> None:
        self._weight = weight
        self._context = context

    def __enter__(self) -> Tensor:
        self._context.__enter__()
        return self._weight

    def __exit__(self, *raised: Any) -> None:
        self._context.__exit__(*raised)

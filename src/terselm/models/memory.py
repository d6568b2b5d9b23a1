"""How much memory a model's passes may take, and what to do where it turns out to be too little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from terselm.errors import ModelError

if TYPE_CHECKING:
    from terselm.models.load import CausalLM

_ELSEWHERE = 2 << 30  # bytes: what is taken for free on devices that do not say

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def free_bytes(device: torch.device) -> int:
    """What new tensors could take: of a GPU what is free and what torch holds without using it, elsewhere 2 GiB."""
    if device.type != "cuda":
        return _ELSEWHERE
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def kv_bytes(model_or_config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, over all layers.

    Args:
        model_or_config: of transformers.
        dtype: of the activations.
    """
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


def in_halves(
    read: Callable[[Sequence[Item]], list[Answer]],
    items: Sequence[Item],
    too_large: Callable[[Item], Exception],
    give_back: Callable[[], None] = torch.cuda.empty_cache,
) -> list[Answer]:
    """``read(items)``; where the memory is too small for all, half of them, then the other half.

    Args:
        too_large: what to raise where it is too small for one.
        give_back: called after the memory was exhausted.
    """
    try:
        return read(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise too_large(items[0]) from None
    give_back()  # here, where the exception no longer holds the frames
    half = len(items) // 2
    return [item for part in (items[:half], items[half:]) for item in in_halves(read, part, too_large, give_back)]


def text_too_large(lm: CausalLM, tokens: int) -> ModelError:
    """The error of a text that does not fit into memory even by itself."""
    return ModelError(
        f"the memory of {lm.model.device} is too small to read {tokens} tokens with {lm.name!r}; choose a smaller "
        "model, another device, or a dtype of fewer bits"
    )

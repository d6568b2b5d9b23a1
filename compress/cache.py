"""Keys and values of many growing prefixes, in one pair of buffers a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

_GRAIN = 256


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows share slots: token t of a pass is written into slot ``used + t`` of every row.

    What a slot means to a row (a position, or nothing) is the caller's to know and to say in the attention mask.
    Every layer keeps all slots, also where the model attends to a sliding window; the mask limits what is seen.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.used = 0
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``(B, H, S, D)`` keys and values behind the used slots; return all ``(B, H, used + S, D)``."""
        end = self.used + key_states.shape[2]
        if layer_idx == len(self._buffers):
            self._buffers.append((_grown(None, key_states, end), _grown(None, value_states, end)))
        keys, values = self._buffers[layer_idx]
        if keys.shape[2] < end:
            keys, values = _grown(keys, key_states, end), _grown(values, value_states, end)
            self._buffers[layer_idx] = keys, values
        keys[:, :, self.used : end] = key_states
        values[:, :, self.used : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        if self._buffers:
            index = torch.tensor(rows, device=self._buffers[0][0].device)
            self._buffers = [(keys[index], values[index]) for keys, values in self._buffers]


def _grown(old: torch.Tensor | None, like: torch.Tensor, slots: int) -> torch.Tensor:
    """A buffer of at least ``slots`` slots that begins with ``old``; a quarter more than needed, to grow seldom."""
    slots = -(-(slots + slots // 4) // _GRAIN) * _GRAIN
    new = like.new_zeros(*like.shape[:2], slots, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new

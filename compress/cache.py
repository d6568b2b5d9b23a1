"""Keys and values of many growing prefixes, in one pair of buffers a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from terselm.compress.forward import Forward
from terselm.compress.units import Ints
from terselm.models.reading import grain

_GRAIN = 256
_PASSES_BETWEEN_TRIMS = 16


class Memory(Protocol):
    """What a session's prompts have read so far. All rows share slots: see `SlotCache`."""

    used: int

    def read(self, ids: Ints, positions: Ints, slots: Ints) -> Tensor:
        """Last hidden states of new tokens, which enter the slots after the used ones.

        Args:
            ids, positions: ``(B, S)``; position −1 is padding.
            slots: ``(B, used + S)``, the position that each slot holds for each row, −1 for none.

        Returns:
            ``(B, S, H)``.
        """

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def clear(self) -> None:
        """Forget everything."""


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows share slots: token t of a pass is written into slot ``used + t`` of every row.

    What a slot means to a row (a position, or nothing) is the caller's to know and to say in the attention mask.
    Every layer keeps all slots, also where the model attends to a sliding window; the mask limits what is seen.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.used = 0
        self.shown = 0  # slots that the next pass attends to, or masks: at least the used ones and its own
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(B, H, S, D)`` keys and values behind the used slots; return ``(B, H, shown, D)``."""
        end = self.used + key_states.shape[2]
        if layer_idx == len(self._buffers):
            self._buffers.append((_grown(None, key_states, self.shown), _grown(None, value_states, self.shown)))
        keys, values = self._buffers[layer_idx]
        if keys.shape[2] < self.shown:
            keys, values = _grown(keys, key_states, self.shown), _grown(values, value_states, self.shown)
            self._buffers[layer_idx] = keys, values
        keys[:, :, self.used : end] = key_states
        values[:, :, self.used : end] = value_states
        return keys[:, :, : self.shown], values[:, :, : self.shown]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def select(self, rows: Sequence[int]) -> None:
        if self._buffers:
            index = torch.tensor(rows, device=self._buffers[0][0].device)
            self._buffers = [(keys[index], values[index]) for keys, values in self._buffers]


class EagerMemory:
    """`Memory` in buffers that grow, read with ordinary calls of the model."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._cache = SlotCache()
        self._passes = 0

    @property
    def used(self) -> int:
        return self._cache.used

    @used.setter
    def used(self, slots: int) -> None:
        self._cache.used = slots

    def read(self, ids: Ints, positions: Ints, slots: Ints) -> Tensor:
        device = self._forward.device
        length = ids.shape[1]
        if device.type == "cpu":
            self._passes += 1
            if self._passes % _PASSES_BETWEEN_TRIMS == 0:
                _trim()
            excess = -length % grain(length)
            total = self.used + length + excess
            ids = np.pad(ids, ((0, 0), (0, excess)))
            positions = np.pad(positions, ((0, 0), (0, excess)), constant_values=-1)
            slots = np.pad(slots, ((0, 0), (0, excess + -total % grain(total))), constant_values=-1)
        self._cache.shown = slots.shape[1]
        new = torch.arange(self.used, self.used + ids.shape[1], device=device)
        tokens, places, held = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (ids, positions, slots)
        )
        return self._forward.extend(tokens, places, held, new, self._cache)[:, :length]

    def select(self, rows: Sequence[int]) -> None:
        self._cache.select(rows)

    def clear(self) -> None:
        self._cache = SlotCache()


def _trim() -> None:
    """Have the C library return what is free: as a prefix grows, each pass needs larger pieces than were freed."""
    with suppress(OSError, AttributeError):  # other systems than Linux with glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _grown(old: Tensor | None, like: Tensor, slots: int) -> Tensor:
    """A buffer of at least ``slots`` slots that begins with ``old``; a quarter more than needed, to grow seldom."""
    slots = -(-(slots + slots // 4) // _GRAIN) * _GRAIN
    new = like.new_zeros(*like.shape[:2], slots, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new

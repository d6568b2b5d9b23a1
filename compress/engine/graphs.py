"""CUDA graphs: a small model's pass is a thousand kernels of a few microseconds, and launching them takes longer.

A pass is recorded once for each of a few shapes, to which inputs are padded, and replayed from then on. Recording takes
about a tenth of a second a shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from terselm.compress.engine.surprisal import Forward
    from terselm.statistics import Ints

logger = logging.getLogger(__name__)

_MOST_WORK = 8e12  # floating-point operations of a pass: larger ones keep the GPU busy without graphs
_LONGEST = 512  # tokens of a row
_MOST_TOKENS = 1 << 12  # of a pass: padding up to here costs less than recording another shape
_STEP = 64  # tokens
_SLOTS = 256  # the smallest cache; sizes double
_MOST_GRAPHS = 96


class StaticCache(Cache):  # type: ignore[misc]
    """Buffers of a fixed number of slots, written wherever `new` says, as a recorded pass needs them."""

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.new: Tensor | None = None  # (S,), the slots that a pass writes
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.buffers):
            shape = (*key_states.shape[:2], self.slots, key_states.shape[3])
            self.buffers.append(
                (key_states.new_zeros(shape), value_states.new_zeros(*shape[:3], value_states.shape[3]))
            )
        assert self.new is not None
        keys, values = self.buffers[layer_idx]
        keys.index_copy_(2, self.new, key_states)
        values.index_copy_(2, self.new, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, *arrays: Ints) -> Tensor:
        for tensor, array in zip(self.inputs, arrays, strict=True):
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)), non_blocking=True)
        self.graph.replay()
        return self.output


class GraphPool:
    """Recorded passes of one model, and the caches that they write."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._most_tokens = min(_MOST_TOKENS, int(_MOST_WORK / (2 * forward.parameters)))
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._fails = False

    def clear(self) -> None:
        """Give back the memory of all recorded passes and caches."""
        self._graphs.clear()
        self._caches.clear()

    def takes(self, rows: int, length: int) -> bool:
        """Whether a pass of this shape is worth recording."""
        return not self._fails and length <= _LONGEST and rows * length <= self._most_tokens

    def texts(self, ids: Ints) -> Tensor | None:
        """`Forward.texts` by replay; None for a shape that is better run as it is."""
        shape = (_rows(len(ids)), _round_up(ids.shape[1], _STEP))
        if not self.takes(*shape):
            return None
        states = self._replay(shape, self._forward.texts, _padded(ids, shape, 0))
        return states[: len(ids), : ids.shape[1]] if states is not None else None

    def memory(self, rows: int, length: int) -> GraphMemory | None:
        """Static buffers for ``rows`` prompts; None where passes of this shape are better run as they are."""
        return GraphMemory(self._forward, self, rows) if self.takes(rows, length) else None

    def cache(self, rows: int, slots: int) -> StaticCache:
        return self._caches.setdefault((rows, slots), StaticCache(slots))

    def extend(self, ids: Ints, positions: Ints, slots: Ints, new: Ints, cache: StaticCache) -> Tensor | None:
        """`Forward.extend` by replay, of arrays that have one of the recorded shapes; None as for `texts`."""

        def run(ids: Tensor, positions: Tensor, slots: Tensor, new: Tensor) -> Tensor:
            cache.new = new
            return self._forward.extend(ids, positions, slots, new, cache)

        if not self.takes(*ids.shape):
            return None
        return self._replay((*ids.shape, cache.slots), run, ids, positions, slots, new)

    def _replay(self, key: tuple[int, ...], run: Callable[..., Tensor], *arrays: Ints) -> Tensor | None:
        if (recorded := self._graphs.get(key)) is not None:
            return recorded.replay(*arrays)
        if len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        # Real inputs: the passes before the recording write into the cache that a session is using.
        inputs = tuple(torch.from_numpy(array).to(self._forward.device) for array in arrays)
        try:
            self._graphs[key] = self._record(run, inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            logger.warning("this model's passes cannot be recorded as CUDA graphs (%s); going on without", error)
            self._fails = True
            return None
        return self._graphs[key].replay(*arrays)

    def _record(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # lets libraries set themselves up, which must not be recorded
                run(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, pool=self._pool):
            output = run(*inputs)
        return _Recorded(graph=graph, inputs=inputs, output=output)


class GraphMemory:
    """`Memory` in static buffers, read by replaying recorded passes."""

    def __init__(self, forward: Forward, pool: GraphPool, rows: int) -> None:
        self._forward = forward
        self._pool = pool
        self._rows = _rows(rows)
        self._cache = pool.cache(self._rows, _SLOTS)
        self._used = 0

    def read(self, ids: Ints, positions: Ints, slots: Ints, keep: int) -> Tensor:
        rows, length = ids.shape
        padded = _round_up(length, _STEP)
        if self._used + padded > self._cache.slots:
            self._move(self._rows, range(self._rows), self._used + padded)
        shape = (self._rows, padded)
        held = _padded(slots, (self._rows, self._cache.slots), -1)
        new = np.arange(self._used, self._used + padded)
        arrays = _padded(ids, shape, 0), _padded(positions, shape, -1), held, new
        states = self._pool.extend(*arrays, self._cache)
        if states is None:
            device = self._forward.device
            tokens, places, holds, self._cache.new = (torch.from_numpy(array).to(device) for array in arrays)
            states = self._forward.extend(tokens, places, holds, self._cache.new, self._cache)
        self._used += keep
        return states[:rows, :length]

    def select(self, rows: Sequence[int]) -> None:
        self._move(_rows(len(rows)), rows, self._cache.slots)

    def clear(self) -> None:
        self._used = 0

    def _move(self, rows: int, which: Sequence[int], slots: int) -> None:
        """Take what was read over into the cache for ``rows`` rows and at least ``slots`` slots."""
        size = _SLOTS
        while size < slots:
            size *= 2
        old, self._cache, self._rows = self._cache, self._pool.cache(rows, size), rows
        if not old.buffers or not self._used:
            return
        index = torch.tensor(list(which)[:rows], device=old.buffers[0][0].device)
        for layer, (keys, values) in enumerate(old.buffers):
            kept_keys, kept_values = keys[index, :, : self._used], values[index, :, : self._used]
            if layer == len(self._cache.buffers):
                shape = (rows, keys.shape[1], size)
                self._cache.buffers.append(
                    (keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3]))
                )
            for buffer, kept in zip(self._cache.buffers[layer], (kept_keys, kept_values), strict=True):
                buffer[: len(index), :, : self._used] = kept


def _rows(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padded(array: Ints, shape: tuple[int, ...], value: int) -> Ints:
    padded = np.full(shape, value, dtype=np.int64)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded

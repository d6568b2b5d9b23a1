"""Put examples into rows of equal capacity, so that hardly a token is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from terselm.train.examples import Example

IGNORED = -100  # label of a position whose next token is not counted

Row = Sequence[Example]


def pack(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """The examples of each row, as `pack_lengths` puts them."""
    return [[examples[place] for place in row] for row in pack_lengths(list(map(len, examples)), capacity)]


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row where it leaves the least room.

    Args:
        lengths: none above ``capacity``.
        capacity: tokens in a row.

    Returns:
        The places of the lengths by row.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, MIT 1973: at most 11/9 of the fewest rows, plus 4.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct rooms that are left, ascending
    rows_with: defaultdict[int, deque[int]] = defaultdict(deque)
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[place]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].popleft()
            if not rows_with[room]:
                del rooms[at]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(place)
        room -= length
        if not rows_with[room]:
            insort(rooms, room)
        rows_with[room].append(row)
    return rows


def collate(rows: Sequence[Row], pad_id: int, shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """One batch of packed rows.

    Positions restart at 0 with each example and with the padding, which is how transformers tells that they must not
    attend to each other.

    Args:
        rows: what is packed.
        pad_id: token id of the padding.
        shape: ``(B, T)`` to fill up to, for code that is compiled for one shape; by default just enough.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``: ``(B, T)`` int64; the label of a position is the token after it in
        its example if that is counted, else `IGNORED`. ``tokens``: ``(B,)`` int64, those that are not padding.
    """
    lengths = [sum(len(example) for example in row) for row in rows]
    height, width = shape or (len(rows), max(lengths))
    lengths += [0] * (height - len(rows))
    ids = np.full((height, width), pad_id, dtype=np.int64)
    positions = np.zeros((height, width), dtype=np.int64)
    labels = np.full((height, width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[index, start:end] = example.ids
            positions[index, start:end] = np.arange(len(example))
            labels[index, start : end - 1] = np.where(example.counted[1:], example.ids[1:], IGNORED)
            start = end
    for index, length in enumerate(lengths):
        positions[index, length:] = np.arange(width - length)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "tokens": np.asarray(lengths)}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def cu_seqlens(position_ids: Tensor) -> Tensor:
    """Where each example of the flattened ``(B, T)`` positions starts, then B · T, as `varlen_attention` takes it.

    Filled up with empty examples to a power of two, so that code is compiled for few lengths.

    Returns:
        ``(E + 1,)`` int32.
    """
    flat = position_ids.flatten().numpy()
    starts = np.flatnonzero(flat == 0)
    size = 1 << max(6, len(starts).bit_length())
    found = np.full(size + 1, len(flat), dtype=np.int32)
    found[: len(starts)] = starts
    return torch.from_numpy(found)

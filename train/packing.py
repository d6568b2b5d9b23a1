"""From examples to rows of equal capacity, of which hardly a token is padding, and to what the model reads of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.examples import Example

_FULL = 0.99  # of a row
MODEL_INPUTS = ("input_ids", "position_ids", "at", "wanted", "cu_seqlens", "unit_ends")

Row = Sequence[Example]


def pack_examples(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """The examples of each row, as `pack_lengths` puts them."""
    return [[examples[place] for place in row] for row in pack_lengths(list(map(len, examples)), capacity)]


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing; where that leaves more than 1% of the rows empty, fewer rows if `fill_in_pairs` finds them.

    Args:
        lengths: none above ``capacity``.
        capacity: tokens in a row.

    Returns:
        The places of the lengths by row.
    """
    rows = best_fit(lengths, capacity)
    if sum(lengths) >= _FULL * capacity * len(rows):
        return rows
    return min(rows, fill_in_pairs(lengths, capacity), key=len)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The longest first, each into the row where it leaves the least room.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, MIT 1973: at most 11/9 of the fewest rows, plus 4.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct rooms that are left, ascending
    rows_with: defaultdict[int, deque[int]] = defaultdict(deque)
    for place in _longest_first(lengths):
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


def fill_in_pairs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row by row, the longest first, until one or two more fill it to the last token, or nothing fits.

    For lengths so much alike that best fit leaves the same gap in every row; ten times slower.
    """
    left = np.bincount(np.asarray(lengths, dtype=np.int64), minlength=capacity + 1)
    places: defaultdict[int, deque[int]] = defaultdict(deque)
    for place in _longest_first(lengths):
        places[lengths[place]].append(place)
    rows: list[list[int]] = []
    while left.any():
        row: list[int] = []
        room = capacity
        while chosen := _next_lengths(left, room, first=not row):
            for length in chosen:
                left[length] -= 1
                row.append(places[length].popleft())
                room -= length
        rows.append(row)
    return rows


def collate(
    rows: Sequence[Row],
    read: Sequence[NDArray[np.bool_]] | None = None,
    *,
    pad_id: int = 0,
    shape: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """One batch of packed rows, and the tokens whose surprisal is asked for.

    Positions restart at 0 with each example and with the padding, which is how transformers tells that they must not
    attend to each other.

    Args:
        rows: what is packed.
        read: by example, in the order of the rows: ``(n,)`` which of its tokens are asked for, never the first; by
            default those that are counted.
        pad_id: token id of the padding.
        shape: ``(B, T)`` to fill up to, for code that is compiled for one shape; by default just enough.

    Returns:
        ``input_ids``, ``position_ids``: ``(B, T)`` int64. ``cu_seqlens``: as `cu_seqlens` makes it. ``at``: ``(n,)``
        int64, the place before each token that is asked for, in the flattened rows. ``wanted``: ``(n,)`` int64, those
        tokens. ``unit_ends``: ``(U,)`` int64, the place of the last token of each labelled unit.
    """
    examples = [example for row in rows for example in row]
    masks = iter([example.counted for example in examples] if read is None else read)
    lengths = [sum(len(example) for example in row) for row in rows]
    height, width = shape or (len(rows), max(lengths))
    ids = np.full((height, width), pad_id, dtype=np.int64)
    positions = np.zeros((height, width), dtype=np.int64)
    at, wanted, unit_ends = [], [], [np.zeros(0, dtype=np.int64)]
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[index, start:end] = example.ids
            positions[index, start:end] = np.arange(len(example))
            mask = next(masks)
            at.append(np.flatnonzero(mask) + index * width + start - 1)
            wanted.append(example.ids[mask])
            if example.labels is not None:
                unit_ends.append(example.labels.ends.astype(np.int64) + index * width + start)
            start = end
    for index, length in enumerate(lengths + [0] * (height - len(rows))):
        positions[index, length:] = np.arange(width - length)
    batch = {name: torch.from_numpy(array) for name, array in (("input_ids", ids), ("position_ids", positions))}
    batch["cu_seqlens"] = cu_seqlens(batch["position_ids"])
    batch["unit_ends"] = torch.from_numpy(np.concatenate(unit_ends))
    return batch | {"at": torch.from_numpy(np.concatenate(at)), "wanted": torch.from_numpy(np.concatenate(wanted))}


def cu_seqlens(position_ids: Tensor) -> Tensor:
    """Where each example of the flattened ``(B, T)`` positions starts, then B · T, as `varlen_attention` takes it.

    Filled up with empty examples to a power of two, so that code is compiled for few lengths.

    Returns:
        ``(E + 1,)`` int32.
    """
    flat = position_ids.flatten().numpy()
    starts = np.flatnonzero(flat == 0)
    size = 1 << max(6, len(starts).bit_length())
    borders = np.full(size + 1, len(flat), dtype=np.int32)
    borders[: len(starts)] = starts
    return torch.from_numpy(borders)


def _next_lengths(left: NDArray[np.int64], room: int, *, first: bool) -> list[int]:
    """One length or two that fill the room, else the longest that fits; none if none does."""
    there = np.flatnonzero(left[: room + 1])
    if not len(there) or room == 0:
        return []
    longest = int(there[-1])
    if first or longest == room:
        return [longest]
    matched = there[left[room - there] > (2 * there == room)]  # a length is its own partner only if there are two
    return [int(matched[-1]), room - int(matched[-1])] if len(matched) else [longest]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

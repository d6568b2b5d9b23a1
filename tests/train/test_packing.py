"""Packed rows: full, complete, and each record as if it stood alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import IGNORED, example, labels, make_model, surprisals

from terselm.train.attention import PACKED_ATTENTION
from terselm.train.packing import best_fit, collate, fill_in_pairs, pack_examples, pack_lengths
from terselm.train.surprisals import give_surprisals


@given(st.lists(st.integers(2, 32), min_size=1, max_size=60))
def test_every_example_is_in_one_row_that_holds_it(lengths: list[int]) -> None:
    examples = [example(length, index) for index, length in enumerate(lengths)]
    rows = pack_examples(examples, 32)
    assert sorted(e.record for row in rows for e in row) == list(range(len(lengths)))
    assert all(0 < sum(map(len, row)) <= 32 for row in rows)
    assert len(rows) <= len(room_left(sorted(lengths, reverse=True), 32))


@pytest.mark.parametrize("put", [best_fit, fill_in_pairs])
@given(lengths=st.lists(st.integers(1, 32), max_size=60))
def test_nothing_is_lost_or_cut(put: Callable[[list[int], int], list[list[int]]], lengths: list[int]) -> None:
    rows = put(lengths, 32)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[place] for place in row) <= 32 for row in rows)


@given(st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_leaves_the_least_room(lengths: list[int]) -> None:
    left = [32 - sum(lengths[place] for place in row) for row in best_fit(lengths, 32)]
    assert sorted(left) == sorted(room_left(sorted(lengths, reverse=True), 32))


def test_lengths_that_are_much_alike_fill_rows_too() -> None:
    lengths = np.random.default_rng(0).normal(190, 50, 7000).clip(60, 500).astype(int).tolist()
    assert sum(lengths) / (1024 * len(best_fit(lengths, 1024))) < 0.99
    assert sum(lengths) / (1024 * len(pack_lengths(lengths, 1024))) > 0.99


def room_left(sizes: list[int], capacity: int) -> list[int]:
    """The room left in each row, found by looking at every row."""
    rooms: list[int] = []
    for size in sizes:
        fitting = [index for index, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= size
        else:
            rooms.append(capacity - size)
    return rooms


def test_small_examples_fill_rows() -> None:
    draw = np.random.default_rng(0)
    examples = [example(int(length), index) for index, length in enumerate(draw.integers(20, 300, 500))]
    rows = pack_examples(examples, 1024)
    assert sum(map(len, examples)) / (1024 * len(rows)) > 0.98


def test_labels_are_the_next_counted_tokens_of_the_same_example() -> None:
    row = [example(5, 1), example(3, 2)]
    batch = collate([row, [example(4, 3)]], pad_id=9)
    for index, content in enumerate([row, [example(4, 3)]]):
        row_labels = labels(batch)[index]
        assert row_labels[row_labels != IGNORED].tolist() == [t for e in content for t in e.ids[e.counted].tolist()]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["input_ids"][1, 4:].tolist() == [9] * 4
    assert labels(batch)[0, 4] == IGNORED  # the next token starts another example


@pytest.mark.parametrize("attention", [PACKED_ATTENTION, "sdpa"])
def test_packed_equals_alone(tokenizer: Any, attention: str) -> None:
    lm = make_model(len(tokenizer))
    give_surprisals(lm, autocast=None)
    lm.set_attn_implementation(attention)
    rows = [[example(20, 1), example(7, 2), example(30, 3)], [example(11, 4), example(25, 5)]]
    with torch.inference_mode():
        packed = surprisals(lm, collate(rows, pad_id=0))
        alone = torch.cat([surprisals(lm, collate([[e]], pad_id=0)) for row in rows for e in row])
    assert len(packed) == len(alone) > 40
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)

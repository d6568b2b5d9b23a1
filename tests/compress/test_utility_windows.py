"""How a prompt is laid into windows to score its units."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.compress.utility import longest_question, question_before, utility_windows
from terselm.errors import ContextLengthError


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@st.composite
def demonstrations(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids, and places of last tokens, which may coincide where tokens are longer than units."""
    pieces = []
    for _ in range(draw(st.integers(0, 5))):
        size = draw(st.integers(1, 25))
        ids = draw(st.lists(st.integers(100, 199), min_size=size, max_size=size))
        ends = sorted(draw(st.lists(st.integers(0, size - 1), max_size=8)))
        pieces.append((numbers(*ids), numbers(*ends)))
    return pieces


@settings(max_examples=400, deadline=None)
@given(
    pieces=demonstrations(),
    question=st.lists(st.integers(1, 50), max_size=20),
    separator=st.lists(st.integers(200, 210), max_size=3),
    window=st.integers(2, 60),
)
def test_every_unit_is_scored_once_where_most_stands_before_it(
    pieces: list[tuple[np.ndarray, np.ndarray]], question: list[int], separator: list[int], window: int
) -> None:
    arguments = numbers(*question), [ids for ids, _ in pieces], [ends for _, ends in pieces], numbers(*separator)
    if window - 1 - len(question) < max(1, window // 2):
        with pytest.raises(ContextLengthError, match="less than half"):
            utility_windows(*arguments, window)
        return
    windows = utility_windows(*arguments, window)
    whole: list[int] = []
    places: list[int] = []
    for number, (ids, ends) in enumerate(pieces):
        whole += separator if number else []
        places += [len(whole) + end for end in ends.tolist()]
        whole += ids.tolist()
    room = window - 1 - len(question)
    starts = range(0, max(1, len(whole)), room - room // 2)  # of all windows that overlap by half
    expected: dict[int, list[int]] = {}
    for unit, place in enumerate(places):
        holding = [start for start in starts if start <= place < start + room]
        expected.setdefault(max(holding, key=lambda start: place - start), []).append(unit)
    assert [window.units.tolist() for window in windows] == [expected[start] for start in sorted(expected)]
    for start, read in zip(sorted(expected), windows, strict=True):
        assert read.ids.tolist() == question + whole[start : start + room]
        assert read.ids.dtype == read.units.dtype == read.ends.dtype == np.int64
        assert 1 + len(read.ids) <= window
        assert (read.ends >= len(question)).all()
        assert (read.ends < len(read.ids)).all()
        for unit, end in zip(read.units.tolist(), read.ends.tolist(), strict=True):
            before = end - len(question)
            assert places[unit] - before == start  # the very token, with all of its stretch before it
            assert before >= min(places[unit], room // 2)  # nowhere less than half a window
    if len(whole) <= room:
        assert len(windows) == bool(places)


def test_by_hand() -> None:
    """A window of 11 with a question of 2 leaves 8: windows begin at 0, 4 and 8; 14 tokens with one separator."""
    pieces = [np.arange(10, 17), np.arange(20, 26)]
    windows = utility_windows(numbers(1, 2), pieces, [numbers(2, 6), numbers(0, 5)], numbers(9), 11)
    assert [window.ids.tolist() for window in windows] == [
        [1, 2, 10, 11, 12, 13, 14, 15, 16, 9],
        [1, 2, 14, 15, 16, 9, 20, 21, 22, 23],
        [1, 2, 20, 21, 22, 23, 24, 25],
    ]
    assert [window.units.tolist() for window in windows] == [[0, 1], [2], [3]]
    assert [window.ends.tolist() for window in windows] == [[4, 8], [6], [7]]


def test_a_question_that_leaves_half_of_the_window_is_the_longest() -> None:
    assert longest_question(10) == 4
    pieces, ends, separator = [numbers(7, 8)], [numbers(1)], numbers()
    assert len(utility_windows(np.ones(4, dtype=np.int64), pieces, ends, separator, 10)) == 1
    with pytest.raises(ContextLengthError, match=r"has 5 tokens, .* window of 10 .* shorten it to 4 tokens"):
        utility_windows(np.ones(5, dtype=np.int64), pieces, ends, separator, 10)


@pytest.mark.parametrize(
    ("question", "read"),
    [
        ("", ""),
        (" \n", ""),
        ("Who won?", "Question: Who won?\n\n"),
        ("Question: Who won?\nAnswer:", "Question: Who won?\n\n"),
        ("Q: Who?", "Question: Who?\n\n"),
    ],
)
def test_the_question_stands_before(question: str, read: str) -> None:
    assert question_before(question) == read

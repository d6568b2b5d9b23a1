"""Labelled prompts: their file, masks, and the regression, against brute force."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terselm.data.utility import (
    MOST_UNITS,
    LabelledPrompt,
    draw_masks,
    fit_utilities,
    is_labelled,
    read_labels,
    write_labels,
)
from terselm.errors import DataFormatError

DOCUMENTS = ("One. Two.", "", "Three.\nFour.")


def label(**changes: Any) -> LabelledPrompt:
    plain: dict[str, Any] = {
        "id": "a",
        "instruction": "Read.",
        "demonstrations": DOCUMENTS,
        "question": "Which?",
        "units": ((0, 0, 4), (0, 4, 9), (2, 0, 7), (2, 7, 12)),
        "parents": (-1, 0, -1, 2),
        "utility": (0.5, -1.0, 0.0, 3.25),
        "answer": "Four",
        "target": "t",
        "masks": 16,
        "nats_whole": 1.5,
        "nats_none": 12.0,
    }
    return LabelledPrompt(**plain | changes)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    labels = [label(), label(id="b", question="", instruction="")]
    path = tmp_path / "labels.jsonl"
    assert write_labels(path, labels) == 2
    assert read_labels(path) == labels
    assert all(is_labelled(json.loads(line)) for line in path.read_text().splitlines())


def test_the_prompt_with_some_units() -> None:
    assert label().text() == "Read.\n\nOne. Two.\n\nThree.\nFour.\n\nWhich?"
    assert label().text([0, 1, 1, 0]) == "Read.\n\n Two.\n\nThree.\n\n\nWhich?"
    assert label(instruction="", question="").text([0, 0, 0, 0]) == ""
    assert label().unit_texts() == ["One.", " Two.", "Three.\n", "Four."]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"units": [[0, 0, 4], [0, 5, 9], [2, 0, 7], [2, 7, 12]]},
            r"units\[1\] is \[0, 5, 9\]; expected one that begins",
        ),
        ({"units": [[0, 0, 4], [0, 4, 9], [2, 0, 7], [2, 7, 13]]}, r"units\[3\] is \[2, 7, 13\]; expected one that"),
        ({"units": [[0, 0, 9], [2, 0, 12], [2, 12, 13], [3, 0, 1]]}, r"units\[2\] .*the demonstrations end before it"),
        (
            {"units": [[0, 0, 4], [0, 4, 9], [2, 0, 3], [2, 3, 7]]},
            "the units end at character 7 of demonstration 2, and there is",
        ),
        ({"units": [[0, 0, 9]]}, "the prompt has 1 unit; expected 2 to 64 sentences or lines"),
        ({"units": [[0, 0]]}, r"units holds \[0, 0\]; expected \[demonstration, start, end\]"),
        ({"units": 3}, "units is int; expected a list"),
        ({"parents": [-1, 0, -1]}, "parents has 3 entries for 4 units"),
        ({"parents": [0, 0, -1, 2]}, r"parents\[0\] is 0; expected the number of an earlier unit"),
        ({"parents": [-1, 0, 1, 2]}, r"parents\[2\] is 1; expected .* of the same demonstration"),
        ({"parents": [-1, 0, 1, "a"]}, "parents holds 'a'; expected whole numbers"),
        ({"utility": [1.0]}, "utility has 1 entries for 4 units"),
        ({"utility": [1.0, 2.0, "x", 1.0]}, "utility holds 'x'; expected a finite number"),
        ({"answer": " "}, "answer is empty"),
        ({"masks": 0}, "masks is 0; expected an integer of at least 1"),
        ({"nats_none": -1}, "nats_none is -1; expected at least 0"),
        ({"prompt": "x"}, "prompt is not an object with a list of demonstrations"),
        ({"prompt": {"demonstrations": ["x"], "questions": ""}}, "prompt has a key 'questions'; expected some of"),
        ({"prompt": {"demonstrations": [3, ""]}}, "a part of the prompt is int; expected a string"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps(label().to_json() | more) for more in ({}, {"id": "b"} | change)))
    with pytest.raises(DataFormatError, match=rf"labels\.jsonl:2: {complaint}"):
        read_labels(path)


def test_faults_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("")
    with pytest.raises(DataFormatError, match="holds no labelled prompts"):
        read_labels(path)
    path.write_text(json.dumps(label().to_json()) + "\n" + json.dumps(label().to_json()))
    with pytest.raises(DataFormatError, match=r":2: id 'a' came before"):
        read_labels(path)
    path.write_text('{"id": "a"}')
    with pytest.raises(DataFormatError, match=":1: missing key 'prompt'; a labelled prompt has id, prompt"):
        read_labels(path)


def is_closed(mask: Any, parents: list[int]) -> bool:
    return all(mask[parent] for unit, parent in enumerate(parents) if mask[unit] and parent >= 0)


@pytest.mark.parametrize("parents", [[-1, -1, -1, -1], [-1, 0, 0, 2], [-1, 0, 1, -1]])
def test_all_masks_where_they_are_few(parents: list[int]) -> None:
    masks = draw_masks(parents, 16, seed=0)
    every = {mask for mask in product([False, True], repeat=4) if is_closed(mask, parents)}
    assert {tuple(mask) for mask in masks.tolist()} == every
    assert len(masks) == len(every)


@pytest.mark.parametrize("size", [5, 24, MOST_UNITS])
def test_drawn_masks(size: int) -> None:
    parents = [-1 if unit % 5 == 0 else unit - unit % 5 for unit in range(size)]
    masks = draw_masks(parents, 24, seed=1)
    assert len({tuple(mask) for mask in masks.tolist()}) == len(masks) > 8
    assert all(is_closed(mask, parents) for mask in masks)
    kept = masks.sum(axis=1)
    assert ((size // 2 <= kept) & (kept <= size / 2 + 2)).all()  # a last unit may bring what it belongs to
    np.testing.assert_array_equal(masks, draw_masks(parents, 24, seed=1))
    if size > 5:
        assert len(masks) == 24
        assert (masks != draw_masks(parents, 24, seed=2)).any()


@pytest.mark.parametrize("size", [12, MOST_UNITS])
def test_even_few_masks_leave_out_and_keep_each_unit(size: int) -> None:
    for seed in range(50):
        times = draw_masks([-1] * size, 8, seed).sum(axis=0)
        assert times.min() > 0
        assert times.max() < 8


@pytest.mark.parametrize(("count", "size"), [(16, 4), (12, 40), (64, 20)])
def test_the_regression_minimises_what_it_says(count: int, size: int) -> None:
    chance = np.random.default_rng(0)
    masks = draw_masks([-1] * size, count, seed=0)
    nats = chance.gamma(3.0, 2.0, len(masks))
    found = fit_utilities(masks, nats, ridge=0.7)
    design = np.column_stack([np.ones(len(masks)), masks])
    penalty = 0.7 * np.diag([0.0, *[1.0] * size])  # the intercept is free
    expected = np.linalg.solve(design.T @ design + penalty, design.T @ -nats)[1:]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_by_hand() -> None:
    """With all 16 masks of 4 units, a utility is the difference of two means, times 4 / (4 + ridge)."""
    masks = draw_masks([-1] * 4, 16, seed=0)
    nats = 20 - masks @ np.array([8.0, 0.0, -1.0, 0.5])
    np.testing.assert_allclose(
        fit_utilities(masks, nats, ridge=1.0), np.array([8.0, 0.0, -1.0, 0.5]) * 4 / (4 + 1), atol=1e-9
    )

"""How well units are ranked, by hand; and that held-out prompts with one text stay together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_labels import label

from terselm.data.utility import LabelledPrompt
from terselm.errors import ConfigError
from terselm.train.examples import Encoding
from terselm.train.held_out_labels import HeldOutLabels, UnitReadings, compare_rankers, rank_correlation
from terselm.train.labelled import ReadPrompt
from terselm.train.settings import LossOn, Overlong, Template


def four_units(utility: tuple[float, ...], index: int = 0) -> LabelledPrompt:
    return replace(label(index, documents=1, units=4), utility=utility)


def readings(scores: list[list[float]], tokens: list[list[float]]) -> UnitReadings:
    arrays = [[np.asarray(row, dtype=np.float64) for row in table] for table in (scores, scores, tokens)]
    return UnitReadings(scores=arrays[0], surprisals=arrays[1], tokens=arrays[2])


def test_ranks_by_hand() -> None:
    """The best unit first; then after a unit of 15% of the tokens; then after one of 40%."""
    held_out = HeldOutLabels(labels=[four_units((0.0, 9.0, 1.0, 2.0))] * 3, prompts=[ReadPrompt()] * 3)
    scores = [[0.0, 9.0, 1.0, 2.0], [9.0, 5.0, 1.0, 2.0], [9.0, 5.0, 1.0, 2.0]]
    after = readings(scores, [[10, 10, 10, 10], [15, 25, 30, 30], [40, 20, 20, 20]])
    before = readings([[1.0, 1.0, 1.0, 1.0]] * 3, [[1, 1, 1, 1]] * 3)
    found = compare_rankers(held_out, before, after, seed=0)["rankers"]
    score = {name: value["value"] for name, value in found["score"].items()}
    # The scores 9, 5, 1, 2 have ranks 4, 3, 1, 2, the utilities 1, 4, 2, 3: squares of differences 9, 1, 1, 1.
    rho = 1 - 6 * 12 / (4 * 15)
    assert score["spearman"] == pytest.approx((1 + 2 * rho) / 3)
    assert rank_correlation(held_out, after.scores) == score["spearman"]
    assert (score["best_first"], score["best_in_10"], score["best_in_25"]) == pytest.approx((1 / 3, 1 / 3, 2 / 3))
    flat = {name: value["value"] for name, value in found["surprisal"].items()}
    assert flat["spearman"] == 0  # one value for all orders nothing
    assert flat["best_first"] == 0  # ties fall to the earlier unit


def test_halves_share_no_text(tokenizer: Any) -> None:
    encoding = Encoding(
        tokenizer=tokenizer,
        start_id=0,
        end_id=None,
        template=Template.RAW,
        loss_on=LossOn.RESPONSE,
        max_length=256,
        overlong=Overlong.SPLIT,
    )
    labels = [
        replace(label(i), id=f"{i}-{question}", question=question) for i in range(9) for question in ("red", "of")
    ]
    held_out = HeldOutLabels.of([*labels, four_units((1.0, 1.0, 1.0, 1.0))], encoding)
    assert len(held_out) == 18
    halves = held_out.halves(seed=0)
    texts = [{each.demonstrations for each in half.labels} for half in halves]
    assert [len(each) for each in texts] == [4, 5]
    assert not texts[0] & texts[1]
    with pytest.raises(ConfigError, match="at least two held-out labelled prompts"):
        HeldOutLabels.of(labels[:2], encoding).halves(seed=0)

"""The report's figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from terselm.train.report.measures import Measure, Verdict, compare_words, verdict_on


def measure(before: list[float], after: list[float], weight: list[float], *, higher: bool = False) -> Measure:
    arrays = (np.array(values, dtype=np.float64) for values in (before, after, weight))
    one, other, weights = arrays
    return Measure(before=one, after=other, weight=weights, higher_is_better=higher, best=1.0 if higher else None)


def test_values_are_ratios_of_sums() -> None:
    result = measure([6, 2], [3, 1], [2, 6]).describe(seed=0)
    assert (result["before"], result["after"], result["difference"]) == (1.0, 0.5, -0.5)
    assert "gap_closed" not in result


def test_the_gap_is_that_to_the_best() -> None:
    # 0.5 to 0.8 of 1.0: three fifths of the way; the same in every prompt, so there is no width.
    result = measure([5, 10], [8, 16], [10, 20], higher=True).describe(seed=0)
    assert result["gap_closed"] == pytest.approx(0.6)
    assert result["gap_closed_interval"] == pytest.approx([0.6, 0.6])
    assert result["interval"] == pytest.approx([0.3, 0.3])
    assert result["verdict"] == Verdict.BETTER


def test_nothing_to_gain_is_no_gap() -> None:
    assert "gap_closed" not in measure([10], [10], [10], higher=True).describe(seed=0)


@pytest.mark.parametrize(
    ("interval", "higher", "verdict"),
    [
        ((0.1, 0.2), True, Verdict.BETTER),
        ((0.1, 0.2), False, Verdict.WORSE),
        ((-0.2, -0.1), False, Verdict.BETTER),
        ((-0.2, -0.1), True, Verdict.WORSE),
        ((-0.1, 0.2), True, Verdict.NO_DIFFERENCE),
        ((0.0, 0.0), False, Verdict.NO_DIFFERENCE),
    ],
)
def test_an_interval_with_zero_shows_nothing(interval: tuple[float, float], higher: bool, verdict: Verdict) -> None:
    assert verdict_on(interval, higher_is_better=higher) is verdict


def test_noise_shows_no_difference() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(size=200)
    ones = np.ones(200)
    result = Measure(before=ones, after=ones + noise - noise.mean(), weight=ones, higher_is_better=True).describe(0)
    assert result["verdict"] == Verdict.NO_DIFFERENCE


def words(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_words_by_hand() -> None:
    target = [words(*range(10)), words(*range(20))]
    before = [words(*range(9, -1, -1)), words(*range(20))]  # the first backwards, the second the same
    after = target
    found = compare_words(before, after, target, [0, 1])
    correlation = found["spearman"].describe(seed=0)
    assert correlation["before"] == pytest.approx(0.0)  # −1 and 1
    assert correlation["after"] == pytest.approx(1.0)
    # At 10×: none of 1, and 2 of 2; at 5×: none of 2, and 4 of 4; at 2×: none of 5, and 10 of 10.
    for ratio in (2, 5, 10):
        overlap = found[f"kept_overlap_{ratio}x"].describe(seed=0)
        assert overlap["before"] == pytest.approx(2 / 3)
        assert overlap["after"] == 1.0


def test_texts_of_one_prompt_are_one_row() -> None:
    target = [words(*range(10))] * 3
    found = compare_words(target, target, target, [7, 3, 7])
    assert found["spearman"].weight.tolist() == [1, 2]
    assert found["kept_overlap_5x"].weight.tolist() == [2, 4]


def test_a_model_that_orders_nothing_has_no_correlation() -> None:
    found = compare_words([words(*[1.0] * 10)], [words(*range(10))], [words(*range(10))], [0])
    assert found["spearman"].before.tolist() == [0]

"""Intervals over groups and items."""

from __future__ import annotations

import numpy as np
import pytest

from terselm.evaluate.bootstrap import Estimate, ratio, resampled_sums


def test_every_resample_has_as_many_groups_with_all_their_items() -> None:
    groups = ["a"] * 3 + ["b"] * 3
    columns = np.stack([np.ones(6), np.repeat([1.0, 0.0], 3)], axis=1)
    sums = resampled_sums(columns, groups, seed=0, resamples=4000)
    assert set(sums[:, 0]) == {6.0}
    # group a is drawn 0, 1 or 2 times: with chances 1/4, 1/2, 1/4
    drawn, counts = np.unique(sums[:, 1], return_counts=True)
    assert drawn.tolist() == [0, 3, 6]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_interval_is_as_wide_as_groups_make_it() -> None:
    generator = np.random.default_rng(1)
    effects = generator.normal(size=40)
    values = np.repeat(effects, 25) + 0.1 * generator.normal(size=1000)
    groups = [str(i // 25) for i in range(1000)]
    by_group = ratio(values, np.ones(1000), groups, seed=0)
    alone = ratio(values, np.ones(1000), [str(i) for i in range(1000)], seed=0)
    expected = 2 * 1.96 * effects.std() / np.sqrt(40)
    assert by_group.high - by_group.low == pytest.approx(expected, rel=0.15)
    assert alone.high - alone.low < (by_group.high - by_group.low) / 3
    assert by_group.value == pytest.approx(values.mean())


def test_the_same_seed_draws_the_same_so_that_differences_are_paired() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(size=(50, 1))
    groups = [str(i % 7) for i in range(50)]
    assert (resampled_sums(a, groups, seed=3) == resampled_sums(a, groups, seed=3)).all()
    both = resampled_sums(np.hstack([a, a + 1]), groups, seed=3)
    assert np.ptp(both[:, 1] - both[:, 0] - 50) < 20  # group sizes differ by one item


def test_a_difference_is_shown_where_zero_is_outside() -> None:
    assert Estimate(value=1, low=0.5, high=2).shown
    assert Estimate(value=-1, low=-2, high=-0.5).shown
    assert not Estimate(value=1, low=-0.1, high=2).shown

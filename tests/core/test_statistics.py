"""Words by hand and by law; rank correlation and intervals beside scipy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from terselm import statistics
from terselm.statistics import (
    Interval,
    kept_overlap,
    most_surprising,
    percentile_interval,
    ratio,
    resampled_sums,
    spearman,
    word_spans,
    word_surprisals,
    words_of_tokens,
)

TEXTS = st.text(st.sampled_from("ab é🙂\n\t\u00a0\u3000."), min_size=1, max_size=40)
VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=30)


def test_words_are_what_split_gives() -> None:
    text = "  Two  words,\n\nthen 巴黎 🙂 end.\n"
    assert [text[start:end] for start, end in word_spans(text)] == text.split()


def test_tokens_go_to_words_by_hand() -> None:
    #       0123456789012
    text = "un do, the  x"
    spans = [(0, 2), (2, 5), (5, 6), (6, 7), (7, 10), (10, 11), (11, 13)]
    #        un      " do"   ","     " "     "the"    " "       " x"
    assert words_of_tokens(text, spans).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert word_surprisals(text, spans, [1, 2, 4, 8, 16, 32, 64]).tolist() == [1, 6, 24, 96]


def test_a_token_over_a_border_goes_where_its_first_letter_is() -> None:
    text = "end.\n\nNew of the"
    spans = [(0, 3), (3, 6), (6, 9), (9, 16)]  # ".\n\n" and " of the"
    assert words_of_tokens(text, spans).tolist() == [0, 0, 1, 2]
    assert word_surprisals(text, spans, [1, 2, 4, 8]).tolist() == [3, 4, 8, 0]


def test_whitespace_at_the_end_goes_to_the_last_word() -> None:
    assert words_of_tokens("a b \n", [(0, 1), (1, 3), (3, 5)]).tolist() == [0, 1, 1]


def test_pieces_of_one_character_go_to_its_word() -> None:
    assert words_of_tokens("x 🙂", [(0, 1), (1, 3), (2, 3), (2, 3), (3, 3)]).tolist() == [0, 1, 1, 1, 1]


def test_a_blank_text_has_no_words() -> None:
    assert word_surprisals("  ", [], []).tolist() == []
    with pytest.raises(ValueError, match="holds no word"):
        words_of_tokens("  ", [(0, 2)])


@given(TEXTS, st.data())
def test_the_words_add_up_to_the_text(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)))) | {0, len(text)})
    spans = list(pairwise(cuts))
    values = data.draw(st.lists(st.floats(0, 20), min_size=len(spans), max_size=len(spans)))
    if not text.split():
        return
    words = word_surprisals(text, spans, values)
    assert len(words) == len(text.split())
    assert math.isclose(words.sum(), sum(values), abs_tol=1e-9)
    # One token a character: each non-blank character counts for the word that it stands in.
    single = words_of_tokens(text, [(i, i + 1) for i in range(len(text))])
    for word, (start, end) in enumerate(word_spans(text)):
        assert set(single[start:end].tolist()) == {word}


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 1 3 2 4: 1 − 6 · 2 / (4 · 15) = 0.8.
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@given(VALUES, st.randoms())
def test_spearman_is_scipys(values: list[int], draw: object) -> None:
    other = [v * 2 + draw.randint(-2, 2) for v in values]  # type: ignore[attr-defined]
    if len(set(values)) > 1 and len(set(other)) > 1:
        assert spearman(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)


def test_kept_words_by_hand() -> None:
    a = [5, 1, 4, 3, 2, 0, 0, 0, 0, 9]
    b = [0, 1, 9, 8, 7, 0, 0, 0, 0, 6]
    assert most_surprising(a, 0.4).tolist() == [0, 2, 3, 9]
    assert kept_overlap(a, b, 0.4) == 0.75  # 2, 3, 9 of 2, 3, 4, 9
    assert kept_overlap(a, b, 0.1) == 0  # 9 against 2
    assert kept_overlap(a, a, 0.01) == 1
    assert kept_overlap(a, b, 1) == 1


def test_ties_go_to_the_earlier_word() -> None:
    assert most_surprising([1, 2, 2, 2, 1], 0.4).tolist() == [1, 2]


@pytest.mark.parametrize("share", [0, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share is"):
        most_surprising([1, 2], share)


def test_sums_by_hand_when_rows_are_alike() -> None:
    sums = resampled_sums(np.tile([[2.0, 3.0]], (7, 1)), seed=0, resamples=11)
    assert sums.tolist() == [[14.0, 21.0]] * 11


def test_large_tables_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).normal(size=(20, 2))
    whole = resampled_sums(columns, seed=3, resamples=50)
    monkeypatch.setattr(statistics, "_AT_ONCE", 100)
    np.testing.assert_allclose(resampled_sums(columns, seed=3, resamples=50), whole, atol=1e-12)


def test_the_interval_is_scipys() -> None:
    draw = np.random.default_rng(1)
    weight = draw.uniform(1, 5, 80)
    total = weight * draw.normal(0.3, 0.5, 80)
    sums = resampled_sums(np.stack([total, weight], axis=1), seed=0)
    ours = percentile_interval(sums[:, 0] / sums[:, 1])

    def ratio_of_sums(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.sum(axis=axis) / b.sum(axis=axis)

    theirs = stats.bootstrap(
        (total, weight), ratio_of_sums, paired=True, vectorized=True, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_every_resample_has_as_many_groups_with_all_their_items() -> None:
    groups = ["a"] * 3 + ["b"] * 3
    columns = np.stack([np.ones(6), np.repeat([1.0, 0.0], 3)], axis=1)
    sums = resampled_sums(columns, groups=groups, seed=0, resamples=4000)
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
    by_group = ratio(values, np.ones(1000), groups=groups, seed=0)
    alone = ratio(values, np.ones(1000), seed=0)
    expected = 2 * 1.96 * effects.std() / np.sqrt(40)
    assert by_group.high - by_group.low == pytest.approx(expected, rel=0.15)
    assert alone.high - alone.low < (by_group.high - by_group.low) / 3
    assert by_group.value == pytest.approx(values.mean())


def test_the_same_seed_draws_the_same_so_that_differences_are_paired() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(size=(50, 1))
    groups = [str(i % 7) for i in range(50)]
    assert (resampled_sums(a, groups=groups, seed=3) == resampled_sums(a, groups=groups, seed=3)).all()
    both = resampled_sums(np.hstack([a, a + 1]), groups=groups, seed=3)
    assert np.ptp(both[:, 1] - both[:, 0] - 50) < 20  # group sizes differ by one item


def test_a_difference_is_shown_where_zero_is_outside() -> None:
    assert Interval(value=1, low=0.5, high=2).shown
    assert Interval(value=-1, low=-2, high=-0.5).shown
    assert not Interval(value=1, low=-0.1, high=2).shown


def test_nothing_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="nothing to resample"):
        resampled_sums(np.zeros((0, 2)), seed=0)

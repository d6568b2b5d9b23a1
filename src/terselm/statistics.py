"""Figures of texts: words, in which models with different tokenizers can be compared, and how sure a figure is.

A word is a run of characters that are not whitespace, with the whitespace before it. Knows arrays, not models.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval); Davison and
Hinkley, Bootstrap Methods and their Application, 1997, §3.8 (items in groups).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RATIOS = (2, 5, 10)  # of compression, at which kept words are compared
CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 1 << 24  # counts in memory
_WORD = re.compile(r"\S+")


def word_spans(text: str) -> Ints:
    """``(n_words, 2)``: where each word starts and ends in characters, without whitespace; end exclusive."""
    spans = [match.span() for match in _WORD.finditer(text)]
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def words_of_tokens(text: str, spans: Sequence[tuple[int, int]] | Ints) -> Ints:
    """The word that each token belongs to.

    A token belongs to the word that holds its first character that is not whitespace; a token of whitespace alone (or
    without text) to the next word, at the end of the text to the last. So every token has exactly one word, and the
    surprisals of all words add up to that of the text, whatever the tokenizer.

    Args:
        text: what the tokens were made from.
        spans: ``(n_tokens, 2)``, (start, end) of each token in characters; end exclusive.

    Returns:
        ``(n_tokens,)`` int64 in [0, n_words).

    Raises:
        ValueError: there are tokens, but the text is blank.
    """
    starts = np.asarray(spans, dtype=np.int64).reshape(-1, 2)[:, 0]
    words = word_spans(text)
    if len(starts) and not len(words):
        raise ValueError("the text holds no word")
    following: Ints = np.searchsorted(words[:, 1], starts, side="right")  # the first word that ends after the start
    return np.minimum(following, len(words) - 1)


def word_surprisals(text: str, spans: Sequence[tuple[int, int]] | Ints, surprisals: ArrayLike) -> Floats:
    """``(n_words,)`` float64: the surprisal of each word, the sum over its tokens.

    Args:
        text: what the tokens were made from.
        spans: ``(n_tokens, 2)``, (start, end) of each token in characters.
        surprisals: ``(n_tokens,)``, nats.
    """
    values = np.asarray(surprisals, dtype=np.float64)
    sums = np.bincount(words_of_tokens(text, spans), weights=values, minlength=len(word_spans(text)))
    return sums.astype(np.float64)  # without tokens it would be integers


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where either has no two different values.

    Source: C. Spearman, The proof and measurement of association between two things, 1904.
    """
    ranks = np.stack([_mean_ranks(a), _mean_ranks(b)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred**2).sum(axis=1).prod())
    return float(centred.prod(axis=0).sum() / spread) if spread else float("nan")


def most_surprising(surprisals: ArrayLike, share: float) -> Ints:
    """The words that a compressor keeps: the ``max(1, round(share · n))`` most surprising, ties to the earlier.

    Returns:
        their indices, ascending.
    """
    values = np.asarray(surprisals, dtype=np.float64)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a fraction in (0, 1]")
    wanted = max(1, round(share * len(values)))
    return np.sort(np.argsort(-values, kind="stable")[:wanted])


def kept_overlap(a: ArrayLike, b: ArrayLike, share: float) -> float:
    """The share of the words kept by ``a`` that ``b`` keeps too, when each keeps as many: in [0, 1]."""
    ours, theirs = most_surprising(a, share), most_surprising(b, share)
    return len(np.intersect1d(ours, theirs, assume_unique=True)) / len(ours)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether a difference is one: zero is not in its interval."""
        return self.low > 0 or self.high < 0


def ratio(over: Floats, under: Floats, *, seed: int, groups: Sequence[str] | None = None) -> Interval:
    """A ratio of sums, such as a mean (``under`` all ones). ``over``, ``under``: ``(items,)``."""
    sums = resampled_sums(np.stack([over, under], axis=1), seed=seed, groups=groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(sums[:, 0] / sums[:, 1])
        value = float(over.sum() / under.sum()) if under.sum() else float("nan")
    return Interval(value=value, low=low, high=high)


def resampled_sums(
    columns: Floats, *, seed: int, groups: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> Floats:
    """Sums of each column when the items are drawn anew with replacement, as many as there are.

    All columns share the draw, so what is computed from them is paired. Items have to be independent of each other:
    put all answers to one prompt into one item. Where items share demonstrations or a task, say so by ``groups``: then
    as many groups as there are are drawn, and from each drawn group as many of its items as it has.

    Args:
        columns: ``(items, columns)``.
        seed: of the draw.
        groups: ``(items,)``, the group of each item; None where they are independent.
        resamples: how often the items are drawn.

    Returns:
        ``(resamples, columns)``.
    """
    items = len(columns)
    if not items:
        raise ValueError("there is nothing to resample")
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // items)
    parts = [min(size, resamples - begin) for begin in range(0, resamples, size)]
    if groups is None:
        return np.concatenate([_counts(generator, items, part) @ columns for part in parts])
    members: dict[str, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    return np.concatenate([_grouped_sums(generator, columns, list(members.values()), part) for part in parts])


def percentile_interval(values: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval that holds the middle ``confidence`` of the finite values; NaNs where there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def _grouped_sums(generator: np.random.Generator, columns: Floats, groups: list[list[int]], resamples: int) -> Floats:
    sums = np.zeros((resamples, columns.shape[1]))
    drawn = _counts(generator, len(groups), resamples)
    for number, items in enumerate(groups):
        times = generator.multinomial(drawn[:, number] * len(items), np.full(len(items), 1 / len(items)))
        sums += times @ columns[items]
    return sums


def _counts(generator: np.random.Generator, things: int, resamples: int) -> Ints:
    """``(resamples, things)``: how often each is drawn when as many are drawn as there are."""
    return generator.multinomial(things, np.full(things, 1 / things), size=resamples)


def _mean_ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values have the mean of the ranks that they take up."""
    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts - 1) / 2
    return mean[group]

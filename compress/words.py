"""Words, in which models with different tokenizers can be compared: surprisals by word, their order, what is kept.

A word is a run of characters that are not whitespace, with the whitespace before it. Knows arrays, not models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

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


def _mean_ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values have the mean of the ranks that they take up."""
    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts - 1) / 2
    return mean[group]

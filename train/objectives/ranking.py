"""Ranking: the words that the target would keep have to surprise the small LM more than those it would drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from terselm.statistics import RATIOS
from terselm.train.examples import Example
from terselm.train.objectives.base import Read
from terselm.train.objectives.words import by_word, count_words, in_words, kept_at, word_inputs

_WINDOW = 128  # words that are compared with each other; pairs grow with its square


class KeptWordRanking:
    """Mean over pairs of a kept word i and a dropped word j of one example of softplus(−(s_i − s_j)).

    Kept and dropped are what the target's own surprisals say at each ratio; a pair counts once for every ratio that
    parts it. Long examples are compared in windows of 128 words.

    Source: the pairwise logistic loss of RankNet (Burges et al., Learning to Rank using Gradient Descent, 2005).
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return in_words(example)

    def units(self, example: Example) -> float:
        pairs = 0
        for level in self._levels(example):
            pairs += sum(_parted(level[begin : begin + _WINDOW]) for begin in range(0, len(level), _WINDOW))
        return float(pairs)

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """``windows``: ``(M, 128)`` words, W for none; ``kept``: ``(M, ratios, 128)`` int8, −1 where there is none."""
        inputs = word_inputs(examples, read)
        total, start = len(inputs["word_nats"]), 0
        windows, kept = [], []
        for example in examples:
            levels = self._levels(example)
            count = count_words(example)
            for begin in range(0, count, _WINDOW):
                size = min(_WINDOW, count - begin)
                window = np.full(_WINDOW, total, dtype=np.int64)
                window[:size] = start + begin + np.arange(size)
                decisions = np.full((len(RATIOS), _WINDOW), -1, dtype=np.int8)
                decisions[:, :size] = [level[begin : begin + size] for level in levels]
                windows.append(window)
                kept.append(decisions)
            start += count
        inputs["windows"] = np.asarray(windows, dtype=np.int64).reshape(-1, _WINDOW)
        inputs["kept"] = np.asarray(kept, dtype=np.int8).reshape(-1, len(RATIOS), _WINDOW)
        return inputs

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        words = functional.pad(by_word(surprisals, inputs), (0, 1))
        values = words[inputs["windows"]]  # (M, 128)
        above, below = (inputs["kept"] == 1).float(), (inputs["kept"] == 0).float()  # (M, ratios, 128)
        pairs = above.transpose(1, 2) @ below  # (M, 128, 128): at how many ratios i is kept and j is not
        return (functional.softplus(values[:, None, :] - values[:, :, None]) * pairs).sum()

    def _levels(self, example: Example) -> list[NDArray[np.bool_]]:
        if example.guide is None:
            return [np.zeros(0, dtype=np.bool_) for _ in RATIOS]
        return [kept_at(example.guide.nats, ratio) for ratio in RATIOS]


def _parted(kept: NDArray[np.bool_]) -> int:
    """Pairs of which one word is kept and the other is not."""
    return int(kept.sum()) * int((~kept).sum())

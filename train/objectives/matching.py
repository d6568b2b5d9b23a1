"""Surprisal matching: the small LM learns which words surprise the target, which is all that a compressor uses."""

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


class SurprisalMatching:
    """Weighted mean over words w of smooth-L1(s_w − t_w).

    s_w and t_w are the surprisals of a word under small LM and target, the sums over its tokens in nats, and
    smooth-L1(d) = d²/(2β) where |d| < β, else |d| − β/2. The weight of a word is 1 + λ · mean over the ratios r of
    exp(−|t_w − γ_r|): near a threshold γ_r an error decides whether the word is kept.

    Args:
        turning_point: β, nats.
        near_threshold: λ; 0 weighs all words the same.
    """

    def __init__(self, turning_point: float = 1.0, near_threshold: float = 0.0) -> None:
        self._turning_point = turning_point
        self._near_threshold = near_threshold

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return in_words(example)

    def units(self, example: Example) -> float:
        return float(self._weights(example).sum()) if self._near_threshold else float(count_words(example))

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        inputs = word_inputs(examples, read)
        if self._near_threshold:
            inputs["word_weights"] = np.concatenate([self._weights(example) for example in examples])
        return inputs

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        errors = functional.smooth_l1_loss(
            by_word(surprisals, inputs), inputs["word_nats"], beta=self._turning_point, reduction="none"
        )
        return (errors * inputs["word_weights"] if self._near_threshold else errors).sum()

    def _weights(self, example: Example) -> NDArray[np.float32]:
        """``(words,)``."""
        if not count_words(example) or example.guide is None:
            return np.zeros(0, dtype=np.float32)
        nats = example.guide.nats
        nearness = [np.exp(-np.abs(nats - nats[kept_at(nats, ratio)].min())) for ratio in RATIOS]
        return np.asarray(1 + self._near_threshold * np.mean(nearness, axis=0), dtype=np.float32)

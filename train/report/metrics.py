"""The figures of the report, from surprisals alone; knows no models and no files.

A measure is a ratio of two sums over prompts (bits / bytes, words kept by both / words kept, ρ / texts), so all of
them share one paired bootstrap, over prompts: texts with one prompt are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.statistics import (
    CONFIDENCE,
    RESAMPLES,
    kept_overlap,
    most_surprising,
    percentile_interval,
    resampled_sums,
    spearman,
)

Floats = NDArray[np.float64]

RATIOS = (2, 5, 10)  # at which kept words are compared
LEAST_WORDS = 10  # of a text whose words are compared: one is kept at 10×


class Verdict(StrEnum):
    """What an interval says of a difference."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A ratio of sums before and after, by prompt.

    Attributes:
        before: ``(prompts,)``, the numerator's part of each prompt.
        after: likewise.
        weight: ``(prompts,)``, the denominator's.
        higher_is_better: whether a rise is good news.
        best: the value that cannot be bettered, where there is one.
    """

    before: Floats
    after: Floats
    weight: Floats
    higher_is_better: bool
    best: float | None = None

    def describe(self, seed: int) -> dict[str, Any]:
        """Both values, their difference with its paired interval and verdict; also the share of the way to ``best``."""
        before, after = (float(part.sum() / self.weight.sum()) for part in (self.before, self.after))
        sums = resampled_sums(np.stack([self.before, self.after, self.weight], axis=1), seed=seed)
        sums = sums[sums[:, 2] > 0]
        ratios = sums[:, :2] / sums[:, 2:]
        interval = percentile_interval(ratios[:, 1] - ratios[:, 0])
        result: dict[str, Any] = {
            "before": before,
            "after": after,
            "difference": after - before,
            "interval": list(interval),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "verdict": judge(interval, higher_is_better=self.higher_is_better).value,
        }
        if self.best is not None and before != self.best:
            with np.errstate(divide="ignore", invalid="ignore"):
                closed = (ratios[:, 1] - ratios[:, 0]) / (self.best - ratios[:, 0])
            result["gap_closed"] = (after - before) / (self.best - before)
            result["gap_closed_interval"] = list(percentile_interval(closed))
        return result


def judge(interval: tuple[float, float], *, higher_is_better: bool) -> Verdict:
    """A difference whose interval holds zero has not been shown."""
    low, high = interval
    if low > 0:
        return Verdict.BETTER if higher_is_better else Verdict.WORSE
    if high < 0:
        return Verdict.WORSE if higher_is_better else Verdict.BETTER
    return Verdict.NO_DIFFERENCE


def compare_words(
    before: Sequence[Floats], after: Sequence[Floats], target: Sequence[Floats], prompt_of: Sequence[int]
) -> dict[str, Measure]:
    """Rank correlation with the target, and the overlap of kept words with those that the target would keep.

    Args:
        before: surprisal of each word, one array a text; at least `LEAST_WORDS` words each.
        after: likewise, of the aligned model.
        target: likewise, of the target.
        prompt_of: the prompt that each text belongs to.

    Returns:
        ``spearman``: the mean over texts; ``kept_overlap_2x`` and so on: words that both keep / words kept, over all.
    """
    groups = np.unique(np.asarray(prompt_of), return_inverse=True)[1]

    def by_prompt(values: Sequence[float]) -> Floats:
        return np.bincount(groups, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)

    def correlations(words: Sequence[Floats]) -> list[float]:
        found = [spearman(ours, theirs) for ours, theirs in zip(words, target, strict=True)]
        return [0.0 if math.isnan(rho) else rho for rho in found]  # one value for every word orders nothing

    measures = {
        "spearman": Measure(
            before=by_prompt(correlations(before)),
            after=by_prompt(correlations(after)),
            weight=by_prompt([1.0] * len(target)),
            higher_is_better=True,
            best=1.0,
        )
    }
    for ratio in RATIOS:
        kept = [len(most_surprising(words, 1 / ratio)) for words in target]
        common = [
            [kept_overlap(ours, theirs, 1 / ratio) * n for ours, theirs, n in zip(words, target, kept, strict=True)]
            for words in (before, after)
        ]
        measures[f"kept_overlap_{ratio}x"] = Measure(
            before=by_prompt(common[0]),
            after=by_prompt(common[1]),
            weight=by_prompt(kept),
            higher_is_better=True,
            best=1.0,
        )
    return measures

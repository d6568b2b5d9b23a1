"""How sure a figure is: bootstrap intervals of ratios of sums, such as bits per byte or a mean.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # counts in memory


def resampled_sums(columns: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Sums of each column when the rows are drawn anew with replacement, as many as there are.

    All columns share the draw, so what is computed from them is paired. Rows have to be independent of each other:
    put all answers to one prompt into one row.

    Args:
        columns: ``(rows, columns)``.
        seed: of the draw.
        resamples: how often the rows are drawn.

    Returns:
        ``(resamples, columns)``.
    """
    rows = len(columns)
    if not rows:
        raise ValueError("there is nothing to resample")
    generator = np.random.default_rng(seed)
    chances = np.full(rows, 1 / rows)
    size = max(1, _AT_ONCE // rows)
    parts = [min(size, resamples - begin) for begin in range(0, resamples, size)]
    return np.concatenate([generator.multinomial(rows, chances, size=part) @ columns for part in parts])


def percentile_interval(values: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval that holds the middle ``confidence`` of the finite values; NaNs where there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)

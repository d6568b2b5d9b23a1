"""What alignment minimises: one small class each, and here their weighted sum, each divided by its own count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.examples import Example
from terselm.train.objectives.base import Objective, Read
from terselm.train.objectives.divergence import TailedDivergence
from terselm.train.objectives.matching import SurprisalMatching
from terselm.train.objectives.nll import NegativeLogLikelihood
from terselm.train.objectives.ranking import KeptWordRanking
from terselm.train.settings import ObjectiveSettings


class Mixture:
    """Σ_o w_o · total_o / units_o over the objectives o.

    Args:
        parts: weight and objective; weights above 0.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        self._weights = [weight for weight, _ in parts]
        self._parts = [part for _, part in parts]

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> Mixture:
        """What the configuration asks for."""
        matching = SurprisalMatching(settings.turning_point, settings.near_threshold)
        known: list[tuple[float, Objective]] = [
            (settings.nll, NegativeLogLikelihood()),
            (settings.matching, matching),
            (settings.ranking, KeptWordRanking()),
            (settings.divergence, TailedDivergence()),
        ]
        return cls([(weight, part) for weight, part in known if weight > 0])

    def reads(self, example: Example) -> NDArray[np.bool_]:
        """``(n,)``: the tokens that any objective needs."""
        return reduce(np.logical_or, [part.reads(example) for part in self._parts])

    def units(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """``(objectives,)``: the divisors of these examples."""
        rows = [[part.units(example) for part in self._parts] for example in examples]
        table: NDArray[np.float64] = np.asarray(rows, dtype=np.float64).reshape(-1, len(self._parts))
        return np.asarray(table.sum(axis=0))

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """What `loss` needs of these examples."""
        inputs: dict[str, NDArray[np.generic]] = {}
        for part in self._parts:
            inputs.update(part.inputs(examples, read))
        return inputs

    def loss(self, surprisals: Tensor, inputs: Mapping[str, Tensor], units: Sequence[float]) -> Tensor:
        """A scalar; ``units`` are the divisors of the whole step, an objective without any adds nothing."""
        parts = zip(self._weights, self._parts, units, strict=True)
        terms = [weight / count * part.total(surprisals, inputs) for weight, part, count in parts if count > 0]
        return sum(terms, start=0.0 * surprisals.sum())

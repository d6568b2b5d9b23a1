"""Negative log-likelihood of the target's own output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.examples import Example
from terselm.train.objectives.base import Read, of_text


class NegativeLogLikelihood:
    """Mean over the counted tokens t of −log p(x_t | x_<t), in nats.

    Source: Eq. 8 of arXiv:2310.05736.
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return example.counted

    def units(self, example: Example) -> float:
        return float(example.counted.sum())

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        counted = [example.counted[mask] for example, mask in zip(examples, read, strict=True)]
        return {"counted": np.concatenate(counted).astype(np.float32)}

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return (of_text(surprisals) * inputs["counted"]).sum()

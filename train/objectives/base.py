"""What an objective is: a sum over units (tokens, words, pairs), divided by how many there are in the whole step.

The count comes from the examples on the host, so that no process has to ask another, nor its GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.examples import Example

Read = Sequence[NDArray[np.bool_]]
"""By example: which of its tokens the model is asked about."""


class Objective(Protocol):
    """One thing to minimise."""

    def reads(self, example: Example) -> NDArray[np.bool_]:
        """``(n,)``: the tokens whose surprisal it needs; never the first, which nothing precedes."""
        ...

    def units(self, example: Example) -> float:
        """What this example adds to the divisor."""
        ...

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """What `total` needs of these examples; rows that belong to tokens follow the tokens that are read."""
        ...

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The sum over all units, a scalar.

        Args:
            surprisals: ``(n,)``, or ``(n, 1 + K)`` if an objective asks for other tokens besides: nats, float32.
            inputs: as `inputs` made them.
        """
        ...


def of_text(surprisals: Tensor) -> Tensor:
    """``(n,)``: of the tokens of the text itself."""
    return surprisals if surprisals.dim() == 1 else surprisals[:, 0]

"""From packed rows to what one pass of training needs, and the divisors of each step, all on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.objectives import Mixture
from terselm.train.packing import Row, collate, cu_seqlens

MODEL_INPUTS = ("input_ids", "position_ids", "at", "wanted", "cu_seqlens")


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes the batch of a pass.

    Attributes:
        objective: what it asks the model about each token.
        width: tokens that each row is filled up to; None for as many as the longest has.
    """

    objective: Mixture
    width: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """One batch.

        Returns:
            ``input_ids``, ``position_ids``: ``(B, T)``. ``cu_seqlens``: as `packing.cu_seqlens` makes it. ``at``:
            ``(n,)`` places in the flattened rows. ``wanted``: ``(n,)`` tokens after them, or ``(n, 1 + K)`` with the
            target's likeliest. Besides them what the objectives need.
        """
        shape = None if self.width is None else (len(rows), self.width)
        batch = collate(rows, pad_id=0, shape=shape)
        examples = [example for row in rows for example in row]
        read = [self.objective.reads(example) for example in examples]
        inputs = self.objective.inputs(examples, read)
        wanted = np.concatenate([example.ids[mask] for example, mask in zip(examples, read, strict=True)])
        if "top_ids" in inputs:
            wanted = np.concatenate([wanted[:, None], inputs.pop("top_ids")], axis=1)
        arrays = {"at": self._places(rows, read, batch["input_ids"].shape[1]), "wanted": wanted, **inputs}
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "cu_seqlens": cu_seqlens(batch["position_ids"]),
            **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
        }

    @staticmethod
    def _places(rows: Sequence[Row], read: Sequence[NDArray[np.bool_]], width: int) -> NDArray[np.int64]:
        """The place before each token that is read, in the flattened ``(B, T)``."""
        masks = iter(read)
        places = []
        for index, row in enumerate(rows):
            start = index * width
            for example in row:
                places.append(np.flatnonzero(next(masks)) + start - 1)
                start += len(example)
        return np.concatenate(places).astype(np.int64)


@dataclass(frozen=True, eq=False)
class StepCounts:
    """What each optimiser step holds over all processes, known before any of it is read.

    Attributes:
        tokens: ``(steps,)`` int64, those that are not padding.
        units: ``(steps, objectives)`` float64, the divisors of the losses.
    """

    tokens: NDArray[np.int64]
    units: NDArray[np.float64]

    @classmethod
    def of(cls, schedule: Sequence[Row], rows_per_step: int, objective: Mixture) -> StepCounts:
        """Count; a row that comes again in a later epoch is counted once."""
        known: dict[int, tuple[int, NDArray[np.float64]]] = {}
        tokens, units = [], []
        for row in schedule:
            if id(row) not in known:
                known[id(row)] = (sum(len(example) for example in row), objective.units(row))
            of_row = known[id(row)]
            tokens.append(of_row[0])
            units.append(of_row[1])
        steps = len(schedule) // rows_per_step
        return cls(
            np.asarray(tokens, dtype=np.int64)[: steps * rows_per_step].reshape(steps, -1).sum(axis=1),
            np.stack(units)[: steps * rows_per_step].reshape(steps, rows_per_step, -1).sum(axis=1),
        )

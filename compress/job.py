"""One prompt on its way through the stages, and the account of what became of its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np

from terselm.compress.budget import BudgetController, BudgetPlan
from terselm.compress.counter import Count
from terselm.compress.itpc import Floats, IterativeCompression
from terselm.compress.layout import Layout, Mask
from terselm.compress.prompt import Part
from terselm.compress.result import Reason, TokenDecision
from terselm.compress.units import Floats32, Ints


@dataclass(kw_only=True)
class Job:
    """One prompt on its way through the stages."""

    layout: Layout
    controller: BudgetController
    count: Count
    original: int  # tokens, as the caller counts them
    budget: int  # likewise
    coarse: dict[int, Floats32] = field(default_factory=dict)  # of a demonstration by itself, by number of the piece
    plan: BudgetPlan | None = None  # None: the prompt fits as it is
    stage: IterativeCompression | None = None
    ranks: list[float] | None = None  # of the demonstrations, instead of their perplexities
    tokens_read: int = 0
    tokens_cached: int = 0

    @property
    def iteration(self) -> IterativeCompression:
        """Stage 2, once it has begun."""
        assert self.stage is not None
        return self.stage

    @property
    def selected(self) -> Sequence[int]:
        """The demonstrations that survived Stage 1: all, where the prompt fits as it is."""
        return self.plan.selected if self.plan is not None else range(len(self.demonstrations))

    @cached_property
    def demonstrations(self) -> list[int]:
        return self.layout.numbers(Part.DEMONSTRATION)

    @cached_property
    def random(self) -> np.random.Generator:
        """Chance that is the same whenever the same prompt comes."""
        return np.random.default_rng(list(blake2b(self.layout.ids.tobytes(), digest_size=16).digest()))

    def perplexities(self) -> list[float]:
        """One a demonstration; 0 where it was not read."""
        if self.ranks is not None:
            return self.ranks
        means = [
            float(self.coarse[n].mean(dtype=np.float64)) if n in self.coarse else -np.inf for n in self.demonstrations
        ]
        return [float(np.exp(min(mean, 700.0))) for mean in means]


def decide(job: Job, kept: Mask) -> tuple[TokenDecision, ...]:
    layout = job.layout
    surprisal, segment = _surprisals(job)
    decisions = []
    for unit in range(len(layout)):
        piece = layout.pieces[layout.piece_of[unit]]
        start, end = int(layout.starts[unit]), int(layout.ends[unit])
        decisions.append(
            TokenDecision(
                part=piece.part,
                index=piece.index,
                text=piece.text[start:end],
                start=start,
                end=end,
                token_count=int(layout.cost[unit]),
                segment=int(segment[unit]) if segment[unit] >= 0 else None,
                surprisal=None if np.isnan(surprisal[unit]) else float(surprisal[unit]),
                kept=bool(kept[unit]),
                reason=_reason(job, unit, bool(kept[unit])),
            )
        )
    return tuple(decisions)


def _surprisals(job: Job) -> tuple[Floats, Ints]:
    layout = job.layout
    surprisal = np.full(len(layout), np.nan)
    if job.stage is None:
        return surprisal, np.full(len(layout), -1, dtype=np.int64)
    for number, tokens in job.coarse.items():
        low, high = layout.edges[number], layout.edges[number + 1]
        surprisal[low:high] = np.add.reduceat(tokens.astype(np.float64), layout.first[low:high] - layout.first[low])
    read = ~np.isnan(job.stage.surprisal)
    surprisal[read] = job.stage.surprisal[read]
    return surprisal, job.stage.segment_of


def _reason(job: Job, unit: int, kept: bool) -> Reason:
    if job.stage is None:
        return Reason.UNCHANGED
    if job.layout.protected[unit]:
        return Reason.PROTECTED
    if kept:
        return Reason.ABOVE_THRESHOLD if job.stage.kept[unit] else Reason.TAKEN_BACK
    if job.stage.kept[unit]:
        return Reason.OVER_BUDGET
    return Reason.BELOW_THRESHOLD if job.stage.segment_of[unit] >= 0 else Reason.DEMONSTRATION_DROPPED

"""The three stages, for many prompts at once (docs/algorithm.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from terselm.compress.budget import BudgetPlan
from terselm.compress.counter import Count
from terselm.compress.fit import BudgetFit, fit_all
from terselm.compress.itpc import IterativeCompression
from terselm.compress.job import Job, decide
from terselm.compress.prepare import Preparer
from terselm.compress.prompt import Part, Prompt
from terselm.compress.reader import Reader
from terselm.compress.result import CompressionResult
from terselm.compress.settings import CompressionSettings, Order, Selection
from terselm.compress.target import Target
from terselm.compress.units import Ints
from terselm.models import CausalLM


class Stages:
    """Takes prompts through the stages under one set of settings.

    Args:
        reader: has the small LM read; several sets of settings may share it.

    Attributes:
        count: the small LM's own counter.
    """

    def __init__(self, lm: CausalLM, settings: CompressionSettings, reader: Reader) -> None:
        self._settings = settings
        self._window = lm.window
        self._reader = reader
        self._preparer = Preparer(lm, settings)
        self.count: Count = self._preparer.count

    def run(
        self,
        prompts: Sequence[Prompt],
        each: Sequence[Target],
        patterns: Sequence[re.Pattern[str]],
        counter: Count | None,
    ) -> list[CompressionResult]:
        """One result a prompt; see `PromptCompressor.compress_batch`.

        Args:
            patterns: what must survive.
            counter: the caller's; the small LM's if None.
        """
        jobs = self._preparer.prepare(prompts, each, patterns, counter)
        active = [job for job in jobs if job.original > job.budget]
        self._rank_demonstrations(active)
        for job in active:
            job.plan = job.controller.plan(job.perplexities())
            job.stage = self._stage_two(job, job.plan)
        if self._settings.ablations.random_tokens:
            for job in active:
                _keep_at_random(job)
        else:
            self._reader.run_stage_two(active)
        fits = [self._fit(job) if job.stage is not None else None for job in jobs]
        fit_all([fit for fit in fits if fit is not None])
        return [_result(job, fit) for job, fit in zip(jobs, fits, strict=True)]

    def _rank_demonstrations(self, jobs: Sequence[Job]) -> None:
        if self._settings.ablations.selection is Selection.RANDOM:
            for job in jobs:
                job.ranks = job.random.random(len(job.demonstrations)).tolist()
        else:
            ranked = self._settings.order is Order.RANKED
            self._reader.read_demonstrations(
                [job for job in jobs if job.controller.needs_perplexity or (ranked and len(job.demonstrations) > 1)]
            )
        if self._settings.order is Order.RANKED:
            for job in jobs:
                self._preparer.rank(job)

    def _stage_two(self, job: Job, plan: BudgetPlan) -> IterativeCompression:
        layout = job.layout
        whole = {job.demonstrations[i] for i in plan.selected}
        parts = []
        for part in Part:
            units = [
                np.arange(layout.edges[n], layout.edges[n + 1])
                for n in layout.numbers(part)
                if part is not Part.DEMONSTRATION or n in whole or layout.holds_protected(n)
            ]
            taking = np.concatenate([np.zeros(0, dtype=np.int64), *units])
            if part is Part.DEMONSTRATION:
                taking = taking[np.isin(layout.piece_of[taking], list(whole)) | layout.protected[taking]]
            parts.append(taking)
        budgets = [plan.instruction, plan.demonstrations, plan.question]
        return IterativeCompression(
            layout,
            parts,
            budgets,
            segment_size=self._settings.segment_size,
            window=self._window,
            one_pass=self._settings.ablations.one_pass,
            next_token=self._settings.ablations.next_token,
        )

    def _fit(self, job: Job) -> BudgetFit:
        stage = job.iteration
        return BudgetFit(job.layout, stage.kept, stage.margin, partial(self._spare, job), job.budget, job.count)

    def _spare(self, job: Job) -> Ints:
        """The free units of the demonstrations that were not selected, in descending order of perplexity."""
        left = [i for i in range(len(job.demonstrations)) if i not in job.selected]
        if left and not job.coarse and job.ranks is None:
            self._reader.read_demonstrations([job])
        perplexities = job.perplexities()
        left.sort(key=lambda i: (-perplexities[i], i))
        edges = job.layout.edges
        units = [np.arange(edges[n], edges[n + 1]) for n in (job.demonstrations[i] for i in left)]
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *units])
        free: Ints = flat[~job.layout.protected[flat]]
        return free


def _result(job: Job, fit: BudgetFit | None) -> CompressionResult:
    """``fit`` is None for a prompt that fits as it is."""
    kept = fit.kept if fit is not None else np.ones(len(job.layout), dtype=bool)
    return CompressionResult(
        text=fit.text if fit is not None else job.layout.text(kept),
        original_tokens=job.original,
        compressed_tokens=fit.size if fit is not None else job.original,
        budget=job.budget,
        selected=tuple(job.layout.pieces[job.demonstrations[i]].index for i in job.selected),
        tokens_read=job.tokens_read,
        tokens_cached=job.tokens_cached,
        _decide=partial(decide, job, kept),
    )


def _keep_at_random(job: Job) -> None:
    """Stage 2 with chance in the place of surprisal."""
    while (request := job.iteration.request()) is not None:
        job.iteration.receive(job.random.random(len(request.segment), dtype=np.float32), from_model=False)
    job.iteration.surprisal[:] = np.nan

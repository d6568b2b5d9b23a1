"""The three stages, for many prompts at once (docs/algorithm.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.budget import BudgetController, Plan, allocate, otherwise, quotas_of, rank_weights
from terselm.compress.itpc import IterativeCompression
from terselm.compress.layout import Floats32, Layout, LayoutMaker
from terselm.compress.length import BudgetFit, Count, Length, TokenizerCounter, count_all, fit_all, smallest_budget
from terselm.compress.prompt import Part, Prompt
from terselm.compress.result import CompressionResult, DecisionArrays, Reason
from terselm.compress.settings import CompressionSettings, RankBy, Selection, UnitKind, settings_for
from terselm.errors import ConfigError
from terselm.models import CausalLM

if TYPE_CHECKING:
    from terselm.compress.engine.reader import ScoreReader
    from terselm.compress.ranking import Ranking
    from terselm.compress.relevance import Relevance, UnitScores, UtilityScores
    from terselm.compress.selection import RankedSelection
    from terselm.statistics import Floats, Ints

    StageTwo = IterativeCompression | RankedSelection

_CODE = {reason: code for code, reason in enumerate(Reason)}


@dataclass(kw_only=True)
class _Job:
    """A prompt that has to become shorter, and what is known of it.

    Attributes:
        settings: with what they leave open decided for this prompt.
        asks: what its demonstrations are ranked for.
        original, budget: tokens, as the caller counts them.
        read: surprisals of demonstrations by themselves, by number of the demonstration.
        ranks: other numbers in the place of perplexities: what demonstrations are worth for the question, or to the
            target, or random ones (an ablation).
        utilities: what all units are worth to the target, if they were read for that.
        tokens_read, tokens_cached: in Stage 1, or in Stage 3.
    """

    layout: Layout
    controller: BudgetController
    settings: CompressionSettings
    asks: str
    original: int
    budget: int
    read: dict[int, Floats32] = field(default_factory=dict)
    ranks: dict[int, float] | None = None
    utilities: UtilityScores | None = None
    tokens_read: int = 0
    tokens_cached: int = 0

    def perplexities(self) -> dict[int, float]:
        """By number of the demonstration, of those that were read."""
        if self.ranks is not None:
            return self.ranks
        means = {index: float(values.mean(dtype=np.float64)) for index, values in self.read.items()}
        return {index: float(np.exp(min(mean, 700.0))) for index, mean in means.items()}

    @property
    def is_ranked(self) -> bool:
        """Whether its demonstrations are ranked by something else than surprisal."""
        return self.settings.rank_by is not RankBy.SURPRISAL

    @property
    def is_read_for_use(self) -> bool:
        """Whether a utility head scores its units."""
        return self.settings.rank_by is RankBy.UTILITY

    @property
    def takes_units_by_rank(self) -> bool:
        """Whether its sentences or lines are ranked as its demonstrations are."""
        return self.settings.scores_units and not self.settings.contrast

    def charge(self, reading: Ranking | UnitScores | UtilityScores) -> None:
        """Count what the small LM read to rank by."""
        self.tokens_read += reading.tokens_read
        self.tokens_cached += reading.tokens_cached

    @cached_property
    def chance(self) -> np.random.Generator:
        """The same whenever the same prompt comes."""
        return np.random.default_rng(list(blake2b(self.layout.ids.tobytes(), digest_size=16).digest()))


class Pipeline:
    """Takes prompts through the stages under one set of settings.

    Args:
        reader: has the small LM read; several sets of settings may share it.

    Attributes:
        count: the small LM's own counter.

    Raises:
        ConfigError: the settings ask for a utility head that the small LM does not have.
    """

    def __init__(self, lm: CausalLM, settings: CompressionSettings, reader: ScoreReader) -> None:
        if settings.rank_by is RankBy.UTILITY and lm.utility is None:
            raise ConfigError(
                f"rank_by is utility, but {lm.name!r} was not aligned for use: it has no utility head; choose a "
                "checkpoint that has one, or rank_by auto"
            )
        self._settings = settings
        self._window = lm.window
        self._has_head = lm.utility is not None
        self._reader = reader
        self.count = TokenizerCounter(lm.tokenizer)
        self.layouts = LayoutMaker(self.count.backend, settings)

    def run(
        self,
        prompts: Sequence[Prompt],
        lengths: Sequence[Length],
        patterns: Sequence[re.Pattern[str]],
        counter: Count | None,
    ) -> list[CompressionResult]:
        """One result a prompt; see `PromptCompressor.compress_batch`.

        Args:
            patterns: what must survive.
            counter: the caller's; the small LM's if None.
        """
        count = counter or self.count
        chosen = [settings_for(prompt, self._settings, has_head=self._has_head) for prompt in prompts]
        layouts = self.layouts.make(prompts, patterns, [settings.unit for settings in chosen])
        originals = count_all(count, [layout.text(np.ones(len(layout), dtype=bool)) for layout in layouts])
        results: dict[int, CompressionResult] = {}
        jobs: dict[int, _Job] = {}
        for number, (prompt, layout, length, original) in enumerate(
            zip(prompts, layouts, lengths, originals, strict=True)
        ):
            budget = length.tokens(original, partial(smallest_budget, layout, count))
            if original <= budget:
                results[number] = _unchanged(layout, original, budget)
                continue
            tokens = budget if counter is None else budget * layout.total_tokens // max(1, original)
            over = partial(_excess, count, budget)
            settings = chosen[number]
            controller = allocate(layout, tokens, prompt, settings, over)
            if (other := otherwise(controller, settings, self._settings)) is not None:
                settings = other
                layout = self.layouts.make([prompt], patterns, [settings.unit])[0]
                controller = allocate(layout, tokens, prompt, settings, over)
            jobs[number] = _Job(
                layout=layout,
                controller=controller,
                settings=settings,
                asks=prompt.asks,
                original=original,
                budget=budget,
            )
        results |= zip(jobs, self._shorten(list(jobs.values()), count), strict=True)
        return [results[number] for number in range(len(prompts))]

    @cached_property
    def _relevance(self) -> Relevance:
        from terselm.compress.relevance import Relevance  # not every prompt is ranked

        return Relevance(self._settings, self.layouts.tokens_of, self._reader)

    def _shorten(self, jobs: Sequence[_Job], count: Count) -> list[CompressionResult]:
        self._read_demonstrations(jobs)
        plans = [job.controller.plan(job.perplexities()) for job in jobs]
        stages = self._stage_two(jobs, plans)
        fits = [
            BudgetFit(plan.layout, stage.kept, stage.margin, partial(self._spare, job, plan), job.budget, count)
            for job, plan, stage in zip(jobs, plans, stages, strict=True)
        ]
        fit_all(fits)
        return [_shortened(*each) for each in zip(jobs, plans, stages, fits, strict=True)]

    def _read_demonstrations(self, jobs: Sequence[_Job]) -> None:
        if self._settings.ablations.selection is Selection.RANDOM:
            for job in jobs:
                pieces = [job.layout.pieces[n] for n in job.layout.numbers(Part.DEMONSTRATION)]
                numbers = job.chance.random(len(pieces)).tolist()
                job.ranks = {piece.index: number for piece, number in zip(pieces, numbers, strict=True)}
            return
        self._read([job for job in jobs if not job.is_ranked and job.controller.needs_perplexities])
        self._read_for_use([job for job in jobs if job.is_read_for_use])
        asked = [job for job in jobs if job.is_ranked and not job.is_read_for_use]
        asked = [job for job in asked if len(job.layout.numbers(Part.DEMONSTRATION)) > 1]
        if not asked:
            return
        rankings = self._relevance.of_demonstrations([(job.asks, job.layout) for job in asked])
        for job, (scores, ranking) in zip(asked, rankings, strict=True):
            job.ranks = scores
            job.charge(ranking)

    def _read_for_use(self, jobs: Sequence[_Job]) -> None:
        """One pass over each prompt, which scores demonstrations and their units."""
        least = [1 if job.takes_units_by_rank else 2 for job in jobs]
        counts = [len(job.layout.numbers(Part.DEMONSTRATION)) for job in jobs]
        asked = [job for job, count, few in zip(jobs, counts, least, strict=True) if count >= few]
        if not asked:
            return
        cut = [job.layout if job.takes_units_by_rank else self._in_sentences(job.layout) for job in asked]
        pairs = [(job.asks, layout) for job, layout in zip(asked, cut, strict=True)]
        for job, utilities in zip(asked, self._relevance.by_utility(pairs), strict=True):
            job.utilities = utilities
            job.ranks = utilities.demonstrations
            job.charge(utilities)

    def _in_sentences(self, layout: Layout) -> Layout:
        """The demonstrations by themselves, cut into sentences or lines; they keep their numbers."""
        pieces = [layout.pieces[n] for n in layout.numbers(Part.DEMONSTRATION)]
        prompt = Prompt(demonstrations=[piece.text for piece in pieces])
        return replace(self.layouts.make([prompt], [], [UnitKind.AUTO])[0], pieces=pieces)

    def _read(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        for job, reading in zip(jobs, self._reader.read_demonstrations([job.layout for job in jobs]), strict=True):
            job.read = reading.surprisals
            job.tokens_read += reading.tokens_read
            job.tokens_cached += reading.tokens_cached

    def _stage_two(self, jobs: Sequence[_Job], plans: Sequence[Plan]) -> list[StageTwo]:
        """Stage 2 of each prompt, done."""
        scored = {number for number, job in enumerate(jobs) if job.settings.scores_units and plans[number].selected}
        iterations: dict[int, IterativeCompression] = {}
        for number, (job, plan) in enumerate(zip(jobs, plans, strict=True)):
            stage = self._iterations(job, plan, demonstrations=number not in scored)
            if number not in scored or stage.has_free_units:
                iterations[number] = stage
        if self._settings.ablations.random_tokens:
            for number, stage in iterations.items():
                jobs[number].layout = plans[number].layout
                _keep_at_random(stage, jobs[number].chance)
        else:
            self._reader.run_stage_two(list(iterations.values()))
        done: dict[int, StageTwo] = {**iterations}
        done |= self._choose_units({n: (jobs[n], plans[n], iterations.get(n)) for n in sorted(scored)})
        return [done[number] for number in range(len(jobs))]

    def _choose_units(
        self, jobs: Mapping[int, tuple[_Job, Plan, IterativeCompression | None]]
    ) -> dict[int, RankedSelection]:
        if not jobs:
            return {}
        from terselm.compress.selection import RankedSelection

        scored = self._score_units([(job, plan) for job, plan, _ in jobs.values()])
        done = {}
        for (number, (job, plan, others)), units in zip(jobs.items(), scored, strict=True):
            job.charge(units)
            quotas = None
            if job.settings.rank_delta:
                quotas = quotas_of(plan, rank_weights(plan, job.perplexities(), job.settings.rank_delta))
            done[number] = RankedSelection(
                plan.layout, plan.parts, plan.budgets, units.scores, units.parents, quotas=quotas, others=others
            )
        return done

    def _score_units(self, jobs: Sequence[tuple[_Job, Plan]]) -> list[UnitScores]:
        asked = [(job.asks, plan.layout, plan.selected, job.ranks or {}) for job, plan in jobs]
        if self._settings.contrast:
            return self._relevance.contrast([some[:3] for some in asked])
        read = [job.utilities.of(plan.layout, plan.selected) for job, plan in jobs if job.utilities is not None]
        return read or self._relevance.of_units(asked)  # the small LM has a head for all of them, or for none

    def _iterations(self, job: _Job, plan: Plan, *, demonstrations: bool) -> IterativeCompression:
        instruction, chosen, question = plan.parts
        weights = None
        if demonstrations and job.settings.rank_delta and plan.selected:
            weight = rank_weights(plan, job.perplexities(), job.settings.rank_delta)
            weights = np.array([weight.get(int(n), 1) for n in plan.layout.piece_of], dtype=np.int64)
        return IterativeCompression(
            plan.layout,
            [instruction, chosen if demonstrations else chosen[:0], question],
            plan.budgets,
            segment_size=job.settings.segment_size,
            window=self._window,
            one_pass=job.settings.ablations.one_pass,
            next_token=job.settings.ablations.next_token,
            weights=weights,
        )

    def _spare(self, job: _Job, plan: Plan) -> Ints:
        """What Stage 3 may take back of the demonstrations that were not selected: only now are these read."""
        if plan.left_out and not job.read and job.ranks is None:
            self._read([job])
        return plan.spare(job.perplexities())


def _excess(count: Count, budget: int, text: str) -> int:
    return count(text) - budget


def _keep_at_random(stage: IterativeCompression, chance: np.random.Generator) -> None:
    """Stage 2 with chance in the place of surprisal."""
    while (request := stage.request()) is not None:
        stage.receive(chance.random(len(request.segment), dtype=np.float32), from_model=False)
    stage.surprisal[:] = np.nan
    stage.tokens_cached = 0


def _unchanged(layout: Layout, original: int, budget: int) -> CompressionResult:
    """The result of a prompt that fits as it is."""
    size = len(layout)
    return CompressionResult(
        text=layout.text(np.ones(size, dtype=bool)),
        original_tokens=original,
        compressed_tokens=original,
        budget=budget,
        selected=tuple(layout.pieces[n].index for n in layout.numbers(Part.DEMONSTRATION)),
        tokens_read=0,
        tokens_cached=0,
        arrays=_arrays(layout, np.full(size, -1), np.full(size, np.nan), np.full(size, _CODE[Reason.UNCHANGED])),
    )


def _shortened(job: _Job, plan: Plan, stage: StageTwo, fit: BudgetFit) -> CompressionResult:
    layout, kept = plan.layout, fit.kept
    reasons = np.where(stage.segment_of >= 0, _CODE[Reason.BELOW_THRESHOLD], _CODE[Reason.DEMONSTRATION_DROPPED])
    reasons[stage.kept] = _CODE[Reason.OVER_BUDGET]
    reasons[kept] = np.where(stage.kept[kept], _CODE[Reason.ABOVE_THRESHOLD], _CODE[Reason.TAKEN_BACK])
    reasons[layout.protected] = _CODE[Reason.PROTECTED]
    return CompressionResult(
        text=fit.text,
        original_tokens=job.original,
        compressed_tokens=fit.size,
        budget=job.budget,
        selected=tuple(layout.pieces[n].index for n in plan.selected),
        tokens_read=job.tokens_read + stage.tokens_read,
        tokens_cached=job.tokens_cached + stage.tokens_cached,
        arrays=_arrays(layout, stage.segment_of, _surprisals(job, layout, stage), reasons),
    )


def _surprisals(job: _Job, layout: Layout, stage: StageTwo) -> Floats:
    """``(n_units,)``, nats: given what was kept before, else in the demonstration by itself, else NaN."""
    surprisal = np.full(len(layout), np.nan)
    for number in layout.numbers(Part.DEMONSTRATION):
        if (tokens := job.read.get(layout.pieces[number].index)) is not None:
            low, high = layout.edges[number], layout.edges[number + 1]
            surprisal[low:high] = np.add.reduceat(tokens.astype(np.float64), layout.first[low:high] - layout.first[low])
    return np.where(np.isnan(stage.surprisal), surprisal, stage.surprisal)


def _arrays(layout: Layout, segments: Ints, surprisals: Floats, reasons: Ints) -> DecisionArrays:
    return DecisionArrays(
        pieces=layout.pieces,
        edges=layout.edges,
        ends=layout.ends,
        costs=layout.cost,
        segments=segments,
        surprisals=surprisals,
        reasons=reasons,
    )

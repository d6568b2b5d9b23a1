"""The compressor: the three stages, for many prompts at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from terselm.compress.budget import BudgetController
from terselm.compress.counter import Count, tokenizer_counter
from terselm.compress.fit import fit_budget, smallest_budget
from terselm.compress.itpc import IterativeCompression
from terselm.compress.job import Job, decide
from terselm.compress.layout import Layout, build_layout
from terselm.compress.prompt import Part, Prompt
from terselm.compress.protect import Keep, compile_keep
from terselm.compress.result import CompressionResult
from terselm.compress.settings import CompressionSettings, UnitKind
from terselm.compress.surprisal import SurprisalEngine
from terselm.compress.target import check_target
from terselm.compress.units import Ints, Units, cut_units, merge_words
from terselm.errors import BudgetError, PromptError
from terselm.models import CausalLM, load_causal_lm


class PromptCompressor:
    """Shortens prompts with a small LM.

    Args:
        lm: the small LM.
        settings: how to compress.
    """

    def __init__(self, lm: CausalLM, *, settings: CompressionSettings | None = None) -> None:
        self.settings = settings or CompressionSettings()
        self.lm = lm
        self._engine = SurprisalEngine(lm)
        self._own_count = tokenizer_counter(lm.tokenizer)
        self._separator_ids: list[int] = self._tokenize([self.settings.separator])[0].ids.tolist()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        settings: CompressionSettings | None = None,
    ) -> PromptCompressor:
        """Load the small LM by alias, folder, run folder, adapter or hub id; see `load_causal_lm`."""
        return cls(load_causal_lm(name, device=device, dtype=dtype), settings=settings)

    def compress(
        self,
        *,
        instruction: str = "",
        demonstrations: Sequence[str] = (),
        question: str = "",
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | None = None,
    ) -> CompressionResult:
        """Compress one prompt; see `compress_batch`."""
        prompt = Prompt(instruction=instruction, demonstrations=demonstrations, question=question)
        return self.compress_batch([prompt], budget=budget, rate=rate, keep=keep, counter=counter)[0]

    def compress_text(
        self,
        text: str,
        *,
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | None = None,
    ) -> CompressionResult:
        """Compress a text that has no parts: it is treated as one demonstration."""
        return self.compress(demonstrations=[text], budget=budget, rate=rate, keep=keep, counter=counter)

    def compress_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | None = None,
    ) -> list[CompressionResult]:
        """Compress many prompts together.

        Args:
            budget: tokens allowed, as ``counter`` counts them.
            rate: instead, the fraction of each prompt's tokens to keep, in (0, 1].
            keep: what must survive: literal strings, compiled regular expressions, `Preset`.
            counter: tokens of a text as the caller counts them; by default the small LM's.

        Raises:
            PromptError: a prompt is empty.
            BudgetError: both or neither of budget and rate, one out of range, or a budget that cannot be met.
            ConfigError: an unusable ``keep``.
            ContextLengthError: a segment that does not fit into the model's window.
        """
        check_target(budget, rate)
        patterns = compile_keep(keep)
        count = counter or self._own_count
        units = self._cut([piece.text for prompt in prompts for piece in prompt.pieces()])
        jobs = [self._job(prompt, units, patterns, budget, rate, count, counter is None) for prompt in prompts]
        active = [job for job in jobs if job.original > job.budget]
        self._read_demonstrations([job for job in active if job.controller.needs_perplexity])
        for job in active:
            job.plan = job.controller.plan(job.perplexities())
            job.stage = self._stage_two(job)
        self._advance([job.stage for job in active if job.stage is not None])
        return [self._finish(job, count) for job in jobs]

    def _job(
        self,
        prompt: Prompt,
        units: dict[str, Units],
        patterns: Sequence[re.Pattern[str]],
        budget: int | None,
        rate: float | None,
        count: Count,
        own: bool,
    ) -> Job:
        settings = self.settings
        pieces = prompt.pieces()
        layout = build_layout(
            pieces,
            [units[piece.text] for piece in pieces],
            patterns=patterns,
            protected_parts=[
                part
                for part, kept in (
                    (Part.INSTRUCTION, settings.instruction_rate),
                    (Part.QUESTION, settings.question_rate),
                )
                if kept == 1
            ],
            separator=settings.separator,
            separator_ids=self._separator_ids,
        )
        if not len(layout):
            raise PromptError("the prompt is empty; give an instruction, demonstrations or a question")
        original = count(layout.text(np.ones(len(layout), dtype=bool)))
        target = budget if budget is not None else math.floor((rate or 0) * original)
        if target < min(1, original):
            smallest = smallest_budget(layout, count)
            raise BudgetError(
                f"a rate of {rate} leaves none of {original} tokens; the smallest budget that could work is {smallest}",
                smallest=smallest,
            )
        small = target if own else math.floor(target * layout.total_tokens / max(1, original))
        return Job(
            layout=layout, controller=self._controller(layout, small), original=original, budget=target, coarse={}
        )

    def _controller(self, layout: Layout, budget: int) -> BudgetController:
        numbers = {part: layout.numbers(part) for part in Part}
        always = {n for part in (Part.INSTRUCTION, Part.QUESTION) for n in numbers[part]}
        always |= {n for n in numbers[Part.DEMONSTRATION] if layout.holds_protected(n)}

        def separators(selected: Collection[int]) -> int:
            pieces = always | {numbers[Part.DEMONSTRATION][i] for i in selected}
            return len(layout.separator_ids) * max(0, len(pieces) - 1)

        return BudgetController(
            budget=budget - int(layout.cost[layout.protected].sum()),
            instruction=sum(map(layout.free_tokens, numbers[Part.INSTRUCTION])),
            question=sum(map(layout.free_tokens, numbers[Part.QUESTION])),
            demonstrations=[layout.free_tokens(n) for n in numbers[Part.DEMONSTRATION]],
            separators=separators,
            k=self.settings.k,
            instruction_rate=self.settings.instruction_rate,
            question_rate=self.settings.question_rate,
        )

    def _read_demonstrations(self, jobs: Sequence[Job]) -> None:
        """Coarse surprisals of all demonstrations of all these prompts, each distinct text once."""
        wanted = {job.layout.pieces[n].text: job.layout.piece_ids(n) for job in jobs for n in job.demonstrations}
        scores = dict(zip(wanted, self._engine.score_texts(list(wanted.values())), strict=True))
        for job in jobs:
            job.coarse = {n: scores[job.layout.pieces[n].text] for n in job.demonstrations}

    def _stage_two(self, job: Job) -> IterativeCompression:
        layout, plan = job.layout, job.plan
        assert plan is not None
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
        return IterativeCompression(layout, parts, budgets, self.settings.segment_size, self._engine.window)

    def _advance(self, stages: Sequence[IterativeCompression]) -> None:
        """Run Stage 2 of all prompts: together, but for those that may outgrow the window."""
        long = [stage for stage in stages if stage.longest > self._engine.window]
        for group in [[stage for stage in stages if stage.longest <= self._engine.window], *([one] for one in long)]:
            session = self._engine.session(len(group))
            rows = list(group)
            while rows:
                requests = [stage.request() for stage in rows]
                going = [row for row, request in enumerate(requests) if request is not None]
                if going and len(going) < len(rows):
                    session.select(going)
                rows = [rows[row] for row in going]
                if rows:
                    scored = session.step([request for request in requests if request is not None])
                    for stage, surprisals in zip(rows, scored, strict=True):
                        stage.receive(surprisals)

    def _finish(self, job: Job, count: Count) -> CompressionResult:
        layout, stage = job.layout, job.stage
        if stage is None:
            everything = np.ones(len(layout), dtype=bool)
            return CompressionResult(
                text=layout.text(everything),
                original_tokens=job.original,
                compressed_tokens=job.original,
                budget=job.budget,
                selected=tuple(layout.pieces[n].index for n in job.demonstrations),
                _decide=partial(decide, job, everything),
            )
        kept, text, size = fit_budget(layout, stage.kept, stage.margin, self._spare(job), job.budget, count)
        assert job.plan is not None
        return CompressionResult(
            text=text,
            original_tokens=job.original,
            compressed_tokens=size,
            budget=job.budget,
            selected=tuple(layout.pieces[job.demonstrations[i]].index for i in job.plan.selected),
            _decide=partial(decide, job, kept),
        )

    def _spare(self, job: Job) -> Callable[[], Ints]:
        """The free units of the demonstrations that were not selected, in descending order of perplexity."""

        def spare() -> Ints:
            assert job.plan is not None
            if not job.coarse and len(job.plan.selected) < len(job.demonstrations):
                self._read_demonstrations([job])
            perplexities = job.perplexities()
            left = [i for i in range(len(job.demonstrations)) if i not in set(job.plan.selected)]
            left.sort(key=lambda i: (-perplexities[i], i))
            units = [
                np.arange(job.layout.edges[n], job.layout.edges[n + 1]) for n in (job.demonstrations[i] for i in left)
            ]
            flat = np.concatenate([np.zeros(0, dtype=np.int64), *units])
            free: Ints = flat[~job.layout.protected[flat]]
            return free

        return spare

    def _cut(self, texts: Sequence[str]) -> dict[str, Units]:
        distinct = list(dict.fromkeys(texts))
        cut = self._tokenize(distinct)
        if self.settings.unit is UnitKind.WORD:
            cut = [merge_words(units, text) for units, text in zip(cut, distinct, strict=True)]
        return dict(zip(distinct, cut, strict=True))

    def _tokenize(self, texts: Sequence[str]) -> list[Units]:
        if not texts:
            return []
        encoded = self.lm.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        return [
            cut_units(ids, offsets, text)
            for ids, offsets, text in zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True)
        ]

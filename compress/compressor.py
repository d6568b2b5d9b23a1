"""The compressor: the three stages, for many prompts at once."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from terselm.compress.budget import BudgetPlan
from terselm.compress.counter import Count, resolve_counter
from terselm.compress.fit import BudgetFit, fit_all
from terselm.compress.itpc import IterativeCompression
from terselm.compress.job import Job, decide
from terselm.compress.messages import ChatResult, compress_chat
from terselm.compress.prepare import Preparer
from terselm.compress.prompt import Part, Prompt
from terselm.compress.protect import Keep, compile_keep
from terselm.compress.reader import Reader
from terselm.compress.result import CompressionResult
from terselm.compress.settings import CompressionSettings, Order, Selection
from terselm.compress.surprisal import SurprisalEngine
from terselm.compress.target import Target, targets
from terselm.compress.units import Ints
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
        self._preparer = Preparer(lm, self.settings)
        self._engine = SurprisalEngine(lm)
        self._reader = Reader(self._engine, self.settings.cache_bytes)

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

    def with_settings(self, settings: CompressionSettings) -> PromptCompressor:
        """The same small LM under other settings; what it has read stays known, so ``cache_bytes`` is as before."""
        other = copy.copy(self)
        other.settings = settings
        other._preparer = Preparer(self.lm, settings)
        return other

    def compress(
        self,
        *,
        instruction: str = "",
        demonstrations: Sequence[str] = (),
        question: str = "",
        pinned: Sequence[int] = (),
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> CompressionResult:
        """Compress one prompt; see `Prompt` and `compress_batch`."""
        prompt = Prompt(instruction=instruction, demonstrations=demonstrations, question=question, pinned=pinned)
        return self.compress_batch([prompt], budget=budget, rate=rate, keep=keep, counter=counter)[0]

    def compress_text(
        self,
        text: str,
        *,
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> CompressionResult:
        """Compress a text that has no parts: it is treated as one demonstration."""
        return self.compress(demonstrations=[text], budget=budget, rate=rate, keep=keep, counter=counter)

    def compress_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> ChatResult:
        """Compress chat messages in OpenAI's form; roles, names, tool calls and attachments stay as they are.

        The system's first message is the instruction, the user's last one the question, each turn between them a
        demonstration. See `compress_batch` for the arguments; the budget is for all texts together.
        """
        Target(budget=budget, rate=rate)
        count = resolve_counter(counter) or self._preparer.count

        def compress(prompt: Prompt, tokens: int) -> CompressionResult:
            own = None if counter is None else count
            return self.compress_batch([prompt], budget=tokens, keep=keep, counter=own)[0]

        return compress_chat(messages, compress, count, budget=budget, rate=rate)

    def compress_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        budget: int | Sequence[int] | None = None,
        rate: float | Sequence[float] | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> list[CompressionResult]:
        """Compress many prompts together.

        Args:
            budget: tokens allowed, as ``counter`` counts them; one number for all prompts or one for each.
            rate: instead, the fraction of each prompt's tokens to keep, in (0, 1].
            keep: what must survive: literal strings, compiled regular expressions, `Preset`.
            counter: tokens of a text as the caller counts them: a name (``cl100k_base``, ``gpt-4o``, what
                `load_tokenizer` takes) or a callable; by default the small LM's.

        Raises:
            PromptError: a prompt is empty.
            BudgetError: both or neither of budget and rate, one out of range, or a budget that cannot be met.
            ConfigError: an unusable ``keep``.
            ContextLengthError: a segment that does not fit into the model's window.
        """
        each = targets(len(prompts), budget, rate)
        jobs = self._preparer.prepare(prompts, each, compile_keep(keep), resolve_counter(counter))
        active = [job for job in jobs if job.original > job.budget]
        self._rank_demonstrations(active)
        for job in active:
            job.plan = job.controller.plan(job.perplexities())
            job.stage = self._stage_two(job, job.plan)
        if self.settings.ablations.random_tokens:
            for job in active:
                _keep_at_random(job)
        else:
            self._reader.run_stage_two(active)
        fits = [self._fit(job) if job.stage is not None else None for job in jobs]
        fit_all([fit for fit in fits if fit is not None])
        return [_result(job, fit) for job, fit in zip(jobs, fits, strict=True)]

    def warm_up(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        budget: int | Sequence[int] | None = None,
        rate: float | Sequence[float] | None = None,
    ) -> float:
        """Do now what would slow the first prompts down: set libraries up and, on a GPU, record passes.

        A pass is recorded once for each shape, about a tenth of a second each on an H200, so warm up with prompts as
        long, and as many at once, as those that will come. Nothing of them is remembered.

        Args:
            prompts: compressed together, twice; by default one few-shot prompt of 2,000 tokens.
            budget, rate: see `compress_batch`; by default a rate of 0.1.

        Returns:
            the seconds that it took.
        """
        started = time.perf_counter()
        prompts = prompts or [_usual_prompt()]
        if budget is None and rate is None:
            rate = 0.1
        other = copy.copy(self)
        other._reader = Reader(self._engine, 0)
        for _ in range(2):
            other.compress_batch(prompts, budget=budget, rate=rate)
        return time.perf_counter() - started

    def _rank_demonstrations(self, jobs: Sequence[Job]) -> None:
        if self.settings.ablations.selection is Selection.RANDOM:
            for job in jobs:
                job.ranks = job.random.random(len(job.demonstrations)).tolist()
        else:
            ranked = self.settings.order is Order.RANKED
            self._reader.read_demonstrations(
                [job for job in jobs if job.controller.needs_perplexity or (ranked and len(job.demonstrations) > 1)]
            )
        if self.settings.order is Order.RANKED:
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
            segment_size=self.settings.segment_size,
            window=self.lm.window,
            one_pass=self.settings.ablations.one_pass,
            next_token=self.settings.ablations.next_token,
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


def _usual_prompt() -> Prompt:
    import json
    from importlib.resources import files

    return Prompt(**json.loads((files("terselm.data") / "sample/prompts/few_shot_maths.json").read_text("utf-8")))


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

"""From a prompt to a job: tokenise, cut into units, count, set up the budget controller."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from terselm.compress.anchor import anchor_for, keep_anchor
from terselm.compress.budget import BudgetController
from terselm.compress.counter import Count, TokenizerCounter, count_all
from terselm.compress.job import Job
from terselm.compress.layout import Layout, build_layout
from terselm.compress.prompt import Part, Piece, Prompt
from terselm.compress.settings import (
    PAPER_INSTRUCTION_RATE,
    PAPER_QUESTION_RATE,
    Ablations,
    AnchorOrder,
    CompressionSettings,
    Selection,
    UnitKind,
)
from terselm.compress.target import Target
from terselm.compress.units import Units, cut_units, merge_all, merge_lines, merge_sentences, merge_words
from terselm.errors import PromptError
from terselm.models import CausalLM

_MERGE = {
    UnitKind.WORD: merge_words,
    UnitKind.SENTENCE: merge_sentences,
    UnitKind.LINE: merge_lines,
    UnitKind.DEMONSTRATION: merge_all,
}


class Preparer:
    """Prepares prompts for one small LM under one set of settings."""

    def __init__(self, lm: CausalLM, settings: CompressionSettings) -> None:
        self._settings = settings
        self.count = TokenizerCounter(lm.tokenizer)
        self._separator_ids: list[int] = self._tokenize([settings.separator])[0].ids.tolist()
        rates = {Part.QUESTION: settings.question_rate, Part.INSTRUCTION: settings.instruction_rate}
        self._protected_parts = [part for part, rate in rates.items() if rate == 1]
        self._anchor_share = settings.anchor
        if settings.anchor is None and settings.ablations != Ablations():
            self._anchor_share = 0.0  # there would be nothing to take parts from
        self._whole_if_it_fits = [
            part for part, rate in rates.items() if rate is None and not settings.ablations.uniform_rates
        ]

    def prepare(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[Target],
        patterns: Sequence[re.Pattern[str]],
        counter: Count | None,
    ) -> list[Job]:
        """One job a prompt; each distinct text is tokenised once.

        Args:
            counter: the caller's; the small LM's if None.

        Raises:
            PromptError: a prompt is empty.
            BudgetError: a rate that leaves nothing.
        """
        units = self._cut([piece for prompt in prompts for piece in prompt.pieces()])
        layouts = [self._layout(prompt, units, patterns) for prompt in prompts]
        count = counter or self.count
        originals = count_all(count, [layout.text(np.ones(len(layout), dtype=bool)) for layout in layouts])
        jobs = []
        for prompt, layout, target, original in zip(prompts, layouts, targets, originals, strict=True):
            budget = target.tokens(original, layout, count)
            small = budget if counter is None else budget * layout.total_tokens // max(1, original)
            over = partial(_excess, count, budget)
            layout = self._keep_whole(layout, small, over)
            anchor = anchor_for(prompt) if self._anchor_share is None else self._anchor_share
            controller = self._controller(layout, small, prompt.pinned)
            if anchor:
                layout = self._anchor(layout, anchor, controller, over)
                controller = self._controller(layout, small, prompt.pinned, anchor_only=anchor == 1)
            jobs.append(Job(layout=layout, controller=controller, count=count, original=original, budget=budget))
        return jobs

    def rank(self, job: Job) -> None:
        """Put the demonstrations of a job whose perplexities are known in descending order of these."""
        old, perplexities = job.layout, job.perplexities()
        order = sorted(range(len(job.demonstrations)), key=lambda i: (-perplexities[i], i))
        numbers = [
            *old.numbers(Part.INSTRUCTION),
            *(job.demonstrations[i] for i in order),
            *old.numbers(Part.QUESTION),
        ]
        budget = job.controller.budget + int(old.cost[old.protected].sum())
        pinned = [old.pieces[job.demonstrations[i]].index for i in job.controller.pinned]
        layout = old.reordered(numbers)
        anchor_only = not any(job.controller.demonstrations)
        job.layout, job.controller = layout, self._controller(layout, budget, pinned, anchor_only=anchor_only)
        job.coarse = {numbers.index(n): values for n, values in job.coarse.items()}
        if job.ranks is not None:
            job.ranks = [job.ranks[i] for i in order]

    def _keep_whole(self, layout: Layout, budget: int, over: Callable[[str], int]) -> Layout:
        """Protect question and instruction, or the question, where that leaves the other its rate."""
        wanted = self._whole_if_it_fits
        for parts in dict.fromkeys((tuple(wanted), tuple(wanted[:1]))) if wanted else ():
            pieces = [number for part in parts for number in layout.numbers(part)]
            protected = layout.protected | np.isin(layout.piece_of, pieces)
            whole = replace(layout, protected=protected)
            if over(whole.text(protected)) <= 0 and self._controller(whole, budget, ()).left >= 0:
                return whole
        return layout

    def _anchor(self, layout: Layout, share: float, controller: BudgetController, over: Callable[[str], int]) -> Layout:
        room = math.floor(share * controller.left)
        pieces = layout.numbers(Part.DEMONSTRATION)[::-1]
        if self._settings.anchor_by is AnchorOrder.SHORTEST:
            pieces.sort(key=layout.free_tokens)  # stable: of equals, the later first
        pinned = {layout.numbers(Part.DEMONSTRATION)[i] for i in controller.pinned}
        pieces.sort(key=lambda n: n not in pinned)
        return keep_anchor(layout, pieces, room, over)

    def _layout(
        self, prompt: Prompt, units: dict[tuple[str, UnitKind], Units], patterns: Sequence[re.Pattern[str]]
    ) -> Layout:
        pieces = prompt.pieces()
        layout = build_layout(
            pieces,
            [units[piece.text, self._kind(piece)] for piece in pieces],
            patterns=patterns,
            protected_parts=self._protected_parts,
            separator=self._settings.separator,
            separator_ids=self._separator_ids,
        )
        if not len(layout):
            raise PromptError("the prompt is empty; give an instruction, demonstrations or a question")
        return layout

    def _controller(
        self, layout: Layout, budget: int, pinned: Collection[int], *, anchor_only: bool = False
    ) -> BudgetController:
        numbers = {part: layout.numbers(part) for part in Part}
        always = {*numbers[Part.INSTRUCTION], *numbers[Part.QUESTION]}
        always |= {n for n in numbers[Part.DEMONSTRATION] if layout.holds_protected(n)}

        def separators(selected: Collection[int]) -> int:
            pieces = always | {numbers[Part.DEMONSTRATION][i] for i in selected}
            return len(layout.separator_ids) * max(0, len(pieces) - 1)

        settings = self._settings
        free_budget = budget - int(layout.cost[layout.protected].sum())
        free = {part: [layout.free_tokens(n) for n in numbers[part]] for part in Part}
        rates = settings.instruction_rate or PAPER_INSTRUCTION_RATE, settings.question_rate or PAPER_QUESTION_RATE
        if settings.ablations.uniform_rates:
            total = sum(map(sum, free.values()))
            rates = (min(1.0, max(0.0, free_budget / total)) if total else 1.0,) * 2
        return BudgetController(
            budget=free_budget,
            instruction=sum(free[Part.INSTRUCTION]),
            question=sum(free[Part.QUESTION]),
            demonstrations=[0] * len(free[Part.DEMONSTRATION]) if anchor_only else free[Part.DEMONSTRATION],
            separators=separators,
            k=settings.k,
            instruction_rate=rates[0],
            question_rate=rates[1],
            pinned=[i for i, n in enumerate(numbers[Part.DEMONSTRATION]) if layout.pieces[n].index in pinned],
            select_all=settings.ablations.selection is Selection.ALL,
            whole=settings.unit is UnitKind.DEMONSTRATION,
        )

    def _cut(self, pieces: Sequence[Piece]) -> dict[tuple[str, UnitKind], Units]:
        """The units of each distinct text."""
        texts = list(dict.fromkeys(piece.text for piece in pieces))
        tokens = dict(zip(texts, self._tokenize(texts), strict=True))
        wanted = {(piece.text, self._kind(piece)) for piece in pieces}
        return {
            (text, kind): _MERGE[kind](tokens[text], text) if kind in _MERGE else tokens[text] for text, kind in wanted
        }

    def _kind(self, piece: Piece) -> UnitKind:
        unit = self._settings.unit
        if piece.part is Part.DEMONSTRATION or unit is UnitKind.TOKEN:
            return unit
        return UnitKind.WORD

    def _tokenize(self, texts: Sequence[str]) -> list[Units]:
        if not texts:
            return []
        encodings = self.count.backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            cut_units(encoding.ids, encoding.offsets, text) for encoding, text in zip(encodings, texts, strict=True)
        ]


def _excess(count: Count, budget: int, text: str) -> int:
    return count(text) - budget

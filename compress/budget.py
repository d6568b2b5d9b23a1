"""Stage 1: the budget controller (docs/algorithm.md, §1). Plain arithmetic on token counts.

Source: Algorithm 1, Eq. 2–3 of arXiv:2310.05736.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What Stage 2 may keep, in free tokens of the small LM.

    Attributes:
        selected: the demonstrations that take part, ascending.
        instruction, demonstrations, question: the budget of each part.
    """

    selected: tuple[int, ...]
    instruction: int
    demonstrations: int
    question: int


@dataclass(frozen=True, kw_only=True)
class BudgetController:
    """Divides a budget among the parts of one prompt.

    Attributes:
        budget: T′ − P, the tokens left once protected text is paid for; may be negative.
        instruction, question: free tokens of these parts.
        demonstrations: free tokens of each demonstration.
        separators: tokens of the separators between the parts that take part, for a set of selected demonstrations.
        k, instruction_rate, question_rate: see `CompressionSettings`.
        pinned: demonstrations that are selected ahead of all others.
        select_all: every demonstration takes part (an ablation).
        whole: demonstrations are selected only while they fit uncut, and nothing of the others is kept.
    """

    budget: int
    instruction: int
    question: int
    demonstrations: Sequence[int]
    separators: Callable[[Collection[int]], int]
    k: float
    instruction_rate: float
    question_rate: float
    pinned: Collection[int] = ()
    select_all: bool = False
    whole: bool = False

    @cached_property
    def _need(self) -> float:
        return self.instruction_rate * self.instruction + self.question_rate * self.question

    @cached_property
    def _total(self) -> int:
        return sum(self.demonstrations)

    @cached_property
    def _rate(self) -> float:
        """τ_dems of Eq. 2."""
        return max(0.0, (self.budget - self._need) / self._total) if self._total else 0.0

    @cached_property
    def _eligible(self) -> list[int]:
        return [i for i, length in enumerate(self.demonstrations) if length]

    def _room(self, selected: Collection[int]) -> int:
        return max(0, self.budget - self.separators(selected))

    @property
    def left(self) -> float:
        """Tokens for demonstrations once instruction and question have their rates; may be negative."""
        return self._room(()) - self._need

    @property
    def needs_perplexity(self) -> bool:
        """False where the selection is the same for any order of the demonstrations."""
        ranked = sum(i not in self.pinned for i in self._eligible)
        if self.select_all or self._rate == 0 or ranked < 2:
            return False
        if self.whole:
            return not self._fits(self._eligible)
        all_fit = self.k * self._rate * self._total >= self._total
        return not (all_fit and self._room(self._eligible) - self._need >= len(self._eligible))

    def plan(self, perplexities: Sequence[float]) -> BudgetPlan:
        """Select demonstrations and give each part its budget.

        Args:
            perplexities: one per demonstration; any numbers where `needs_perplexity` is false.
        """
        selected = self._select(perplexities)
        room = self._room(selected)
        if selected or room >= self._need:
            instruction, demonstrations, question = self._share(selected, room)
        else:
            instruction, question = self._scale_down(room)
            demonstrations = 0
        return BudgetPlan(
            selected=tuple(sorted(selected)), instruction=instruction, demonstrations=demonstrations, question=question
        )

    def _select(self, perplexities: Sequence[float]) -> list[int]:
        if self.select_all:
            return self._eligible
        if self._rate == 0:
            return []
        if self.whole:
            return self._select_whole(perplexities)
        limit = self.k * self._rate * self._total
        selected: list[int] = []
        length = 0
        for i in self._ranked(perplexities):
            if length > limit and i not in self.pinned:
                break
            selected.append(i)
            length += self.demonstrations[i]
        while selected and self._room(selected) - self._need < len(selected):
            selected.pop()
        return selected

    def _select_whole(self, perplexities: Sequence[float]) -> list[int]:
        selected: list[int] = []
        for i in self._ranked(perplexities):
            if self._fits([*selected, i]):
                selected.append(i)
        return selected

    def _fits(self, selected: Sequence[int]) -> bool:
        return self._room(selected) - self._need >= sum(self.demonstrations[i] for i in selected)

    def _ranked(self, perplexities: Sequence[float]) -> list[int]:
        return sorted(self._eligible, key=lambda i: (0, 0.0, i) if i in self.pinned else (1, -perplexities[i], i))

    def _share(self, selected: Sequence[int], room: int) -> tuple[int, int, int]:
        """Budgets of instruction, demonstrations, question: Eq. 3, with the leftover divided by k.

        Note:
            The paper hands out k·τ_dems·L_dems − L_D coarse tokens although Stage 2 thins the demonstrations by 1/k,
            which overshoots the budget. We hand out that over k, so that the three budgets add up to ``room``.
        """
        length = sum(self.demonstrations[i] for i in selected)
        leftover = room - self._need
        if selected:
            leftover = max(0.0, leftover - length if self.whole else self._rate * self._total - length / self.k)
        rest = self.instruction + self.question
        extra = leftover / rest if rest else 0.0
        instruction = _round(min(1.0, self.instruction_rate + extra) * self.instruction)
        question = _round(min(1.0, self.question_rate + extra) * self.question)
        demonstrations = room - instruction - question
        least = length if self.whole and self._fits(selected) else 0
        if demonstrations < least:
            taken = min(question, least - demonstrations)
            question -= taken
            instruction = max(0, instruction + demonstrations - least + taken)
            demonstrations = least
        excess = max(0, demonstrations - length)
        demonstrations -= excess
        given = min(excess, self.instruction - instruction)
        instruction += given
        question = min(self.question, question + excess - given)
        return instruction, demonstrations, question

    def _scale_down(self, room: int) -> tuple[int, int]:
        """Budgets of instruction and question where even their own rates cannot be paid."""
        instruction = _round(room * self.instruction_rate * self.instruction / self._need)
        question = room - instruction
        if instruction > self.instruction:
            instruction, question = self.instruction, question + instruction - self.instruction
        if question > self.question:
            instruction, question = min(self.instruction, instruction + question - self.question), self.question
        return instruction, question


def _round(x: float) -> int:
    return math.floor(x + 0.5)

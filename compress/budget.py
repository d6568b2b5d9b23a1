"""Stage 1: the budget controller (docs/algorithm.md, §0 "whole" and §1). Plain arithmetic on token counts.

What is kept whole comes first: question and instruction, then an anchor of demonstrations. What is left is divided
among the parts, by the perplexities of the demonstrations.

Source: Algorithm 1, Eq. 2–3 of arXiv:2310.05736.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.layout import Layout, Mask
from terselm.compress.prompt import Part, Prompt, labels_of, most_similar
from terselm.compress.settings import (
    EXAMPLES_ANCHOR,
    PAPER_INSTRUCTION_RATE,
    PAPER_QUESTION_RATE,
    AnchorOrder,
    CompressionSettings,
    Order,
    RankBy,
    Selection,
    UnitKind,
)

if TYPE_CHECKING:
    from terselm.statistics import Ints

_FINE = 1_000_000  # weights are whole numbers, so that budgets divide exactly
Perplexities = Mapping[int, float]
"""By number of the demonstration in the prompt; 0 where it was not read. Or other numbers that rank demonstrations."""


def allocate(
    layout: Layout, tokens: int, prompt: Prompt, settings: CompressionSettings, over: Callable[[str], int]
) -> BudgetController:
    """Protect what is kept whole, and set up the division of the rest.

    Args:
        tokens: T′, the budget in tokens of the small LM.
        prompt: what ``layout`` is of.
        over: by how many of the caller's tokens a text exceeds the budget.
    """
    controller = partial(BudgetController, layout, tokens, prompt.pinned, settings)
    begun = _keep_whole(layout, settings, controller, over)
    share = settings.anchor
    assert share is not None, "the settings are those of `settings_for`"
    if not share:
        return begun
    room = math.floor(share * begun.left)
    order = begun.anchor_order()
    if settings.anchor_by is AnchorOrder.AUTO:
        order = begun.useful_first(order, prompt.question, room)
    anchored = _keep_anchor(layout, order, room, begun.protected, over)
    return controller(anchored, anchor_only=share == 1)


def otherwise(
    controller: BudgetController, settings: CompressionSettings, asked: CompressionSettings
) -> CompressionSettings | None:
    """Other settings where those that the prompt alone decided do not suit its budget; None where they do.

    Worked examples are thinned by lines where not even half of one fits: so short an end shows a target little. But not
    where most have two lines: questions without their answers show it nothing.
    Where not even one sentence or line fits, demonstrations are thinned by tokens.

    Args:
        controller: with ``settings``, which `settings_for` made of ``asked``.
    """
    if not asked.leaves_thinning_open or asked.rank_by is not RankBy.AUTO:
        return None
    if settings.anchor == EXAMPLES_ANCHOR and not controller.holds_half_a_demonstration and controller.has_many_lines:
        return replace(settings, unit=UnitKind.LINE, anchor=0.0)
    if settings.unit is UnitKind.AUTO and not controller.fits_any():
        return replace(settings.without_question(), unit=UnitKind.TOKEN)
    return None


def _keep_whole(
    layout: Layout,
    settings: CompressionSettings,
    controller: Callable[[Mask], BudgetController],
    over: Callable[[str], int],
) -> BudgetController:
    """Protect question and instruction, or the question, where that leaves the other its rate."""
    rates = {Part.QUESTION: settings.question_rate, Part.INSTRUCTION: settings.instruction_rate}
    open_parts = [part for part, rate in rates.items() if rate is None and not settings.ablations.uniform_rates]
    for parts in dict.fromkeys((tuple(open_parts), tuple(open_parts[:1]))) if open_parts else ():
        pieces = [number for part in parts for number in layout.numbers(part)]
        protected = layout.protected | np.isin(layout.piece_of, pieces)
        if over(layout.text(protected)) <= 0 and (whole := controller(protected)).left >= 0:
            return whole
    return controller(layout.protected)


def _keep_anchor(layout: Layout, pieces: Sequence[int], room: int, protected: Mask, over: Callable[[str], int]) -> Mask:
    """Protect demonstrations that cost at most ``room``, separators included, and of one that does not fit its end.

    Args:
        pieces: the demonstrations, in the order in which they are taken.
        room: tokens of the small LM.
        protected: ``(n_units,)``, what is protected already.
        over: by how many of the caller's tokens a text exceeds the budget; units leave the anchor until it does not.
    """
    units = layout.units_of(pieces, backwards=True)
    opens = np.zeros(len(units), dtype=np.int64)  # 1 at those that bring a new piece
    firsts = np.cumsum([0, *(layout.edges[n + 1] - layout.edges[n] for n in pieces)])
    held = set(layout.piece_of[protected].tolist())
    opens[[first for first, n in zip(firsts, pieces, strict=False) if n not in held]] = 1
    costs = np.where(protected[units], 0, layout.cost[units]) + opens * len(layout.separator_ids)
    taken = int(np.searchsorted(np.cumsum(costs), room, side="right"))
    while taken:
        anchored = protected.copy()
        anchored[units[:taken]] = True
        excess = over(layout.text(anchored))
        if excess <= 0:
            return anchored
        taken -= min(taken, excess)
    return protected


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What Stage 2 works on.

    Attributes:
        layout: with all that is kept whole protected; the demonstrations as they will stand.
        parts: the units that take part, by part (instruction, demonstrations, question), in source order.
        budgets: free tokens of the small LM to keep in each part.
        selected: numbers of the pieces of the demonstrations that take part, ascending.
    """

    layout: Layout
    parts: Sequence[Ints]
    budgets: Sequence[int]
    selected: Sequence[int]

    @property
    def left_out(self) -> list[int]:
        """Numbers of the pieces of the demonstrations that were not selected."""
        return [n for n in self.layout.numbers(Part.DEMONSTRATION) if n not in self.selected]

    def spare(self, perplexities: Perplexities) -> Ints:
        """The free units of the demonstrations that were not selected, in descending order of perplexity."""
        layout = self.layout
        order = sorted(self.left_out, key=lambda n: (-perplexities.get(layout.pieces[n].index, 0.0), n))
        units = layout.units_of(order)
        free: Ints = units[~layout.protected[units]]
        return free


def rank_weights(plan: Plan, perplexities: Perplexities, delta: float) -> dict[int, int]:
    """In which proportion Stage 2 keeps tokens of the demonstrations that take part, by number of the piece.

    Of the K that take part the rate of the one of rank I = 0 … K − 1 is τ_D + δ (1 − 2 I / (K − 1)), clipped to [0, 1].

    Args:
        delta: δ.

    Note:
        The paper's I / K would raise the rates' mean above τ_D. What clipping adds or takes is made good by the
        proportion.

    Source: Eq. 5 of arXiv:2310.06839.
    """
    layout = plan.layout
    free = {n: _free_tokens(layout, n) for n in plan.selected}
    common = plan.budgets[1] / max(1, sum(free.values()))
    order = sorted(plan.selected, key=lambda n: (-perplexities.get(layout.pieces[n].index, 0.0), n))
    steps = max(1, len(order) - 1)
    shift = delta if len(order) > 1 else 0.0
    rates = {n: min(1.0, max(0.0, common + shift * (1 - 2 * rank / steps))) for rank, n in enumerate(order)}
    return {n: round(_FINE * rate) for n, rate in rates.items()}


def quotas_of(plan: Plan, weights: Mapping[int, int]) -> dict[int, int]:
    """The budget of the demonstrations divided among them in proportion to weight times free tokens."""
    shares = {n: weight * _free_tokens(plan.layout, n) for n, weight in weights.items()}
    total = max(1, sum(shares.values()))
    return {n: plan.budgets[1] * share // total for n, share in shares.items()}


def _free_tokens(layout: Layout, piece: int) -> int:
    units = layout.units_of([piece])
    return int(layout.cost[units][~layout.protected[units]].sum())


class BudgetController:
    """Divides a budget among the parts of one prompt.

    Args:
        tokens: T′, the budget in tokens of the small LM.
        pinned: demonstrations that are selected ahead of all others.
        protected: ``(n_units,)``, in the place of the layout's own.
        anchor_only: nothing of the demonstrations takes part but what is protected.
    """

    def __init__(
        self,
        layout: Layout,
        tokens: int,
        pinned: Collection[int],
        settings: CompressionSettings,
        protected: Mask,
        *,
        anchor_only: bool = False,
    ) -> None:
        self.protected = protected
        self._layout, self._tokens, self._named, self._settings = layout, tokens, pinned, settings
        self._anchor_only = anchor_only
        self._whole = settings.unit is UnitKind.DEMONSTRATION
        self._demonstrations = layout.numbers(Part.DEMONSTRATION)
        self._pinned = {i for i, n in enumerate(self._demonstrations) if layout.pieces[n].index in pinned}
        self._budget = tokens - int(layout.cost[protected].sum())  # T′ − P; may be negative
        self._free_of: list[int] = np.add.reduceat(np.where(protected, 0, layout.cost), layout.edges[:-1]).tolist()
        self._instruction, self._question = (
            sum(self._free_of[n] for n in layout.numbers(part)) for part in (Part.INSTRUCTION, Part.QUESTION)
        )
        self._lengths: list[int] = [0 if anchor_only else self._free_of[n] for n in self._demonstrations]
        self._total = sum(self._lengths)
        self._instruction_rate = settings.instruction_rate or PAPER_INSTRUCTION_RATE
        self._question_rate = settings.question_rate or PAPER_QUESTION_RATE
        if settings.ablations.uniform_rates:
            total = sum(self._free_of)
            self._instruction_rate = min(1.0, max(0.0, self._budget / total)) if total else 1.0
            self._question_rate = self._instruction_rate
        self._need: float = self._instruction_rate * self._instruction + self._question_rate * self._question
        self._rate = max(0.0, (self._budget - self._need) / self._total) if self._total else 0.0  # τ_dems of Eq. 2
        self._eligible = [i for i, length in enumerate(self._lengths) if length]

    @property
    def left(self) -> float:
        """Tokens for demonstrations once instruction and question have their rates; may be negative."""
        return self._room(()) - self._need

    @property
    def holds_half_a_demonstration(self) -> bool:
        """Whether half of some demonstration is protected, or more."""
        sizes = np.add.reduceat(self._layout.cost, self._layout.edges[:-1])
        return any(2 * self._free_of[n] <= sizes[n] for n in self._demonstrations)

    @property
    def has_many_lines(self) -> bool:
        """Whether the demonstrations have three lines or more each, on average; blank ones do not count."""
        texts = [self._layout.pieces[n].text for n in self._demonstrations]
        lines = [sum(1 for line in text.split("\n") if line.strip()) for text in texts]
        return sum(lines) >= 3 * sum(1 for count in lines if count)

    def fits_any(self) -> bool:
        """Whether the budget holds one unit of the demonstrations once the other parts have their rates."""
        units = self._layout.units_of(self._demonstrations)
        free = units[~self.protected[units]]
        if not len(free):
            return True
        return int(self._layout.cost[free].min()) <= self._room(self._eligible[:1]) - self._need

    def anchor_order(self) -> list[int]:
        """Numbers of the pieces of the demonstrations, in the order in which they become anchors."""
        pieces = self._demonstrations[::-1]
        if self._settings.anchor_by is not AnchorOrder.LAST:
            pieces.sort(key=self._free_of.__getitem__)  # stable: of equals, the later first
        pinned = {self._demonstrations[i] for i in self._pinned}
        pieces.sort(key=lambda n: n not in pinned)
        return pieces

    def useful_first(self, order: Sequence[int], question: str, room: int) -> list[int]:
        """The order of `anchor_order` with the worked examples that a target needs most ahead.

        After the pinned ones the most similar to the question, if there is room for it beside one example of each
        label (or for it alone, if there is none for that anyway), then the shortest example of each label that is
        still missing.

        Args:
            order: the pinned first, then the shortest.
            room: tokens, separators included.
        """
        held = set(self._layout.piece_of[self.protected].tolist())
        cost = {n: self._free_of[n] + (n not in held) * len(self._layout.separator_ids) for n in order}
        texts = {n: text for n in sorted(order) if (text := self._layout.pieces[n].text).strip()}
        numbers, examples = list(texts), list(texts.values())
        labels = dict(zip(numbers, labels_of(examples) or (), strict=False))

        def missing(first: Sequence[int]) -> list[int]:
            """The shortest example of each label that none of these has."""
            covered = {labels.get(n) for n in first}
            shortest = {labels[n]: n for n in reversed(order) if n in labels and labels[n] not in covered}
            return [n for n in order if n in shortest.values()]

        def size(pieces: Sequence[int]) -> int:
            return sum(cost[n] for n in pieces)

        first = [n for n in order if self._layout.pieces[n].index in self._named]
        similar = most_similar(question, examples)
        if similar is not None and numbers[similar] not in first:
            more = [*first, numbers[similar]]
            too_many = size([*first, *missing(first)]) > room  # labels, to keep one of each
            if size(more if too_many else [*more, *missing(more)]) <= room:
                first = more
        first += missing(first)
        return [*first, *(n for n in order if n not in first)]

    @property
    def needs_perplexities(self) -> bool:
        """False where the plan is the same whatever the perplexities."""
        if self._settings.order is not Order.ORIGINAL and len(self._demonstrations) > 1:
            return True
        if self._settings.ablations.selection is Selection.ALL or self._rate == 0:
            return False
        if sum(i not in self._pinned for i in self._eligible) < 2:
            return False
        if self._whole:
            return not self._fits(self._eligible)
        all_fit = self._settings.k * self._rate * self._total >= self._total
        return not (all_fit and self._room(self._eligible) - self._need >= len(self._eligible))

    def plan(self, perplexities: Perplexities) -> Plan:
        """Select demonstrations and give each part its budget."""
        if self._settings.order is not Order.ORIGINAL:
            return self._ranked(perplexities)._plan(perplexities)
        return self._plan(perplexities)

    def _ranked(self, perplexities: Perplexities) -> BudgetController:
        """The same for demonstrations in the order of the settings."""
        order = [self._demonstrations[i] for i in self._descending(range(len(self._demonstrations)), perplexities)]
        if self._settings.order is Order.FIRST_AND_LAST:
            order = order[0::2] + order[1::2][::-1]
        layout = replace(self._layout, protected=self.protected)
        numbers = [*layout.numbers(Part.INSTRUCTION), *order, *layout.numbers(Part.QUESTION)]
        layout = layout.reordered(numbers)
        return BudgetController(
            layout, self._tokens, self._named, self._settings, layout.protected, anchor_only=self._anchor_only
        )

    def _plan(self, perplexities: Perplexities) -> Plan:
        selected = self._select(perplexities)
        room = self._room(selected)
        budgets = self._share(selected, room) if selected or room >= self._need else self._scale_down(room)
        pieces = [self._demonstrations[i] for i in sorted(selected)]
        layout = replace(self._layout, protected=self.protected)
        demonstrations = layout.units_of(self._demonstrations)
        taking = np.isin(layout.piece_of[demonstrations], pieces) | self.protected[demonstrations]
        parts = [
            layout.units_of(layout.numbers(Part.INSTRUCTION)),
            demonstrations[taking],
            layout.units_of(layout.numbers(Part.QUESTION)),
        ]
        return Plan(layout=layout, parts=parts, budgets=budgets, selected=pieces)

    @cached_property
    def _always(self) -> set[int]:
        """Numbers of the pieces that stand in the text whatever is selected."""
        others = {n for n, piece in enumerate(self._layout.pieces) if piece.part is not Part.DEMONSTRATION}
        return others | set(self._layout.piece_of[self.protected].tolist())

    def _room(self, selected: Collection[int]) -> int:
        """room(D): what the budget leaves once protected text and the separators are paid for."""
        pieces = self._always | {self._demonstrations[i] for i in selected}
        return max(0, self._budget - len(self._layout.separator_ids) * max(0, len(pieces) - 1))

    def _select(self, perplexities: Perplexities) -> list[int]:
        if self._settings.ablations.selection is Selection.ALL:
            return self._eligible
        if self._rate == 0:
            return []
        descending = self._descending(self._eligible, perplexities)
        ranked = sorted(descending, key=lambda i: (0, i) if i in self._pinned else (1, 0))
        selected: list[int] = []
        if self._whole:
            for i in ranked:
                if self._fits([*selected, i]):
                    selected.append(i)
            return selected
        limit = self._settings.k * self._rate * self._total
        length = 0
        for i in ranked:
            if length > limit and i not in self._pinned:
                break
            selected.append(i)
            length += self._lengths[i]
        while selected and self._room(selected) - self._need < len(selected):
            selected.pop()
        return selected

    def _descending(self, demonstrations: Sequence[int], perplexities: Perplexities) -> list[int]:
        pieces = [self._layout.pieces[n] for n in self._demonstrations]
        return sorted(demonstrations, key=lambda i: (-perplexities.get(pieces[i].index, 0.0), i))

    def _fits(self, selected: Sequence[int]) -> bool:
        return self._room(selected) - self._need >= sum(self._lengths[i] for i in selected)

    def _share(self, selected: Sequence[int], room: int) -> tuple[int, int, int]:
        """Budgets of instruction, demonstrations, question: Eq. 3, with the leftover divided by k.

        Note:
            The paper hands out k·τ_dems·L_dems − L_D coarse tokens although Stage 2 thins the demonstrations by 1/k,
            which overshoots the budget. We hand out that over k, so that the three budgets add up to ``room``.
        """
        length = sum(self._lengths[i] for i in selected)
        leftover = room - self._need
        if selected:
            thinned = self._rate * self._total - length / self._settings.k
            leftover = max(0.0, leftover - length if self._whole else thinned)
        rest = self._instruction + self._question
        extra = leftover / rest if rest else 0.0
        instruction = _round(min(1.0, self._instruction_rate + extra) * self._instruction)
        question = _round(min(1.0, self._question_rate + extra) * self._question)
        demonstrations = room - instruction - question
        least = length if self._whole and self._fits(selected) else 0
        if demonstrations < least:
            taken = min(question, least - demonstrations)
            question -= taken
            instruction = max(0, instruction + demonstrations - least + taken)
            demonstrations = least
        excess = max(0, demonstrations - length)
        demonstrations -= excess
        to_instruction = min(excess, self._instruction - instruction)
        instruction += to_instruction
        question = min(self._question, question + excess - to_instruction)
        return instruction, demonstrations, question

    def _scale_down(self, room: int) -> tuple[int, int, int]:
        """The budgets where no demonstration takes part and the rates of the other two cannot be paid."""
        instruction = _round(room * self._instruction_rate * self._instruction / self._need)
        question = room - instruction
        if instruction > self._instruction:
            instruction, question = self._instruction, question + instruction - self._instruction
        if question > self._question:
            instruction, question = min(self._instruction, instruction + question - self._question), self._question
        return instruction, 0, question


def _round(x: float) -> int:
    return math.floor(x + 0.5)

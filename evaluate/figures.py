"""From what was measured to figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from terselm.evaluate.answers import bert_score, likeness
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.measurements import FULL, NO_BUDGET, ZERO, Measurement
from terselm.evaluate.settings import EvaluateSettings
from terselm.statistics import Interval, ratio

GAIN, EXACT, KEPT, OVERLAP = "gain_retained", "exact_match", "answer_kept", "oracle_overlap"
QUALITIES = (GAIN, EXACT, KEPT, OVERLAP, "bleu", "rouge1", "rouge2", "rougeL", "bert_score")

Cell = tuple[str, str]  # method, budget
Column = Mapping[str, float]  # a figure of each item, by its id


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One method at one budget.

    Attributes:
        method: as the user wrote it.
        budget: as the user wrote it.
        items: how many were measured.
        tokens: mean of the compressed prompts, in the target's tokens.
        ratio: of the whole prompts' tokens to these.
        over_budget: share of the prompts that are longer than was allowed.
        quality: each measure with its interval.
        against: the difference from the method that all are compared with, at the same budget.
        compressor_seconds: mean by prompt.
        target_seconds: mean by prompt.
        saved: of a thousand prompts, at the target's price.
    """

    method: str
    budget: str
    items: int
    tokens: float
    ratio: float
    over_budget: float
    quality: dict[str, Interval] = field(default_factory=dict)
    against: dict[str, Interval] = field(default_factory=dict)
    compressor_seconds: float = 0.0
    target_seconds: float | None = None
    saved: float | None = None


class Figuring:
    """Computes the figures of one evaluation."""

    def __init__(self, settings: EvaluateSettings, suite: Suite, measurements: Sequence[Measurement]) -> None:
        self._settings = settings
        self._items = {item.id: item for item in suite.items}
        self._cells: dict[Cell, dict[str, Measurement]] = {}
        for one in measurements:
            self._cells.setdefault(one.cell, {})[one.id] = one
        self._columns: dict[str, dict[Cell, Column]] = {
            GAIN: {cell: self._gains(cell) for cell in self._cells},
            EXACT: self._measured(lambda one: one.right),
            KEPT: self._measured(lambda one: one.answer_kept),
            OVERLAP: self._measured(lambda one: one.overlap),
        }
        if settings.generate and suite.right is None:
            self._columns |= self._likenesses()

    def all(self) -> list[Figures]:
        """The references first, then method by method in the order that they were asked for."""
        compare = self._settings.compare or self._settings.methods[0]
        cells = [(ZERO, NO_BUDGET), (FULL, NO_BUDGET)]
        cells += [(method, budget) for method in self._settings.methods for budget in self._settings.budgets]
        return [self._figures(cell, (compare, cell[1])) for cell in cells if cell in self._cells]

    def _gains(self, cell: Cell) -> Column:
        """What each prompt gains over its bare question: nats a token of the gold answer."""
        zero, whole = (self._nats((method, NO_BUDGET)) for method in (ZERO, FULL))
        return {id_: zero[id_] - nats for id_, nats in self._nats(cell).items() if id_ in zero and id_ in whole}

    def _nats(self, cell: Cell) -> Column:
        measured = self._cells.get(cell, {})
        return {id_: nats for id_, one in measured.items() if (nats := one.nats_a_token) is not None}

    def _measured(self, value_of: Callable[[Measurement], float | None]) -> dict[Cell, Column]:
        return {
            cell: {id_: float(value) for id_, one in measured.items() if (value := value_of(one)) is not None}
            for cell, measured in self._cells.items()
        }

    def _likenesses(self) -> dict[str, dict[Cell, Column]]:
        """Likeness of the answers to the references, or to the answer to the whole prompt where there are none."""
        answered = [(one, one.answer) for cell in self._cells.values() for one in cell.values() if one.answer is not None]
        answers = [answer for _, answer in answered]
        references = [self._reference(self._items[one.id]) for one, _ in answered]
        values = likeness(answers, references)
        if self._settings.bert_score and answered:
            values["bert_score"] = bert_score(answers, references, self._settings.bert_score)
        columns: dict[str, dict[Cell, Column]] = {}
        for name, scores in values.items():
            by_cell: dict[Cell, dict[str, float]] = {}
            for (one, _), score in zip(answered, scores, strict=True):
                by_cell.setdefault(one.cell, {})[one.id] = score
            columns[name] = dict(by_cell)
        return columns

    def _reference(self, item: Item) -> str:
        if item.answers:
            return item.answers[0]
        return str(self._cells[FULL, NO_BUDGET][item.id].answer)

    def _figures(self, cell: Cell, other: Cell) -> Figures:
        measured = list(self._cells[cell].values())
        tokens = float(np.mean([one.tokens for one in measured]))
        before = float(np.mean([one.whole_tokens for one in measured]))
        over = [one.tokens > one.allowed for one in measured if one.allowed is not None]
        seconds = [one.target_seconds for one in measured if one.target_seconds is not None]
        price = self._settings.target.price
        return Figures(
            method=cell[0],
            budget=cell[1],
            items=len(measured),
            tokens=tokens,
            ratio=before / tokens if tokens else float("inf"),
            over_budget=float(np.mean(over)) if over else 0.0,
            quality=self._qualities(cell),
            against=self._qualities(cell, minus=other) if other in self._cells and other != cell else {},
            compressor_seconds=float(np.mean([one.compressor_seconds for one in measured])),
            target_seconds=float(np.mean(seconds)) if seconds else None,
            saved=(before - tokens) * price / 1000 if price else None,
        )

    def _qualities(self, cell: Cell, minus: Cell | None = None) -> dict[str, Interval]:
        """Each measure of a cell, or its difference from another; without those that were not measured."""
        qualities = {name: self._quality(name, cell, minus) for name in QUALITIES}
        return {name: interval for name, interval in qualities.items() if interval is not None}

    def _quality(self, name: str, cell: Cell, minus: Cell | None) -> Interval | None:
        columns = self._columns.get(name, {})
        ours = columns.get(cell, {})
        theirs = columns.get(minus, {}) if minus is not None else dict.fromkeys(ours, 0.0)
        ids = [id_ for id_ in ours if id_ in theirs]
        if not ids:
            return None
        over = np.array([ours[id_] - theirs[id_] for id_ in ids])
        under = np.array([columns[FULL, NO_BUDGET][id_] if name == GAIN else 1.0 for id_ in ids])
        return ratio(over, under, groups=[self._items[id_].group for id_ in ids], seed=self._settings.seed)

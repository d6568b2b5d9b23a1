"""From what was measured to figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from terselm.evaluate.answers import bert_score, likeness
from terselm.evaluate.items import Suite
from terselm.evaluate.measurements import FULL, NO_BUDGET, ZERO, Measurement
from terselm.evaluate.settings import EvaluateSettings
from terselm.statistics import Interval, ratio

GAIN, EXACT, KEPT, OVERLAP = "gain_retained", "exact_match", "answer_kept", "oracle_overlap"
SHORT, F1, NATS = "squad_exact", "f1", "gold_nats"
QUALITIES = (GAIN, EXACT, KEPT, SHORT, F1, OVERLAP, "bleu", "rouge1", "rouge2", "rougeL", "bert_score", NATS)

Cell = tuple[str, str]  # method, budget
Column = dict[str, float]  # a figure of each item, by its id


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
            GAIN: self._gains(),
            EXACT: self._measured(lambda one: one.right),
            KEPT: self._measured(lambda one: one.answer_kept),
            SHORT: self._measured(lambda one: one.exact),
            F1: self._measured(lambda one: one.f1),
            NATS: self._measured(lambda one: one.nats_a_token),
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

    def _gains(self) -> dict[Cell, Column]:
        """What each prompt gains over its bare question: nats a token of the gold answer."""
        nats = self._measured(lambda one: one.nats_a_token)
        zero, whole = (nats.get((method, NO_BUDGET), {}) for method in (ZERO, FULL))
        return {
            cell: {id_: zero[id_] - value for id_, value in column.items() if id_ in zero and id_ in whole}
            for cell, column in nats.items()
        }

    def _measured(self, value_of: Callable[[Measurement], float | None]) -> dict[Cell, Column]:
        return {
            cell: {id_: float(value) for id_, one in measured.items() if (value := value_of(one)) is not None}
            for cell, measured in self._cells.items()
        }

    def _likenesses(self) -> dict[str, dict[Cell, Column]]:
        """Likeness of the answers to the references, or to the answer to the whole prompt where there are none."""
        answered = [one for cell in self._cells.values() for one in cell.values() if one.answer is not None]
        answers = [str(one.answer) for one in answered]
        references = [
            (self._items[one.id].answers or [str(self._cells[FULL, NO_BUDGET][one.id].answer)])[0] for one in answered
        ]
        values = likeness(answers, references)
        if self._settings.bert_score and answered:
            values["bert_score"] = bert_score(answers, references, self._settings.bert_score)
        columns: dict[str, dict[Cell, Column]] = {name: {cell: {} for cell in self._cells} for name in values}
        for name, scores in values.items():
            for one, score in zip(answered, scores, strict=True):
                columns[name][one.cell][one.id] = score
        return columns

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
        qualities = {}
        for name in QUALITIES:
            columns = self._columns.get(name, {})
            ours = columns.get(cell, {})
            theirs = columns.get(minus, {}) if minus is not None else dict.fromkeys(ours, 0.0)
            if ids := [id_ for id_ in ours if id_ in theirs]:
                over = np.array([ours[id_] - theirs[id_] for id_ in ids])
                under = np.array([columns[FULL, NO_BUDGET][id_] if name == GAIN else 1.0 for id_ in ids])
                groups = [self._items[id_].group for id_ in ids]
                qualities[name] = ratio(over, under, groups=groups, seed=self._settings.seed)
        return qualities

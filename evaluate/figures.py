"""From journal entries to figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from terselm.evaluate.bootstrap import Estimate, ratio
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.runner import FULL, NO_BUDGET, ZERO, Entry
from terselm.evaluate.settings import EvaluateSettings

Floats = NDArray[np.float64]
GAIN, EXACT, KEPT, OVERLAP = "gain_retained", "exact_match", "answer_kept", "oracle_overlap"
QUALITIES = (GAIN, EXACT, KEPT, OVERLAP, "bleu", "rouge1", "rouge2", "rougeL", "bert_score")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One method at one budget.

    Attributes:
        items: how many were measured.
        tokens: mean of the compressed prompts, in the target's tokens; ratio: of the whole prompts' to these.
        over_budget: share of the prompts that are longer than was allowed.
        quality: each measure with its interval.
        against: the difference from the method that all are compared with, at the same budget.
        compressor_seconds, target_seconds: mean by prompt.
        saved: of a thousand prompts, at the target's price.
    """

    method: str
    budget: str
    items: int
    tokens: float
    ratio: float
    over_budget: float
    quality: dict[str, Estimate] = field(default_factory=dict)
    against: dict[str, Estimate] = field(default_factory=dict)
    compressor_seconds: float = 0.0
    target_seconds: float | None = None
    saved: float | None = None


class Figuring:
    """Computes the figures of one evaluation."""

    def __init__(self, settings: EvaluateSettings, suite: Suite, entries: Sequence[Entry]) -> None:
        self._settings = settings
        self._items = {item.id: item for item in suite.items}
        self._cells: dict[tuple[str, str], dict[str, Entry]] = {}
        for entry in entries:
            self._cells.setdefault((entry["method"], entry["budget"]), {})[entry["id"]] = entry
        if settings.generate and suite.right is None:
            self._compare_texts()

    def all(self) -> list[Figures]:
        """The references first, then method by method in the order that they were asked for."""
        compare = self._settings.compare or self._settings.methods[0]
        keys = [(ZERO, NO_BUDGET), (FULL, NO_BUDGET)]
        keys += [(method, budget) for method in self._settings.methods for budget in self._settings.budgets]
        return [self._figures(key, (compare, key[1])) for key in keys if key in self._cells]

    def _figures(self, key: tuple[str, str], other: tuple[str, str]) -> Figures:
        entries = self._cells[key]
        tokens = np.mean([entry["tokens"] for entry in entries.values()])
        before = np.mean([entry["whole_tokens"] for entry in entries.values()])
        allowed = [(entry["tokens"], entry["allowed"]) for entry in entries.values() if "allowed" in entry]
        times = [entry["target_seconds"] for entry in entries.values() if "target_seconds" in entry]
        price = self._settings.target.price
        compared = other in self._cells and other != key
        return Figures(
            method=key[0],
            budget=key[1],
            items=len(entries),
            tokens=float(tokens),
            ratio=float(before / tokens) if tokens else float("inf"),
            over_budget=float(np.mean([used > most for used, most in allowed])) if allowed else 0.0,
            quality={name: found for name in QUALITIES if (found := self._quality(name, key)) is not None},
            against={
                name: found
                for name in QUALITIES
                if compared and (found := self._quality(name, key, minus=other)) is not None
            },
            compressor_seconds=float(np.mean([entry["compressor_seconds"] for entry in entries.values()])),
            target_seconds=float(np.mean(times)) if times else None,
            saved=float(before - tokens) * price / 1000 if price else None,
        )

    def _quality(self, name: str, key: tuple[str, str], minus: tuple[str, str] | None = None) -> Estimate | None:
        """A measure of one cell, or its difference from another; None where it was not measured."""
        column = self._gain if name == GAIN else self._field(_FIELDS.get(name, name))
        ours = column(key)
        theirs = column(minus) if minus is not None else {}
        ids = [id_ for id_ in ours if minus is None or id_ in theirs]
        if not ids:
            return None
        over = np.array([ours[id_] - theirs.get(id_, 0.0) for id_ in ids])
        under = np.array([self._gain((FULL, NO_BUDGET))[id_] if name == GAIN else 1.0 for id_ in ids])
        groups = [self._items[id_].group for id_ in ids]
        return ratio(over, under, groups, seed=self._settings.seed)

    def _gain(self, key: tuple[str, str]) -> dict[str, float]:
        """What each prompt gains over its bare question: nats a token of the gold answer."""
        zero, whole, mine = (self._cells.get(k, {}) for k in ((ZERO, NO_BUDGET), (FULL, NO_BUDGET), key))
        return {
            id_: (zero[id_]["nats"] - entry["nats"]) / entry["gold_tokens"]
            for id_, entry in mine.items()
            if "nats" in entry and "nats" in zero.get(id_, {}) and "nats" in whole.get(id_, {})
        }

    def _field(self, name: str) -> Callable[[tuple[str, str]], dict[str, float]]:
        def column(key: tuple[str, str]) -> dict[str, float]:
            return {id_: float(entry[name]) for id_, entry in self._cells.get(key, {}).items() if name in entry}

        return column

    def _compare_texts(self) -> None:
        """Likeness of the answers to the references, or to the answer to the whole prompt where there are none."""
        from terselm.evaluate.text_metrics import bert_score, likeness

        told = [(entry, self._items[id_]) for cell in self._cells.values() for id_, entry in cell.items()]
        told = [(entry, item) for entry, item in told if "answer" in entry]
        texts = [entry["answer"] for entry, _ in told], [self._reference(item) for _, item in told]
        columns = likeness(*texts)
        if self._settings.bert_score and told:
            columns["bert_score"] = bert_score(*texts, self._settings.bert_score)
        for name, values in columns.items():
            for (entry, _), value in zip(told, values, strict=True):
                entry[name] = value

    def _reference(self, item: Item) -> str:
        if item.answers:
            return item.answers[0]
        return str(self._cells[FULL, NO_BUDGET][item.id]["answer"])


_FIELDS: Mapping[str, str] = {EXACT: "right", KEPT: "answer_kept", OVERLAP: "overlap"}

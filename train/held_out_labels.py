"""Held-out labelled prompts: how well the scores of their units follow what the units are worth to the target.

Beside the trained scores stand those of two rankers that nobody trained: the surprisal of a unit, the mean over its
tokens under the small LM as it was, and BM25.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from terselm.compress.ranking import Bm25Index, bare_question
from terselm.data.utility import LabelledPrompt
from terselm.errors import ConfigError
from terselm.statistics import CONFIDENCE, Floats, ratio, spearman
from terselm.train.examples import Encoding, Example
from terselm.train.held_out import gather_sums, read_examples
from terselm.train.labelled import ReadPrompt, documents_hash, has_order, read_prompts
from terselm.train.report.measures import RANKERS

SCORE, SURPRISAL, BM25 = "score", "surprisal", "bm25"
MEASURES = ("spearman", "best_first", "best_in_10", "best_in_25")
_SHARES = {"best_in_10": 0.10, "best_in_25": 0.25}


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutLabels:
    """Labelled prompts that are not trained on, as they are read, with their questions.

    Attributes:
        labels: those that can be read and say something.
        prompts: of each its windows; the examples' records count them.
    """

    labels: Sequence[LabelledPrompt]
    prompts: Sequence[ReadPrompt]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, labels: Sequence[LabelledPrompt], encoding: Encoding) -> HeldOutLabels:
        """Read those whose units are not all worth the same."""
        telling = [label for label in labels if has_order(label)]
        read = read_prompts(telling, encoding)
        kept = [(label, prompt) for label, prompt in zip(telling, read, strict=True) if prompt.examples]
        return cls(labels=[label for label, _ in kept], prompts=[prompt for _, prompt in kept])

    def halves(self, seed: int) -> tuple[HeldOutLabels, HeldOutLabels]:
        """One to choose the best weights by, the other to report on; prompts with the same text are on one side.

        Raises:
            ConfigError: there is but one prompt.
        """
        known: dict[str, int] = {}
        groups = np.asarray([known.setdefault(documents_hash(label), len(known)) for label in self.labels])
        if len(known) < 2:
            raise ConfigError(
                "evaluation.every needs at least two held-out labelled prompts, one to choose by and one to report on; "
                "raise evaluation.held_out or add labels"
            )
        chosen = np.isin(groups, np.random.default_rng(seed).permutation(len(known))[: len(known) // 2])
        return self._part(np.flatnonzero(chosen).tolist()), self._part(np.flatnonzero(~chosen).tolist())

    def _part(self, places: Sequence[int]) -> HeldOutLabels:
        return HeldOutLabels(labels=[self.labels[i] for i in places], prompts=[self.prompts[i] for i in places])

    def windows(self) -> list[tuple[Example, int, int]]:
        """Every example with the number of its prompt, and its own number there."""
        return [
            (example, number, window)
            for number, prompt in enumerate(self.prompts)
            for window, example in enumerate(prompt.examples)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitReadings:
    """What a model says of every unit of some prompts.

    Attributes:
        scores: of each prompt ``(m,)``; zeros of a model without a head.
        surprisals: of each prompt ``(m,)``, nats a token.
        tokens: of each prompt ``(m,)``.
    """

    scores: list[Floats]
    surprisals: list[Floats]
    tokens: list[Floats]


def read_units(
    model: Any, held_out: HeldOutLabels, *, row_length: int, rows_per_pass: int, rank: int, processes: int
) -> UnitReadings:
    """Read all units; every process reads its share and gets the whole. The arguments are those of `score_held_out`."""
    sizes = [len(label.units) for label in held_out.labels]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    sums = np.zeros((3, starts[-1]))  # scores, nats, tokens
    windows = held_out.windows()
    examples = [example for example, _, _ in windows]
    readings = read_examples(
        model, examples, row_length=row_length, rows_per_pass=rows_per_pass, rank=rank, processes=processes
    )
    for place, nats, scores in readings:
        _, number, window = windows[place]
        prompt, start = held_out.prompts[number], starts[number]
        sums[0, start + prompt.units[window]] = scores if len(scores) else 0.0
        np.add.at(sums[1], start + prompt.owners[window], nats)
        np.add.at(sums[2], start + prompt.owners[window], 1.0)
    sums = gather_sums(sums, processes)
    parts = [np.split(each, starts[1:-1]) for each in (sums[0], sums[1] / np.maximum(sums[2], 1), sums[2])]
    return UnitReadings(scores=parts[0], surprisals=parts[1], tokens=parts[2])


def rank_correlation(held_out: HeldOutLabels, scores: Sequence[Floats]) -> float:
    """Spearman's, the mean over prompts; one value for all units orders nothing and counts as 0."""
    return float(np.mean(_correlations(held_out, scores)))


def compare_rankers(held_out: HeldOutLabels, before: UnitReadings, after: UnitReadings, seed: int) -> dict[str, Any]:
    """How well each ranker follows the utilities, and how much better the trained scores do than the others.

    Intervals are those of the percentile bootstrap over prompts, paired in the differences.

    Args:
        held_out: what was read.
        before: by the small LM as it was.
        after: as it was trained.
        seed: of the resamples.
    """
    rankers = {SCORE: after.scores, SURPRISAL: before.surprisals}
    if find_spec("bm25s") is not None:
        rankers[BM25] = [
            Bm25Index(label.unit_texts()).scores(bare_question(label.question)) for label in held_out.labels
        ]
    found = {name: _by_prompt(held_out, scores, after.tokens) for name, scores in rankers.items()}
    ones = np.ones(len(held_out))
    differences = {
        name: {measure: _figure(found[SCORE][measure] - values[measure], ones, seed) for measure in MEASURES}
        for name, values in found.items()
        if name != SCORE
    }
    return {
        "rankers": {n: {m: _figure(values[m], ones, seed) for m in MEASURES} for n, values in found.items()},
        "score_over": differences,
        "prompts": len(held_out),
        "units": sum(len(label.units) for label in held_out.labels),
        "targets": sorted({label.target for label in held_out.labels}),
        "confidence": CONFIDENCE,
    }


def rankers_sentence(utility: dict[str, Any]) -> str:
    """What `compare_rankers` found, in one line for each ranker."""
    lines = []
    for name, values in utility["rankers"].items():
        low, high = values["spearman"]["interval"]
        first, tenth, quarter = (values[measure]["value"] for measure in MEASURES[1:])
        lines.append(
            f"utility of units by {RANKERS[name]}: rank correlation {values['spearman']['value']:.3f} (95% interval "
            f"{low:.3f} to {high:.3f}); the best unit first in {first:.0%} of {utility['prompts']} prompts, in the "
            f"best 10% of the tokens in {tenth:.0%}, in the best 25% in {quarter:.0%}"
        )
    return "\n".join(lines)


def _by_prompt(held_out: HeldOutLabels, scores: Sequence[Floats], tokens: Sequence[Floats]) -> dict[str, Floats]:
    """Each measure, ``(prompts,)``."""
    found = {"spearman": np.asarray(_correlations(held_out, scores)), "best_first": np.zeros(len(held_out))}
    found |= {name: np.zeros(len(held_out)) for name in _SHARES}
    for number, (label, values, counts) in enumerate(zip(held_out.labels, scores, tokens, strict=True)):
        best = int(np.argmax(label.utility))
        above = (values > values[best]) | ((values == values[best]) & (np.arange(len(values)) < best))
        found["best_first"][number] = not above.any()
        for name, share in _SHARES.items():
            found[name][number] = counts[above].sum() < share * counts.sum()  # it begins before the share is full
    return found


def _correlations(held_out: HeldOutLabels, scores: Sequence[Floats]) -> list[float]:
    rhos = [spearman(values, label.utility) for values, label in zip(scores, held_out.labels, strict=True)]
    return [0.0 if np.isnan(rho) else rho for rho in rhos]


def _figure(values: Floats, ones: Floats, seed: int) -> dict[str, Any]:
    found = ratio(values, ones, seed=seed)
    return {"value": found.value, "interval": [found.low, found.high]}

"""The figures of the report, from surprisals alone, and what they say in words; knows no models and no files.

A measure is a ratio of two sums over prompts (bits / bytes, words kept by both / words kept, ρ / texts), so all of
them share one paired bootstrap, over prompts: texts with one prompt are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from terselm.statistics import (
    CONFIDENCE,
    RATIOS,
    RESAMPLES,
    Floats,
    kept_overlap,
    most_surprising,
    percentile_interval,
    resampled_sums,
    spearman,
)

LEAST_WORDS = 10  # of a text whose words are compared: one is kept at 10×
LABELS = {
    "bits_per_byte": "bits per byte",
    "spearman": "rank correlation of word surprisals",
    **{f"kept_overlap_{ratio}x": f"kept words in common at {ratio}×" for ratio in RATIOS},
}
SHORT_LABELS = {
    "spearman": "rank correlation",
    **{f"kept_overlap_{ratio}x": f"common words, {ratio}×" for ratio in RATIOS},
}


RANKERS = {"score": "the trained head", "surprisal": "surprisal before", "bm25": "BM25"}
UTILITY_LABELS = {
    "spearman": "rank correlation with utility",
    "best_first": "best unit ranked first",
    "best_in_10": "best unit in the first 10% of tokens",
    "best_in_25": "best unit in the first 25% of tokens",
}


class Verdict(StrEnum):
    """What an interval says of a difference."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A ratio of sums before and after, by prompt.

    Attributes:
        before: ``(prompts,)``, the numerator's part of each prompt.
        after: likewise.
        weight: ``(prompts,)``, the denominator's.
        higher_is_better: whether a rise is good news.
        best: the value that cannot be bettered, where there is one.
    """

    before: Floats
    after: Floats
    weight: Floats
    higher_is_better: bool
    best: float | None = None

    def describe(self, seed: int) -> dict[str, Any]:
        """Both values, their difference with its paired interval and verdict; also the share of the way to ``best``."""
        before, after = (float(part.sum() / self.weight.sum()) for part in (self.before, self.after))
        sums = resampled_sums(np.stack([self.before, self.after, self.weight], axis=1), seed=seed)
        sums = sums[sums[:, 2] > 0]
        ratios = sums[:, :2] / sums[:, 2:]
        interval = percentile_interval(ratios[:, 1] - ratios[:, 0])
        result: dict[str, Any] = {
            "before": before,
            "after": after,
            "difference": after - before,
            "interval": list(interval),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "verdict": verdict_on(interval, higher_is_better=self.higher_is_better).value,
        }
        if self.best is not None and before != self.best:
            with np.errstate(divide="ignore", invalid="ignore"):
                closed = (ratios[:, 1] - ratios[:, 0]) / (self.best - ratios[:, 0])
            result["gap_closed"] = (after - before) / (self.best - before)
            result["gap_closed_interval"] = list(percentile_interval(closed))
        return result


def verdict_on(interval: tuple[float, float], *, higher_is_better: bool) -> Verdict:
    """A difference whose interval holds zero has not been shown."""
    low, high = interval
    if low > 0:
        return Verdict.BETTER if higher_is_better else Verdict.WORSE
    if high < 0:
        return Verdict.WORSE if higher_is_better else Verdict.BETTER
    return Verdict.NO_DIFFERENCE


def compare_words(
    before: Sequence[Floats], after: Sequence[Floats], target: Sequence[Floats], prompt_of: Sequence[int]
) -> dict[str, Measure]:
    """Rank correlation with the target, and the overlap of kept words with those that the target would keep.

    Args:
        before: surprisal of each word, one array a text; at least `LEAST_WORDS` words each.
        after: likewise, of the aligned model.
        target: likewise, of the target.
        prompt_of: the prompt that each text belongs to.

    Returns:
        ``spearman``: the mean over texts; ``kept_overlap_2x`` and so on: words that both keep / words kept, over all.
    """
    groups = np.unique(np.asarray(prompt_of), return_inverse=True)[1]

    def by_prompt(values: Sequence[float]) -> Floats:
        return np.bincount(groups, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)

    def correlations(words: Sequence[Floats]) -> list[float]:
        rhos = [spearman(ours, theirs) for ours, theirs in zip(words, target, strict=True)]
        return [0.0 if math.isnan(rho) else rho for rho in rhos]  # one value for every word orders nothing

    def agreement(parts: Sequence[Sequence[float]], weight: Sequence[float]) -> Measure:
        ours, ours_after = map(by_prompt, parts)
        return Measure(before=ours, after=ours_after, weight=by_prompt(weight), higher_is_better=True, best=1.0)

    measures = {"spearman": agreement([correlations(before), correlations(after)], [1.0] * len(target))}
    for ratio in RATIOS:
        kept = [len(most_surprising(words, 1 / ratio)) for words in target]
        common = [
            [kept_overlap(ours, theirs, 1 / ratio) * n for ours, theirs, n in zip(words, target, kept, strict=True)]
            for words in (before, after)
        ]
        measures[f"kept_overlap_{ratio}x"] = agreement(common, kept)
    return measures


def sentence(name: str, measure: dict[str, Any]) -> str:
    """The difference with its interval, and what it means; a null result is called one."""
    low, high = measure["interval"]
    difference = f"{measure['difference']:+.4f} (95% interval {low:+.4f} to {high:+.4f})"
    if measure["verdict"] == Verdict.NO_DIFFERENCE:
        return f"{LABELS[name]}: no difference was shown, {difference}"
    return f"{LABELS[name]}: {measure['verdict']}, {difference}"


def summary(report: dict[str, Any]) -> str:
    """Markdown: one table of all measures, and what was measured on what."""
    lines = [
        "| | before | after | difference (95% interval) | of the way to the target | |",
        "|---|---|---|---|---|---|",
        _row("bits_per_byte", report["bits_per_byte"]),
    ]
    words = report["words"]
    if words is not None:
        lines += [_row(name, measure) for name, measure in words["measures"].items()]
    bits = report["bits_per_byte"]
    lines += [
        "",
        f"Bits per byte: {bits['records']} held-out texts of {bits['prompts']} prompts. Intervals: paired "
        "bootstrap over prompts.",
    ]
    if words is not None:
        lines.append(
            f"Words: {words['words']:,} words of {words['texts']} held-out texts, compared with `{report['target']}`. "
            "Rank correlation is Spearman's, the mean over texts. Words in common: of the words that the small LM "
            "would keep, the share that the target itself would keep, if each kept its most surprising ones."
        )
    if (utility := report.get("utility")) is not None:
        lines += ["", *utility_table(utility)]
    return "\n".join(lines)


def utility_table(utility: dict[str, Any]) -> list[str]:
    """Markdown: how well each ranker follows the utilities of units, as `compare_rankers` found it."""
    lines = [
        f"| units ranked by | {' | '.join(UTILITY_LABELS.values())} |",
        "|---|" + "---|" * len(UTILITY_LABELS),
    ]
    for name, values in utility["rankers"].items():
        cells = [
            f"{values[measure]['value']:.3f} ({values[measure]['interval'][0]:.3f} to "
            f"{values[measure]['interval'][1]:.3f})"
            for measure in UTILITY_LABELS
        ]
        lines.append(f"| {RANKERS[name]} | {' | '.join(cells)} |")
    for name, values in utility["score_over"].items():
        low, high = values["spearman"]["interval"]
        verdict = verdict_on((low, high), higher_is_better=True)
        lines += [
            "",
            f"The head's rank correlation over that of {RANKERS[name]}: {values['spearman']['value']:+.3f} "
            f"({low:+.3f} to {high:+.3f}), {verdict.value}.",
        ]
    lines += [
        "",
        f"Units: {utility['units']:,} of {utility['prompts']} held-out labelled prompts, by their utility for "
        f"{', '.join(f'`{target}`' for target in utility['targets'])}. Means over prompts with 95% intervals.",
    ]
    return lines


def _row(name: str, measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    verdict = measure["verdict"]
    shown = f"**{verdict}**" if verdict != Verdict.BETTER else verdict
    closed = f"{round(100 * measure['gap_closed'])}%" if "gap_closed" in measure else ""
    return (
        f"| {LABELS[name]} | {measure['before']:.4f} | {measure['after']:.4f} | "
        f"{measure['difference']:+.4f} ({low:+.4f} to {high:+.4f}) | {closed} | {shown} |"
    )

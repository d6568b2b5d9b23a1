"""The results: JSON, a Markdown table, and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from terselm import __version__
from terselm.config import dump_config
from terselm.evaluate.figures import EXACT, F1, GAIN, KEPT, NATS, OVERLAP, QUALITIES, SHORT, Figures
from terselm.evaluate.items import Suite
from terselm.evaluate.measurements import NO_BUDGET
from terselm.evaluate.settings import EvaluateSettings
from terselm.extras import need
from terselm.files import atomic_file
from terselm.statistics import CONFIDENCE, RESAMPLES, Interval

_TITLES = {
    GAIN: "gain retained",
    EXACT: "exact match",
    KEPT: "answer kept",
    SHORT: "SQuAD exact",
    F1: "F1",
    OVERLAP: "oracle overlap",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bert_score": "BERTScore",
    NATS: "−log p of gold, nats a token",
}
_LABELS = {GAIN: "in-context gain retained", EXACT: "exact match", KEPT: "answers kept"}  # of the picture
_LINE: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}
_SHARES = (GAIN, EXACT, KEPT, SHORT, F1, OVERLAP)  # shown as per cent


def write_results(folder: Path, settings: EvaluateSettings, suite: Suite, figures: Sequence[Figures]) -> str:
    """Write ``results.json``, ``table.md`` and ``quality.png`` into ``folder``; give the table.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    table = markdown(settings, suite, figures)
    with atomic_file(folder / "results.json") as file:
        json.dump(plain(as_json(settings, suite, figures)), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    with atomic_file(folder / "table.md") as file:
        file.write(table + "\n")
    draw_quality(folder / "quality.png", figures, title=f"{suite.name}, read by {settings.target.model}")
    return table


def as_json(settings: EvaluateSettings, suite: Suite, figures: Sequence[Figures]) -> dict[str, Any]:
    """Everything that the table shows, and what it was made with."""
    return {
        "terselm": __version__,
        "settings": dump_config(settings),
        "suite": suite.name,
        "items": len(suite.items),
        "groups": len({item.group for item in suite.items}),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "compared_with": settings.compare or settings.methods[0],
        "figures": [asdict(one) for one in figures],
    }


def markdown(settings: EvaluateSettings, suite: Suite, figures: Sequence[Figures]) -> str:
    """The table, and a line for each difference that is not shown."""
    compare = settings.compare or settings.methods[0]
    measures = [name for name in _TITLES if any(name in one.quality for one in figures)]
    timed = any(one.target_seconds is not None for one in figures)
    head = ["method", "budget", "tokens", "ratio", *(_TITLES[name] for name in measures)]
    head += [f"{_TITLES[measures[0]]}, against {compare}"] if measures else []
    head += ["compressor, ms"] + (["target, ms"] if timed else [])
    rows = [_row(one, measures, timed) for one in figures]
    groups = len({item.group for item in suite.items})
    lines = [
        f"{suite.name}: {len(suite.items)} prompts in {groups} groups, read by {settings.target.model}. "
        f"In brackets: {CONFIDENCE:.0%} intervals, paired bootstrap over groups and prompts, {RESAMPLES:,} resamples.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join([*lines, "", *differences(compare, figures)]).rstrip()


def differences(compare: str, figures: Sequence[Figures]) -> list[str]:
    """What may be said of each method against ``compare``, and what may not."""
    lines = [
        f"- {_TITLES[name]} at {one.budget}: no difference between {one.method} and {compare} is shown "
        f"({_show(name, interval, signed=True)})."
        for one in figures
        for name, interval in one.against.items()
        if name != NATS  # the gain says the same
        and one.budget != NO_BUDGET
        and not interval.shown
        and not math.isnan(interval.low)
    ]
    return lines + [
        f"- {one.method} at {one.budget}: {one.over_budget:.0%} of its prompts exceed the budget."
        for one in figures
        if one.over_budget
    ]


def _row(one: Figures, measures: Sequence[str], timed: bool) -> list[str]:
    row = [f"`{one.method}`", one.budget, f"{one.tokens:.0f}", f"{one.ratio:.1f}×"]
    row += [_show(name, one.quality[name]) if name in one.quality else "" for name in measures]
    if measures:
        row.append(_show(measures[0], one.against[measures[0]], signed=True) if measures[0] in one.against else "")
    row.append(f"{1000 * one.compressor_seconds:.1f}")
    if timed:
        row.append("" if one.target_seconds is None else f"{1000 * one.target_seconds:.0f}")
    return row


def _show(name: str, interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    scale = 100 if name in _SHARES else 1
    digits = 3 if name == NATS else 1
    value, low, high = (f"{scale * x:{sign}.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def plain(value: Any) -> Any:
    """The same with None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def draw_quality(path: Path, figures: Sequence[Figures], *, title: str) -> None:
    """Quality against tokens, with intervals: one line a method, through its budgets; references are dashed lines.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    need("matplotlib", "evaluate")
    from matplotlib.figure import Figure

    measure = next((name for name in QUALITIES if any(name in one.quality for one in figures)), None)
    if measure is None:
        return
    picture = Figure(figsize=(9, 5.5), layout="constrained")
    axes = picture.subplots()
    for method in dict.fromkeys(one.method for one in figures if one.budget != NO_BUDGET):
        points = [one for one in figures if one.method == method and measure in one.quality]
        points.sort(key=lambda one: one.tokens)
        values = [one.quality[measure] for one in points]
        axes.errorbar(
            [one.tokens for one in points],
            [value.value for value in values],
            yerr=[[max(0, v.value - v.low) for v in values], [max(0, v.high - v.value) for v in values]],
            label=method,
            **_LINE,
        )
    for one in figures:
        if one.budget == NO_BUDGET and measure in one.quality:
            axes.axhline(one.quality[measure].value, color="grey", linestyle="--", linewidth=1)
            place = 0.01, one.quality[measure].value
            axes.annotate(one.method, place, xycoords=("axes fraction", "data"), fontsize=8)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(_LABELS.get(measure, measure))
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_file(path, binary=True) as file:
        picture.savefig(file, format="png", dpi=130)

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
from terselm.evaluate.bootstrap import Estimate
from terselm.evaluate.figures import GAIN, OVERLAP, Figures
from terselm.evaluate.items import Suite
from terselm.evaluate.runner import NO_BUDGET, Entry
from terselm.evaluate.settings import EvaluateSettings
from terselm.files import atomic_file
from terselm.statistics import CONFIDENCE, RESAMPLES

_TITLES = {
    GAIN: "gain retained",
    "exact_match": "exact match",
    "answer_kept": "answer kept",
    OVERLAP: "oracle overlap",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bert_score": "BERTScore",
}
_SHARES = (GAIN, "exact_match", "answer_kept", OVERLAP)  # shown as per cent


def write_report(
    folder: Path, settings: EvaluateSettings, suite: Suite, entries: Sequence[Entry], figures: Sequence[Figures]
) -> str:
    """Write ``results.json``, ``table.md`` and ``quality.png`` into ``folder``; give the table."""
    table = markdown(settings, suite, figures)
    with atomic_file(folder / "results.json") as file:
        json.dump(plain(as_json(settings, suite, figures)), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    with atomic_file(folder / "table.md") as file:
        file.write(table + "\n")
    from terselm.evaluate.picture import draw

    draw(folder / "quality.png", figures, title=f"{suite.name}, read by {settings.target.model}")
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
    lines = []
    for one in figures:
        for name, estimate in one.against.items():
            if one.budget != NO_BUDGET and not estimate.shown and not math.isnan(estimate.low):
                lines.append(
                    f"- {_TITLES[name]} at {one.budget}: no difference between {one.method} and {compare} is shown "
                    f"({_show(name, estimate, signed=True)})."
                )
    for one in figures:
        if one.over_budget:
            lines.append(f"- {one.method} at {one.budget}: {one.over_budget:.0%} of its prompts exceed the budget.")
    return lines


def _row(one: Figures, measures: Sequence[str], timed: bool) -> list[str]:
    row = [f"`{one.method}`", one.budget, f"{one.tokens:.0f}", f"{one.ratio:.1f}×"]
    row += [_show(name, one.quality[name]) if name in one.quality else "" for name in measures]
    if measures:
        row.append(_show(measures[0], one.against[measures[0]], signed=True) if measures[0] in one.against else "")
    row.append(f"{1000 * one.compressor_seconds:.1f}")
    if timed:
        row.append("" if one.target_seconds is None else f"{1000 * one.target_seconds:.0f}")
    return row


def _show(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    scale = 100 if name in _SHARES else 1
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def plain(value: Any) -> Any:
    """The same with None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

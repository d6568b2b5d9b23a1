"""The report as one page of plots."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from terselm.files import remove_partials
from terselm.train.report.metrics import RATIOS
from terselm.train.report.text import sentence

_SHORT = {
    "spearman": "rank correlation",
    **{f"kept_overlap_{ratio}x": f"common words, {ratio}×" for ratio in RATIOS},
}
_BEFORE, _AFTER, _INK = "#9aa5b1", "#0b7285", "#343a40"


def draw_page(report: dict[str, Any], loss_history: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte, the loss by tokens and, with a target, the words; appears whole or not at all."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    rows = 1 if report["words"] is None else 2
    figure = Figure(figsize=(10, 4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    _bits_per_byte(axes[0][0], report["bits_per_byte"])
    _loss(axes[0][1], loss_history)
    if report["words"] is not None:
        _before_and_after(axes[1][0], report["words"]["measures"])
        _gap_closed(axes[1][1], report["words"]["measures"])
    towards = f" towards {report['target']}" if report["target"] else ""
    figure.suptitle(f"Alignment of {report['model']}{towards}")
    remove_partials(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(name, dpi=120)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _bits_per_byte(axes: Any, measure: dict[str, Any]) -> None:
    bars = axes.bar(["before", "after"], [measure["before"], measure["after"]], color=[_BEFORE, _AFTER], width=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=2)
    axes.set_ylabel("bits per byte of held-out responses")
    axes.set_title(sentence("bits_per_byte", measure), fontsize=9)
    _clean(axes)


def _loss(axes: Any, history: list[dict[str, Any]]) -> None:
    axes.plot([entry["tokens"] for entry in history], [entry["loss"] for entry in history], color=_AFTER)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("training loss")
    _clean(axes)


def _before_and_after(axes: Any, measures: dict[str, Any]) -> None:
    names = list(measures)[::-1]
    for row, name in enumerate(names):
        measure = measures[name]
        axes.plot([measure["before"], measure["after"]], [row, row], color=_INK, linewidth=1, zorder=1)
        axes.scatter(measure["before"], row, color=_BEFORE, zorder=3, label="before" if not row else None)
        axes.scatter(measure["after"], row, color=_AFTER, zorder=3, label="after" if not row else None)
    axes.set_yticks(range(len(names)), [_SHORT[name] for name in names])
    axes.set_xlabel("agreement with the target (1 is the target itself)")
    axes.legend(frameon=False, fontsize=8)
    _clean(axes)


def _gap_closed(axes: Any, measures: dict[str, Any]) -> None:
    names = [name for name in measures if "gap_closed" in measures[name]][::-1]
    values = [measures[name]["gap_closed"] for name in names]
    intervals = [measures[name]["gap_closed_interval"] for name in names]
    ends = [
        [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    axes.barh([_SHORT[name] for name in names], values, xerr=ends, color=_AFTER, capsize=3, height=0.5)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the way to the target (95% interval)")
    _clean(axes)


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)

"""The report in words: a table and what it says, for the terminal and the model card."""

from __future__ import annotations

from typing import Any

from terselm.train.report.metrics import RATIOS, Verdict

LABELS = {
    "bits_per_byte": "bits per byte",
    "spearman": "rank correlation of word surprisals",
    **{f"kept_overlap_{ratio}x": f"kept words in common at {ratio}×" for ratio in RATIOS},
}


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
        f"Bits per byte: {bits['records']} held-out responses to {bits['prompts']} prompts. Intervals: paired "
        "bootstrap over prompts.",
    ]
    if words is not None:
        lines.append(
            f"Words: {words['words']:,} words of {words['texts']} held-out texts, compared with `{report['target']}`. "
            "Rank correlation is Spearman's, the mean over texts. Words in common: of the words that the small LM "
            "would keep, the share that the target itself would keep, if each kept its most surprising ones."
        )
    return "\n".join(lines)


def _row(name: str, measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    verdict = measure["verdict"]
    said = f"**{verdict}**" if verdict != Verdict.BETTER else verdict
    closed = f"{round(100 * measure['gap_closed'])}%" if "gap_closed" in measure else ""
    return (
        f"| {LABELS[name]} | {measure['before']:.4f} | {measure['after']:.4f} | "
        f"{measure['difference']:+.4f} ({low:+.4f} to {high:+.4f}) | {closed} | {said} |"
    )

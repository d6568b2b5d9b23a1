"""The alignment report of a finished run: ``report.json`` and one page of plots in its folder."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.compress.length import plain_backend
from terselm.config import load_config
from terselm.errors import CheckpointError
from terselm.files import atomic_file, remove_partials
from terselm.models import load_causal_lm
from terselm.models.scoring import RowScorer, Window
from terselm.progress import say
from terselm.statistics import Floats, word_spans, word_surprisals
from terselm.train.provenance import describe_hardware, describe_versions, read_json
from terselm.train.report.measures import (
    LEAST_WORDS,
    RANKERS,
    SHORT_LABELS,
    UTILITY_LABELS,
    compare_words,
    sentence,
    verdict_on,
)
from terselm.train.run_folder import ADAPTER, MODEL, clear_disk_errors
from terselm.train.settings import AlignSettings

REPORT = "report.json"
PAGE = "report.png"
HELD_OUT = "held_out.jsonl"

_BEFORE, _AFTER, _INK = "#9aa5b1", "#0b7285", "#343a40"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How the words of held-out text are measured.

    Attributes:
        target: the target LLM; by default that of the run's config, if it names one.
        device, dtype: as `load_causal_lm` takes them. In float32 an adapter that changes little still counts whole.
    """

    target: str | None = None
    device: str = "auto"
    dtype: str = "float32"


def report_target(settings: AlignSettings) -> str | None:
    """The local target that a run's report compares with, if there is one; one that only labels are of need not be."""
    return settings.report.target or (settings.objective.target if settings.objective.compares else "") or None


def write_alignment_report(run: Path, measurement: ReportOptions) -> dict[str, Any]:
    """Measure, and write ``report.json`` and ``report.png`` into the run folder.

    Raises:
        CheckpointError: the run is not finished or damaged, or the disk is full.
        ModelError: a model cannot be loaded.
    """
    if not any((run / name).is_dir() for name in (ADAPTER, MODEL)):
        raise CheckpointError(f"{run} holds no finished run: there is no adapter in it; run the alignment first")
    metrics = read_json(run / "metrics.json")
    settings = load_config(AlignSettings, run / "config.yaml")
    target = measurement.target or report_target(settings)
    report: dict[str, Any] = {
        "model": settings.model,
        "target": target,
        "bits_per_byte": _bits_per_byte(metrics),
        "words": None,
        "utility": metrics.get("utility"),
        "training": {name: metrics["training"][name] for name in ("steps", "tokens_seen")},
    }
    if target is not None:
        report["words"] = _words(run, settings, target, measurement)
    report["versions"], report["hardware"] = describe_versions(), describe_hardware()
    with clear_disk_errors(run, "the report could not be written; the run is not touched"):
        for name in (REPORT, PAGE):
            remove_partials(run / name)
        if find_spec("matplotlib") is None:
            say("the report has no page of plots: pip install matplotlib")
        else:
            _draw_page(report, metrics["loss_history"], run / PAGE)
        with atomic_file(run / REPORT) as file:  # last: where it is, the report is whole
            json.dump(report, file, indent=2, allow_nan=False)
            file.write("\n")
    return report


def read_report(run: Path) -> dict[str, Any] | None:
    """What `write_alignment_report` wrote; None if it has not."""
    path = run / REPORT
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is damaged; write it again with terselm report {run}") from None
    return value


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """One held-out text, prompt and response, as the compressor would read it.

    Attributes:
        prompt: number of the prompt that it answers.
    """

    prompt: int
    text: str


def write_held_out_texts(
    run: Path, prompt_of: NDArray[np.int64], texts: Sequence[str], *, most: int, seed: int
) -> None:
    """Note what the report reads, drawn at random where there is more; a run can be reported on without its data."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(texts))[:most])
    with atomic_file(run / HELD_OUT) as file:
        for index in drawn:
            line = {"prompt": int(prompt_of[index]), "text": texts[index]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_held_out_texts(run: Path) -> list[ReportText]:
    """What `write_held_out_texts` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = run / HELD_OUT
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [ReportText(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path} is missing or damaged; run the alignment again to report on it") from None


def read_words(names: Sequence[str], texts: Sequence[str], *, device: str, dtype: str) -> Iterator[list[Floats]]:
    """Surprisal of each word of each text, in nats, under each model; one model is in memory at a time.

    Texts are read as the target's opinions are in training: longer ones than a model's window in windows that overlap
    by half. Up to that length the compressor reads them so, too.

    Raises:
        ModelError: a model cannot be loaded.
    """
    for name in names:
        lm = load_causal_lm(name, device=device, dtype=dtype)
        encodings = plain_backend(lm.tokenizer).encode_batch(list(texts), add_special_tokens=False)
        scores = dict(RowScorer(lm).score([encoding.ids for encoding in encodings], window=Window.OVERLAP))
        yield [
            word_surprisals(text, encoding.offsets, scores[index].nats)
            for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True))
        ]
        del lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _bits_per_byte(metrics: dict[str, Any]) -> dict[str, Any]:
    """In the form of `Measure.describe`; measured on the responses when the run ended."""
    held_out = metrics["held_out"]
    low, high = held_out["difference"]["bits_per_byte_interval"]
    return {
        **{name: held_out[name]["bits_per_byte"] for name in ("before", "after", "difference")},
        "interval": [low, high],
        **{name: held_out["difference"][name] for name in ("confidence", "resamples")},
        "verdict": verdict_on((low, high), higher_is_better=False).value,
        **{name: held_out[name] for name in ("prompts", "records")},
    }


def _words(run: Path, settings: AlignSettings, target: str, measurement: ReportOptions) -> dict[str, Any]:
    texts = read_held_out_texts(run)
    long = [text for text in texts if len(word_spans(text.text)) >= LEAST_WORDS]
    if not long:
        raise CheckpointError(f"none of the {len(texts)} held-out texts of {run} has {LEAST_WORDS} words to compare")
    say(f"reading {len(long)} held-out texts with {settings.model}, {run} and {target}")
    names, dtype = [settings.model, str(run), target], measurement.dtype
    before, after, theirs = read_words(names, [text.text for text in long], device=measurement.device, dtype=dtype)
    measures = compare_words(before, after, theirs, [text.prompt for text in long])
    return {
        "texts": len(long),
        "prompts": len({text.prompt for text in long}),
        "words": sum(len(text.text.split()) for text in long),
        "too_short": len(texts) - len(long),
        "dtype": dtype,
        "measures": {name: measure.describe(settings.seed) for name, measure in measures.items()},
    }


def _draw_page(report: dict[str, Any], loss_history: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte, the loss by tokens and, with a target, the words; appears whole or not at all."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    rows = 1 + (report["words"] is not None) + (report["utility"] is not None)
    figure = Figure(figsize=(12, 4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    bits, losses = axes[0]
    measure = report["bits_per_byte"]
    bars = bits.bar(["before", "after"], [measure["before"], measure["after"]], color=[_BEFORE, _AFTER], width=0.6)
    bits.bar_label(bars, fmt="%.3f", padding=2)
    bits.set_ylabel("bits per byte of held-out text")
    bits.set_title(sentence("bits_per_byte", measure), fontsize=9)
    losses.plot([entry["tokens"] for entry in loss_history], [entry["loss"] for entry in loss_history], color=_AFTER)
    losses.set_xlabel("training tokens")
    losses.set_ylabel("training loss")
    if report["words"] is not None:
        _plot_before_and_after(axes[1][0], report["words"]["measures"])
        _plot_gap_closed(axes[1][1], report["words"]["measures"])
    if report["utility"] is not None:
        _plot_rankers(axes[-1][0], report["utility"], ("spearman",))
        _plot_rankers(axes[-1][1], report["utility"], ("best_first", "best_in_10", "best_in_25"))
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    towards = f" towards {report['target']}" if report["target"] else ""
    figure.suptitle(f"Alignment of {report['model']}{towards}")
    with atomic_file(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120)


def _plot_before_and_after(axes: Any, measures: dict[str, Any]) -> None:
    names = list(measures)[::-1]
    for row, name in enumerate(names):
        measure = measures[name]
        axes.plot([measure["before"], measure["after"]], [row, row], color=_INK, linewidth=1, zorder=1)
        axes.scatter(measure["before"], row, color=_BEFORE, zorder=3, label="before" if not row else None)
        axes.scatter(measure["after"], row, color=_AFTER, zorder=3, label="after" if not row else None)
    axes.set_yticks(range(len(names)), [SHORT_LABELS[name] for name in names])
    axes.set_xlabel("agreement with the target (1 is the target itself)")
    axes.legend(frameon=False, fontsize=8)


def _plot_rankers(axes: Any, utility: dict[str, Any], measures: Sequence[str]) -> None:
    """A bar with its interval for each measure and ranker."""
    rankers = utility["rankers"]
    height = 0.8 / len(rankers)
    for number, (ranker, color) in enumerate(zip(rankers, (_AFTER, _BEFORE, _INK), strict=False)):
        values = [rankers[ranker][measure]["value"] for measure in measures]
        intervals = [rankers[ranker][measure]["interval"] for measure in measures]
        ends = [
            [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
        ]
        places = [row + (number - (len(rankers) - 1) / 2) * height for row in range(len(measures))]
        axes.barh(places, values, xerr=ends, height=0.9 * height, color=color, capsize=2, label=RANKERS[ranker])
    axes.set_yticks(range(len(measures)), [UTILITY_LABELS[measure] for measure in measures])
    axes.invert_yaxis()
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_xlabel(f"{utility['prompts']} held-out labelled prompts (95% interval)")
    axes.legend(frameon=False, fontsize=8, ncols=len(rankers), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _plot_gap_closed(axes: Any, measures: dict[str, Any]) -> None:
    names = [name for name in measures if "gap_closed" in measures[name]][::-1]
    values = [measures[name]["gap_closed"] for name in names]
    intervals = [measures[name]["gap_closed_interval"] for name in names]
    ends = [
        [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)],
    ]
    axes.barh([SHORT_LABELS[name] for name in names], values, xerr=ends, color=_AFTER, capsize=3, height=0.5)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the way to the target (95% interval)")

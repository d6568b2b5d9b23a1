"""The alignment report of a finished run: ``report.json`` and one page of plots in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from terselm.config import load_config
from terselm.errors import CheckpointError
from terselm.files import atomic_file, remove_partials
from terselm.train.config import AlignConfig
from terselm.train.hardware import describe_hardware, describe_versions
from terselm.train.progress import say
from terselm.train.report.metrics import LEAST_WORDS, compare_words, judge
from terselm.train.report.page import draw_page
from terselm.train.report.reading import ReportText, read_texts, read_words
from terselm.train.run_folder import ADAPTER, MODEL
from terselm.train.saving import clear_disk_errors

REPORT = "report.json"
PAGE = "report.png"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How the words of held-out text are measured.

    Attributes:
        target: the target LLM; by default that of the run's config, if it names one.
        device, dtype: as `load_causal_lm` takes them. In float32 an adapter that changes little still counts whole.
    """

    target: str | None = None
    device: str = "auto"
    dtype: str = "float32"


def report_target(config: AlignConfig) -> str | None:
    """The local target that a run's report compares with, if there is one."""
    return config.report.target or config.objective.target or None


def write_report(run: Path, measurement: Measurement) -> dict[str, Any]:
    """Measure, and write ``report.json`` and ``report.png`` into the run folder.

    Raises:
        CheckpointError: the run is not finished or damaged, or the disk is full.
        ModelError: a model cannot be loaded.
    """
    if not any((run / name).is_dir() for name in (ADAPTER, MODEL)):
        raise CheckpointError(f"{run} holds no finished run: there is no adapter in it; run the alignment first")
    metrics = _read_metrics(run)
    config = load_config(AlignConfig, run / "config.yaml")
    target = measurement.target or report_target(config)
    report: dict[str, Any] = {
        "model": config.model,
        "target": target,
        "bits_per_byte": _bits_per_byte(metrics),
        "words": None,
        "training": {name: metrics["training"][name] for name in ("steps", "tokens_seen")},
    }
    if target is not None:
        report["words"] = _words(run, config, target, measurement)
    report["versions"], report["hardware"] = describe_versions(), describe_hardware()
    with clear_disk_errors(run, "the report could not be written; the run is not touched"):
        remove_partials(run / REPORT)
        if find_spec("matplotlib") is None:
            say("the report has no page of plots: pip install matplotlib")
        else:
            draw_page(report, metrics["loss_history"], run / PAGE)
        with atomic_file(run / REPORT) as file:  # last: where it is, the report is whole
            json.dump(report, file, indent=2, allow_nan=False)
            file.write("\n")
    return report


def read_report(run: Path) -> dict[str, Any] | None:
    """What `write_report` wrote; None if it has not."""
    path = run / REPORT
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is damaged; write it again with terselm report {run}") from None
    return value


def _bits_per_byte(metrics: dict[str, Any]) -> dict[str, Any]:
    """In the form of `Measure.describe`; measured on the responses when the run ended."""
    held_out = metrics["held_out"]
    difference = held_out["difference"]
    low, high = difference["bits_per_byte_interval"]
    return {
        "before": held_out["before"]["bits_per_byte"],
        "after": held_out["after"]["bits_per_byte"],
        "difference": difference["bits_per_byte"],
        "interval": [low, high],
        "confidence": difference["confidence"],
        "resamples": difference["resamples"],
        "verdict": judge((low, high), higher_is_better=False).value,
        "prompts": held_out["prompts"],
        "records": held_out["records"],
    }


def _words(run: Path, config: AlignConfig, target: str, measurement: Measurement) -> dict[str, Any]:
    texts = read_texts(run)
    long = [text for text in texts if text.has_enough_words]
    if not long:
        raise CheckpointError(f"none of the {len(texts)} held-out texts of {run} has {LEAST_WORDS} words to compare")
    measures = _measure(run, config, target, measurement, long)
    return {
        "texts": len(long),
        "prompts": len({text.prompt for text in long}),
        "words": sum(len(text.text.split()) for text in long),
        "too_short": len(texts) - len(long),
        "dtype": measurement.dtype,
        "measures": measures,
    }


def _measure(
    run: Path, config: AlignConfig, target: str, measurement: Measurement, texts: list[ReportText]
) -> dict[str, Any]:
    say(f"reading {len(texts)} held-out texts with {config.model}, {run} and {target}")
    before, after, theirs = read_words(
        [config.model, str(run), target],
        [text.text for text in texts],
        device=measurement.device,
        dtype=measurement.dtype,
    )
    measures = compare_words(before, after, theirs, [text.prompt for text in texts])
    return {name: measure.describe(config.seed) for name, measure in measures.items()}


def _read_metrics(run: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{run / 'metrics.json'} is missing or damaged; run the alignment again") from None
    return value

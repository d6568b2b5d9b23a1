"""Old import paths: they go on working, and say where their contents are now."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_EVALUATION = {
    "bootstrap": "statistics", "budgets": "evaluate.settings", "candidates": "evaluate.tune",
    "endpoint": "evaluate.targets", "evaluate": "evaluate.run", "ours": "evaluate.methods",
    "overlap": "evaluate.methods", "own": "evaluate.suites", "picture": "evaluate.report",
    "runner": "evaluate.run evaluate.measurements", "sources": "data.rows", "text_metrics": "evaluate.answers",
    "methods": "evaluate.methods evaluate.opening", "yaml_config": "evaluate.tune", "gsm8k": "evaluate.suites",
    "bbh": "evaluate.suites", "documents": "evaluate.suites",
    **{
        name: f"evaluate.{name}"
        for name in ("answers", "baselines", "figures", "items", "opening", "peer", "report", "settings", "suites",
                     "targets", "tune")
    },
}  # fmt: skip

MOVED: dict[str, str] = {
    "compress.anchor": "compress.budget", "compress.cache": "compress.engine.surprisal",
    "compress.counter": "compress.length", "compress.evaluation": "evaluate",
    "compress.forward": "compress.engine.surprisal", "compress.graphs": "compress.engine.graphs",
    "compress.intervals": "statistics", "compress.protect": "compress.prompt",
    "compress.reader": "compress.engine.reader",
    "compress.stages": "compress.pipeline", "compress.surprisal": "compress.engine.surprisal",
    "compress.target": "compress.length", "compress.units": "compress.layout", "compress.words": "statistics",
    "compress.bulk.parquet": "compress.bulk.files", "compress.bulk.settings": "compress.bulk",
    "compress.bulk.work": "compress.bulk",
    "data.jsonl": "data.rows", "data.sources": "data.instructions", "data.sources.clean": "data.instructions",
    "data.sources.load": "data.instructions", "data.sources.rows": "data.rows", "data.summaries": "data.records",
    "data.texts": "data.schema", "models.convert": "models.aliases",
    "data.collection.batch_files": "data.collection.batch", "data.collection.client": "data.collection.endpoint",
    "data.collection.commits": "data.collection.remote", "data.collection.entries": "data.collection.ledger",
    "data.collection.failures": "data.collection.endpoint", "data.collection.interrupts": "data.collection.remote",
    "data.collection.judge": "data.collection.outcome", "data.collection.limits": "data.collection.admission",
    "data.collection.memory": "data.collection.local",
    "data.collection.money": "data.collection.admission data.collection.settings",
    "data.collection.progress": "data.collection.outcome progress",
    "data.collection.responses": "data.collection.endpoint", "data.collection.sizes": "data.collection.admission",
    "data.collection.status": "data.collection.ledger", "data.collection.summary": "data.collection.collect",
    "data.collection.tasks": "data.collection.remote", "data.collection.token_scores": "data.collection.scores",
    "data.collection.verdicts": "data.collection.outcome",
    "train.batches": "train.trainer train.packing", "train.choices": "train.settings", "train.config": "train.settings",
    "train.dry_run": "train.fitting", "train.evaluation": "train.held_out", "train.gathering": "train.model",
    "train.hub": "train.publish", "train.log_probabilities": "train.surprisals", "train.lora": "train.model",
    "train.progress": "train.callbacks progress train.hardware", "train.reload": "train.verify",
    "train.run": "train.alignment", "train.saving": "train.run_folder", "train.scoring": "train.surprisals",
    "train.small_lm": "train.model", "train.sources": "train.texts train.text_cache", "train.speed": "train.hardware",
    "train.store": "train.text_cache", "train.templates": "train.examples", "train.trackers": "train.callbacks",
    "train.varlen": "train.attention", "train.report.metrics": "train.report.measures",
    "train.report.page": "train.report.report", "train.report.reading": "train.report.report",
    "train.report.text": "train.report.measures",
    **{
        f"train.objectives.{name}": "train.objectives"
        for name in ("base", "divergence", "matching", "mixture", "nll", "ranking", "words")
    },
    **{f"compress.evaluation.{name}": home for name, home in _EVALUATION.items()},
}  # fmt: skip
"""An old module, and the modules that hold its contents now; all below ``terselm``."""

RENAMED: dict[str, str] = {
    "compress.evaluation.bootstrap.Estimate": "Interval", "compress.evaluation.budgets.Budget": "EvaluationBudget",
    "compress.evaluation.methods.Method": "EvaluationMethod", "compress.evaluation.runner.Run": "Evaluation",
    "compress.evaluation.runner.Entry": "Measurement", "compress.evaluation.picture.draw": "draw_quality",
    "compress.evaluation.report.write_report": "write_results",
    "compress.reader.Reader": "ScoreReader", "compress.target.Target": "Length",
    "data.collection.failures.Reason": "FailureCause", "data.collection.judge.judge": "drawn",
    "data.collection.money.Budget": "SpendingLimit", "data.collection.progress.Progress": "CollectionProgress",
    "train.choices.Method": "TrainingMethod", "train.config.AlignConfig": "AlignSettings",
    "train.config.Method": "TrainingMethod", "train.dry_run.Estimate": "DryRunEstimate",
    "train.evaluation.compare": "compare_scores", "train.evaluation.score": "score_held_out",
    "train.progress.Progress": "TrainingProgress", "train.report.metrics.judge": "verdict_on",
    "train.run.Run": "AlignmentRun", "train.run.prepare": "prepare_run", "train.sources.Source": "RecordSource",
    "train.sources.combined": "combined_fingerprint", "train.sources.draw": "examples_of_epoch",
    "train.scoring.score_instead_of_logits": "give_surprisals", "train.speed.tune": "apply_engine",
    "train.templates.render": "render_record", "train.varlen.is_available": "has_varlen_kernel",
}  # fmt: skip
"""A name in its old module, and what it is called now."""


class OldPaths(MetaPathFinder, Loader):
    """Finds modules that have moved, after all other finders have looked."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A module that looks its names up in the new places; None where the path never was one of ours."""
        old = fullname.removeprefix("terselm.")
        if old not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=any(other.startswith(f"{old}.") for other in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its look-up of names, and tell the importing line where to look."""
        old = module.__name__.removeprefix("terselm.")
        homes = [f"terselm.{home}" for home in MOVED[old].split()]
        now = " and ".join(homes)

        def find(name: str) -> Any:
            current = RENAMED.get(f"{old}.{name}", name)
            for home in homes if not name.startswith("__") else ():
                if hasattr(found := import_module(home), current):
                    return getattr(found, current)
            raise AttributeError(f"module {module.__name__!r} has moved to {now}, which has no {current!r}")

        module.__dict__["__getattr__"] = find
        warnings.warn(f"{module.__name__} has moved to {now}", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Let imports find the old paths."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())

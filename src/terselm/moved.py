"""Old import paths: they go on working, and say where their contents are now."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_EVALUATION = {
    "bootstrap": "statistics", "budgets": "evaluate.settings", "candidates": "evaluate.tune",
    "endpoint": "evaluate.targets", "evaluate": "evaluate.run", "methods": "evaluate.methods evaluate.opening",
    "ours": "evaluate.methods", "overlap": "evaluate.methods", "runner": "evaluate.run evaluate.measurements",
    "sources": "data.rows", "text_metrics": "evaluate.answers", "yaml_config": "evaluate.tune",
    "answers": "evaluate.answers", "baselines": "evaluate.baselines", "figures": "evaluate.figures",
    "items": "evaluate.items", "opening": "evaluate.opening", "peer": "evaluate.peer", "report": "evaluate.report",
    "settings": "evaluate.settings", "suites": "evaluate.suites", "targets": "evaluate.targets",
    "tune": "evaluate.tune",
}  # fmt: skip

MOVED: dict[str, str] = {
    "compress.counter": "compress.length", "compress.evaluation": "evaluate", "compress.intervals": "statistics",
    "compress.protect": "compress.prompt", "compress.surprisal": "compress.engine.surprisal",
    "compress.target": "compress.length", "compress.units": "compress.layout", "compress.words": "statistics",
    "compress.fit": "compress.length", "compress.bulk.work": "compress.bulk", "compress.bulk.settings": "compress.bulk",
    "data.jsonl": "data.rows", "data.sources": "data.instructions",
    "data.sources.clean": "data.instructions", "data.sources.load": "data.instructions",
    "data.sources.rows": "data.rows", "data.summaries": "data.records", "data.texts": "data.schema",
    "data.score": "data.logprobs", "data.collection.export": "data.collection.collect",
    "data.collection.status": "data.collection.ledger", "models.convert": "models.aliases",
    "train.choices": "train.settings", "train.config": "train.settings", "train.evaluation": "train.held_out",
    "train.hub": "train.publish", "train.report.metrics": "train.report.measures",
    "train.report.reading": "train.report.report", "train.report.text": "train.report.measures",
    "train.sources": "train.texts train.text_cache", "train.speed": "train.hardware",
    "train.templates": "train.examples",
    **{f"compress.evaluation.{name}": home for name, home in _EVALUATION.items()},
}  # fmt: skip
"""An old module, and the modules that hold its contents now; all below ``terselm``."""

RENAMED: dict[str, str] = {
    "compress.evaluation.bootstrap.Estimate": "Interval", "compress.evaluation.budgets.Budget": "EvaluationBudget",
    "compress.evaluation.methods.Method": "EvaluationMethod", "compress.evaluation.runner.Run": "Evaluation",
    "compress.target.Target": "Length",
    "train.choices.Method": "TrainingMethod", "train.config.AlignConfig": "AlignSettings",
    "train.sources.Source": "RecordSource",
}  # fmt: skip
"""A name in its old module, and what it is called now."""


class OldPath(Loader):
    """Stands for modules that have moved."""

    @classmethod
    def spec(cls, fullname: str) -> ModuleSpec | None:
        """A module that looks its names up in the new places; None where the path never was one of ours."""
        old = fullname.removeprefix("terselm.")
        if old not in MOVED:
            return None
        return ModuleSpec(fullname, cls(), is_package=any(other.startswith(f"{old}.") for other in MOVED))

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

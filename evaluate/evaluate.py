"""`evaluate`: measure, compute, write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from terselm.evaluate.figures import Figures, Figuring
from terselm.evaluate.methods import Method
from terselm.evaluate.report import write_report
from terselm.evaluate.runner import Run
from terselm.evaluate.settings import EvaluateSettings
from terselm.evaluate.targets import Target


def evaluate(
    settings: EvaluateSettings,
    folder: Path,
    target: Target | None = None,
    methods: Mapping[str, Method] | None = None,
) -> tuple[list[Figures], str]:
    """Evaluate into ``folder``: a journal, ``results.json``, ``table.md``, ``quality.png``.

    Args:
        target: instead of the one that the settings name.
        methods: your own methods by name, which ``settings.methods`` may name too.

    Returns:
        the figures and the Markdown table.
    """
    run = Run(settings, folder, target, methods)
    entries = run.measure()
    figures = Figuring(settings, run.suite, entries).all()
    return figures, write_report(folder, settings, run.suite, entries, figures)

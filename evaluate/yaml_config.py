"""Settings as a file that `PromptCompressor` and ``terselm compress --config`` load."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from terselm.compress.settings import CompressionSettings
from terselm.evaluate.figures import GAIN, Figures
from terselm.files import atomic_file

_NOT_TUNED = ("ablations", "cache_bytes")


def write_config(path: Path, settings: CompressionSettings, found: Figures, model: str) -> None:
    """Write settings, below a line that says how they are used and what they were measured to keep."""
    option = f"--rate {found.budget}" if found.budget.startswith(("0.", ".")) else f"--budget {found.tokens:.0f}"
    gain = found.quality[GAIN]
    lines = [
        f"# terselm compress --model {model} --config {path.name} {option} --prompt prompt.json",
        f"# Kept {gain.value:.0%} of the in-context gain (95% interval {gain.low:.0%} to {gain.high:.0%}, "
        f"{found.items} prompts) in {found.tokens:.0f} tokens on average, {found.ratio:.1f} times fewer.",
    ]
    names = [field.name for field in fields(settings) if field.name not in _NOT_TUNED]
    lines += [f"{name}: {json.dumps(getattr(settings, name))}" for name in names]  # JSON is YAML
    with atomic_file(path) as file:
        file.write("\n".join(lines) + "\n")

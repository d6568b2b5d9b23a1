"""Quality against tokens, with intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from terselm.errors import ConfigError
from terselm.evaluate.figures import QUALITIES, Figures
from terselm.evaluate.runner import NO_BUDGET
from terselm.files import atomic_folder

_LABELS = {"gain_retained": "in-context gain retained", "exact_match": "exact match", "answer_kept": "answers kept"}


def draw(path: Path, figures: Sequence[Figures], *, title: str) -> None:
    """One line a method, through its budgets; the whole prompt is a dashed line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the picture needs matplotlib; run: pip install 'terselm[evaluate]'") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    measure = next((name for name in QUALITIES if any(name in one.quality for one in figures)), None)
    if measure is None:
        return
    picture = Figure(figsize=(9, 5.5), layout="constrained")
    axes = picture.subplots()
    for method in dict.fromkeys(one.method for one in figures if one.budget != NO_BUDGET):
        points = sorted(
            (one for one in figures if one.method == method and measure in one.quality), key=lambda one: one.tokens
        )
        values = [one.quality[measure] for one in points]
        axes.errorbar(
            [one.tokens for one in points],
            [value.value for value in values],
            yerr=[[max(0, v.value - v.low) for v in values], [max(0, v.high - v.value) for v in values]],
            label=method,
            marker="o",
            markersize=4,
            linewidth=1,
            capsize=2,
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
    image = io.BytesIO()
    picture.savefig(image, format="png", dpi=130)
    write_bytes(path, image.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """A binary file that appears whole or not at all."""
    scratch = path.with_name(f"{path.name}.making")
    with atomic_folder(scratch) as folder:
        (folder / path.name).write_bytes(content)
    (scratch / path.name).replace(path)
    scratch.rmdir()

"""The settings that `tune` tries: shapes first, then one setting at a time around the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from terselm.compress.settings import (
    PAPER_INSTRUCTION_RATE,
    PAPER_QUESTION_RATE,
    AnchorOrder,
    CompressionSettings,
    UnitKind,
    paper_settings,
)

_THINNED = CompressionSettings(anchor=0.0)  # what is not question or instruction, token by token

_AROUND: dict[str, tuple[Any, ...]] = {
    "k": (1.0, 1.2, 1.5, 2.0, 3.0),
    "anchor": (0.0, 0.3, 0.5, 0.7, 1.0),
    "anchor_by": tuple(AnchorOrder),
    "unit": tuple(UnitKind),
    "segment_size": (50, 100, 200, 400),
    "question_rate": (None, PAPER_QUESTION_RATE),
    "instruction_rate": (None, PAPER_INSTRUCTION_RATE),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings under a name that says how they differ from the defaults."""

    settings: CompressionSettings

    @property
    def name(self) -> str:
        default = CompressionSettings()
        told = [
            f"{field}={getattr(self.settings, field)}"
            for field in _AROUND
            if getattr(self.settings, field) != getattr(default, field)
        ]
        return f"terselm:{','.join(told)}" if told else "terselm"


def shapes() -> list[Candidate]:
    """The defaults and what differs from them in kind, the most promising first, for a search that runs out of time."""
    return [
        Candidate(settings=settings)
        for settings in (
            CompressionSettings(),
            replace(_THINNED, anchor=1.0),
            _THINNED,
            replace(_THINNED, anchor=0.5, unit=UnitKind.LINE),
            replace(_THINNED, unit=UnitKind.DEMONSTRATION),
            replace(_THINNED, anchor=1.0, anchor_by=AnchorOrder.LAST),
            paper_settings(),
            replace(_THINNED, anchor=0.5, unit=UnitKind.SENTENCE),
            replace(_THINNED, k=1.2),
            replace(_THINNED, anchor=0.7),
            replace(_THINNED, unit=UnitKind.LINE),
            replace(_THINNED, unit=UnitKind.WORD),
        )
    ]


def around(best: CompressionSettings) -> Iterator[Candidate]:
    """All that differ from ``best`` in one setting that makes a difference there."""
    for field, values in _AROUND.items():
        if _idle(best, field):
            continue
        for value in values:
            if value != getattr(best, field):
                yield Candidate(settings=replace(best, **{field: value}))


def _idle(settings: CompressionSettings, field: str) -> bool:
    """Whether a setting decides nothing."""
    whole_only = settings.anchor == 1 or settings.unit is UnitKind.DEMONSTRATION
    if field in ("k", "segment_size"):
        return whole_only
    return field == "anchor_by" and settings.anchor == 0

"""The settings that `tune` tries: shapes first, then one setting at a time around the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from terselm.compress.settings import AnchorOrder, CompressionSettings, UnitKind

_WHOLE = CompressionSettings(question_rate=1.0, instruction_rate=1.0)

_AROUND: dict[str, tuple[Any, ...]] = {
    "k": (1.0, 1.2, 1.5, 2.0, 3.0),
    "anchor": (0.0, 0.3, 0.6, 0.8, 1.0),
    "anchor_by": tuple(AnchorOrder),
    "unit": tuple(UnitKind),
    "segment_size": (50, 100, 200, 400),
    "question_rate": (0.9, 1.0),
    "instruction_rate": (0.85, 1.0),
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
    whole = _WHOLE
    return [
        Candidate(settings=settings)
        for settings in (
            CompressionSettings(),
            whole,
            replace(whole, anchor=1.0, anchor_by=AnchorOrder.SHORTEST),
            replace(whole, anchor=1.0),
            replace(whole, unit=UnitKind.DEMONSTRATION),
            replace(whole, k=1.2),
            replace(whole, anchor=0.6, anchor_by=AnchorOrder.SHORTEST),
            replace(whole, anchor=1.0, unit=UnitKind.DEMONSTRATION),
            replace(whole, anchor=1.0, anchor_by=AnchorOrder.SHORTEST, unit=UnitKind.SENTENCE),
            replace(whole, unit=UnitKind.SENTENCE),
            replace(whole, unit=UnitKind.WORD),
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

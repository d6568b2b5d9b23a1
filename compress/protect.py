"""Spans of text that must survive."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum

from terselm.errors import ConfigError


class Preset(StrEnum):
    """Kinds of span that callers often want to keep."""

    NUMBERS = "numbers"
    URLS = "urls"
    CODE_FENCES = "code_fences"


Keep = str | re.Pattern[str] | Preset

_PATTERNS = {
    Preset.NUMBERS: re.compile(r"[+-]?\d+(?:[.,:/]\d+)*%?"),
    Preset.URLS: re.compile(r"(?:https?|ftp)://[^\s<>\"')\]]+|www\.[^\s<>\"')\]]+"),
    Preset.CODE_FENCES: re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE),
}


def compile_keep(keep: Sequence[Keep]) -> list[re.Pattern[str]]:
    """Patterns for literal strings, compiled regular expressions and presets.

    Raises:
        ConfigError: an empty literal, or something of another type.
    """
    if isinstance(keep, str | re.Pattern):
        keep = [keep]
    patterns = []
    for item in keep:
        if isinstance(item, Preset):
            patterns.append(_PATTERNS[item])
        elif isinstance(item, re.Pattern) and isinstance(item.pattern, str):
            patterns.append(item)
        elif isinstance(item, str) and item:
            patterns.append(re.compile(re.escape(item)))
        else:
            raise ConfigError(f"keep holds {item!r}; expected a non-empty string, a compiled str pattern or a Preset")
    return patterns


def protected_spans(text: str, patterns: Sequence[re.Pattern[str]]) -> Iterator[tuple[int, int]]:
    """Start and end (characters) of every match that is not empty."""
    for pattern in patterns:
        for match in pattern.finditer(text):
            if match.end() > match.start():
                yield match.span()

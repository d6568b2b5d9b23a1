"""Section 0 of docs/algorithm.md for the brute-force reference: units, pieces, protected spans, text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from terselm.compress.context import unit_kind

Keep = str | re.Pattern[str]
Token = tuple[int, int, int]  # id, start, end (characters in the piece)


@dataclass(eq=False)
class Unit:
    """The smallest thing that is kept or dropped; ``piece`` numbers the pieces that are not empty."""

    part: str
    index: int
    piece: int
    text: str
    start: int
    end: int
    ids: list[int]
    protected: bool = False
    surprisal: float | None = None
    segment: int | None = None
    margin: float | None = 0.0  # None: not to be taken back
    utility: float | None = None

    @property
    def cost(self) -> int:
        return len(self.ids)

    @property
    def score(self) -> float:
        assert self.surprisal is not None
        return self.surprisal / self.cost


@dataclass(eq=False)
class Piece:
    part: str
    index: int
    text: str
    units: list[Unit]
    perplexity: float = 0.0

    @property
    def free(self) -> int:
        return sum(unit.cost for unit in self.units if not unit.protected)


def tokenise(tokenizer: Any, text: str) -> list[Token]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return [(i, start, end) for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def cut_into_units(tokens: Sequence[Token], length: int) -> list[tuple[list[int], int, int]]:
    """Token ids, start and end of each unit (rules 1-3)."""
    groups: list[tuple[list[int], int]] = []  # ids, end
    waiting: list[int] = []  # tokens without characters
    for token, start, end in tokens:
        if start == end:
            waiting.append(token)
        elif groups and start < groups[-1][1]:
            ids, so_far = groups[-1]
            groups[-1] = ([*ids, *waiting, token], max(so_far, end))
            waiting = []
        else:
            groups.append(([*waiting, token], end))
            waiting = []
    if waiting and groups:
        groups[-1] = ([*groups[-1][0], *waiting], groups[-1][1])
    elif waiting:
        groups = [(waiting, length)]
    starts = [0, *(end for _, end in groups[:-1])]
    ends = [*(end for _, end in groups[:-1]), length]
    return [(ids, start, end) for (ids, _), start, end in zip(groups, starts, ends, strict=False)]


def cut_into_words(text: str, units: list[tuple[list[int], int, int]]) -> list[tuple[list[int], int, int]]:
    """Rule 4."""
    words: list[tuple[list[int], int, int]] = []
    for ids, start, end in units:
        blank_so_far = bool(words) and text[words[-1][1] : start].isspace()
        begins = not words or text[start].isspace() or text[start - 1].isspace()
        if begins and not blank_so_far:
            words.append((ids, start, end))
        else:
            words[-1] = ([*words[-1][0], *ids], words[-1][1], end)
    if len(words) > 1 and text[words[-1][1] : words[-1][2]].isspace():
        ids, _, end = words.pop()
        words[-1] = ([*words[-1][0], *ids], words[-1][1], end)
    return words


def cut_by_rule(text: str, units: list[tuple[list[int], int, int]], rule: str) -> list[tuple[list[int], int, int]]:
    """Rule 5: the units of each sentence, line or demonstration; one belongs where it begins."""
    starts = {"sentence": sentence_starts, "line": line_starts, "demonstration": lambda text: [0]}[rule](text)
    cut: list[tuple[list[int], int, int]] = []
    home = -1
    for ids, start, end in units:
        number = max(i for i, at in enumerate(starts) if at <= start)
        if cut and number == home:
            cut[-1] = ([*cut[-1][0], *ids], cut[-1][1], end)
        else:
            cut.append((ids, start, end))
        home = number
    return cut


def line_starts(text: str) -> list[int]:
    """Where a line begins that is not blank, or is the last, and has a line before it."""
    starts, at = [0], 0
    lines = text.split("\n")
    for number, line in enumerate(lines[1:], start=1):
        at += len(lines[number - 1]) + 1
        if line.strip() or number == len(lines) - 1:
            starts.append(at)
    return starts


def sentence_starts(text: str) -> list[int]:
    starts = set(line_starts(text))
    for i, character in enumerate(text):
        wide = character in "。！？"
        if not wide and character not in ".!?…":
            continue
        rest = text[i + 1 :].lstrip("”’」』）" if wide else "\"'”’)]")
        line = rest.split("\n")[0]
        if line.strip() and (wide or line[0].isspace()):
            starts.add(len(text) - len(rest))
    return sorted(starts)


def protected_spans(text: str, keep: Sequence[Keep]) -> list[tuple[int, int]]:
    patterns = [re.compile(re.escape(item)) if isinstance(item, str) else item for item in keep]
    return [match.span() for pattern in patterns for match in pattern.finditer(text) if match.end() > match.start()]


def read_pieces(lm: Any, prompt: Any, keep: Sequence[Keep], settings: Any) -> list[Piece]:
    texts = [("instruction", 0, prompt.instruction)]
    texts += [("demonstration", i, text) for i, text in enumerate(prompt.demonstrations)]
    texts += [("question", 0, prompt.question)]
    rates = {"instruction": settings.instruction_rate, "question": settings.question_rate}
    pieces: list[Piece] = []
    for part, index, text in texts:
        cut = cut_into_units(tokenise(lm.tokenizer, text), len(text))
        if not cut:
            continue
        unit = settings.unit if settings.unit != "auto" or part != "demonstration" else unit_kind(text)
        if unit == "word" or (unit != "token" and part != "demonstration"):
            cut = cut_into_words(text, cut)
        elif unit != "token":
            cut = cut_by_rule(text, cut, unit)
        spans = protected_spans(text, keep)
        units = [Unit(part, index, len(pieces), text[start:end], start, end, ids) for ids, start, end in cut]
        for unit in units:
            overlaps = any(unit.start < end and start < unit.end for start, end in spans)
            unit.protected = overlaps or rates.get(part) == 1
        pieces.append(Piece(part, index, text, units))
    return pieces


def write(units: Sequence[Unit], separator: str) -> str:
    """The text of some units, which are in source order."""
    written: dict[int, str] = {}
    for unit in units:
        written[unit.piece] = written.get(unit.piece, "") + unit.text
    return separator.join(written.values())

"""From labelled prompts to examples: question and demonstrations, read as the compressor reads them to score units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.compress.length import plain_backend
from terselm.compress.selection import standardised
from terselm.compress.utility import UtilityWindow, question_before, utility_windows
from terselm.data.records import is_held_out
from terselm.data.rows import read_rows
from terselm.data.utility import LabelledPrompt, is_labelled
from terselm.errors import ContextLengthError
from terselm.statistics import Ints
from terselm.train.examples import (
    SEPARATOR,
    EncodedRecords,
    Encoding,
    Example,
    Guide,
    RenderedRecord,
    TokenSpans,
    UnitLabels,
)
from terselm.train.settings import Overlong

NO_UNIT = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadPrompt:
    """The windows of one labelled prompt; none if it is left out.

    Attributes:
        examples: one a window.
        units: of each window ``(u,)``, the numbers of the units that it scores.
        owners: of each window ``(n,)``, the unit that each counted token belongs to.
    """

    examples: Sequence[Example] = ()
    units: Sequence[Ints] = ()
    owners: Sequence[Ints] = ()


def holds_labels(source: str) -> bool:
    """Whether a source of records is one of labelled prompts, by its first row.

    Raises:
        ConfigError: as `read_rows`.
        DataFormatError: likewise.
    """
    first = next(read_rows(source), None)
    return first is not None and is_labelled(first[1])


def read_labelled(source: str) -> Iterator[LabelledPrompt]:
    """The labelled prompts of a source, as `read_rows` takes it.

    Raises:
        DataFormatError: a row is none.
    """
    for number, value in read_rows(source):
        yield LabelledPrompt.from_json(value, source, number)


def documents_hash(label: LabelledPrompt) -> str:
    """20 hex digits that name the demonstrations: prompts that share them are on one side of the split."""
    return hashlib.sha256(json.dumps(label.demonstrations).encode()).hexdigest()[:20]


def plain_text(label: LabelledPrompt, *, question: bool = True) -> RenderedRecord:
    """The question as it is read, and the demonstrations."""
    before = question_before(label.question) if question else ""
    return RenderedRecord(before, SEPARATOR.join(filter(None, label.demonstrations)))


def encode_labelled(
    labels: Sequence[LabelledPrompt], encoding: Encoding, first: int = 0, *, dropped: float = 0.0, seed: int = 0
) -> EncodedRecords:
    """Tokenise labelled prompts; there may be no example.

    Args:
        labels: some of a set.
        encoding: how.
        first: index of the first of them in the set.
        dropped: share of the prompts, drawn by their hash, that are read without their question.
        seed: of that draw.
    """
    prompts = read_prompts(labels, encoding, first, dropped=dropped, seed=seed)
    counts = dict.fromkeys(("split", "dropped", "unguided", "unordered"), 0)
    examples: list[Example] = []
    for label, prompt in zip(labels, prompts, strict=True):
        if not has_order(label):
            counts["unordered"] += 1
        elif not prompt.examples:
            counts["dropped"] += 1
        counts["split"] += len(prompt.examples) > 1
        guides = [example.guide for example in prompt.examples if example.guide is not None]
        counts["unguided"] += bool(guides) and not any(len(guide.nats) for guide in guides)
        examples += prompt.examples
    return EncodedRecords(
        examples=examples,
        tokens=sum(map(len, examples)),
        counted_tokens=sum(int(example.counted.sum()) for example in examples),
        **counts,
    )


def has_order(label: LabelledPrompt) -> bool:
    """Whether its utilities say anything: two of them differ."""
    return len(set(label.utility)) > 1


def read_prompts(
    labels: Sequence[LabelledPrompt], encoding: Encoding, first: int = 0, *, dropped: float = 0.0, seed: int = 0
) -> list[ReadPrompt]:
    """The windows of each prompt; none where all utilities are the same, the question is longer than half of a row, or
    it needs several and overlong ones are dropped."""
    backend = plain_backend(encoding.tokenizer)
    separator = _tokens(backend, SEPARATOR)
    asked = [not is_held_out(f"question:{label.id}:{documents_hash(label)}", dropped, seed) for label in labels]
    texts = [
        _TokenisedPrompt.of(label, backend, separator, question=ask) for label, ask in zip(labels, asked, strict=True)
    ]
    guides: Sequence[Guide | None] = [None] * len(labels)
    if encoding.guidance is not None:
        rendered = [plain_text(label, question=ask) for label, ask in zip(labels, asked, strict=True)]
        guides = list(encoding.guidance.guides([label.id for label in labels], rendered, [t.spans() for t in texts]))
    found = []
    for index, (label, text, guide) in enumerate(zip(labels, texts, guides, strict=True), start=first):
        windows = text.windows(encoding) if has_order(label) else []
        found.append(_examples(label, text, windows, encoding.start_id, index, guide))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _TokenisedPrompt:
    """The tokens of a prompt, part by part.

    Attributes:
        question: of what stands before the demonstrations.
        pieces: of the demonstrations that are not empty.
        ends: of each the place of the last token of each of its units.
        separator: between two of them.
    """

    question: TokenSpans
    pieces: Sequence[TokenSpans]
    ends: Sequence[Ints]
    separator: TokenSpans
    text: RenderedRecord
    demonstrations: Sequence[str]

    @classmethod
    def of(cls, label: LabelledPrompt, backend: Any, separator: TokenSpans, *, question: bool) -> _TokenisedPrompt:
        """Each part is tokenised by itself, so that a token belongs to one."""
        text = plain_text(label, question=question)
        numbers = [number for number, demonstration in enumerate(label.demonstrations) if demonstration]
        pieces = [_tokens(backend, label.demonstrations[number]) for number in numbers]
        ends = [
            last_tokens(piece.spans[:, 0], [end for of, _, end in label.units if of == number])
            for number, piece in zip(numbers, pieces, strict=True)
        ]
        shown = [label.demonstrations[number] for number in numbers]
        question_tokens = _tokens(backend, text.prompt)
        return cls(
            question=question_tokens, pieces=pieces, ends=ends, separator=separator, text=text, demonstrations=shown
        )

    def windows(self, encoding: Encoding) -> list[UtilityWindow]:
        pieces = [piece.ids for piece in self.pieces]
        try:
            found = utility_windows(self.question.ids, pieces, self.ends, self.separator.ids, encoding.max_length)
        except ContextLengthError:
            return []
        return found if len(found) == 1 or encoding.overlong is Overlong.SPLIT else []

    def owners(self) -> tuple[Ints, Ints]:
        """Of each token of the demonstrations, separators between them, its unit or `NO_UNIT`; and the place of each
        unit's last token."""
        owners, places = [], []
        begin = units = 0
        for number, (piece, ends) in enumerate(zip(self.pieces, self.ends, strict=True)):
            if number:
                owners.append(np.full(len(self.separator.ids), NO_UNIT))
                begin += len(self.separator.ids)
            owners.append(units + np.searchsorted(ends, np.arange(len(piece.ids))))
            places.append(begin + ends)
            begin += len(piece.ids)
            units += len(ends)
        return np.concatenate(owners), np.concatenate(places)

    def spans(self) -> TokenSpans:
        """All tokens, and where in the whole text they stand."""
        parts, shift = [self.question], len(self.text.prompt)
        for number, (piece, text) in enumerate(zip(self.pieces, self.demonstrations, strict=True)):
            if number:
                parts.append(TokenSpans(self.separator.ids, self.separator.spans + shift))
                shift += len(SEPARATOR)
            parts.append(TokenSpans(piece.ids, piece.spans + shift))
            shift += len(text)
        return TokenSpans(np.concatenate([p.ids for p in parts]), np.concatenate([p.spans for p in parts]))


def last_tokens(starts: Ints, unit_ends: Sequence[int]) -> Ints:
    """The last token that begins before the end of each unit.

    Args:
        starts: ``(n,)``, first character of each token.
        unit_ends: the character after the last of each unit, ascending.
    """
    return np.maximum(np.searchsorted(starts, unit_ends) - 1, 0)


def _examples(
    label: LabelledPrompt,
    text: _TokenisedPrompt,
    windows: Sequence[UtilityWindow],
    start_id: int,
    index: int,
    guide: Guide | None,
) -> ReadPrompt:
    """Tokens that windows share count in the first of them."""
    owners, places = text.owners()
    values = standardised(np.asarray(label.utility)).astype(np.float32)
    asked = len(text.question.ids)
    examples, their_owners = [], []
    seen = 0
    for window in windows:
        begin = int(places[window.units[0]] - window.ends[0]) + asked
        here = np.arange(begin, begin + len(window.ids) - asked)
        counted = np.concatenate([np.zeros(asked, np.bool_), (here >= seen) & (owners[here] != NO_UNIT)])
        seen = begin + len(here)
        their_owners.append(owners[here][counted[asked:]])
        labels = UnitLabels(
            ends=(window.ends + 1).astype(np.int32),  # the start token comes before
            values=values[window.units],
            share=len(window.units) / len(values),
        )
        part = None
        if guide is not None:
            part = guide.piece(np.concatenate([np.arange(asked), asked + here]), own=counted).after_start()
        ids = np.insert(window.ids, 0, start_id)
        examples.append(Example(ids, np.insert(counted, 0, False), index, part, labels))
    return ReadPrompt(examples=examples, units=[window.units for window in windows], owners=their_owners)


def _tokens(backend: Any, text: str) -> TokenSpans:
    encoding = backend.encode(text, add_special_tokens=False)
    spans: NDArray[np.int64] = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return TokenSpans(np.asarray(encoding.ids, dtype=np.int64), spans)

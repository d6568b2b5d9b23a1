"""From records to token sequences with a mask that says which tokens the loss counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.logprobs import ScoredText
from terselm.data.records import Record
from terselm.errors import ConfigError
from terselm.train.choices import LossOn, Overlong, Template
from terselm.train.guidance import Guide, Target, guide
from terselm.train.templates import RenderedRecord, render

_CUT_SHORT = ("length", "loop")  # finish reasons after which the target would have gone on


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How records become examples.

    Attributes:
        tokenizer: a fast tokenizer.
        start_id: the token that every example starts with; it is never counted.
        end_id: the token after a finished response; None where responses are not closed.
        max_length: tokens, the start token included.
        target: whose opinion on the text is learnt from besides the text itself, if any.
        top_k: how many of its likeliest tokens are learnt from.
    """

    tokenizer: Any
    start_id: int
    end_id: int | None
    template: Template
    loss_on: LossOn
    max_length: int
    overlong: Overlong
    target: Target | None = None
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class Example:
    """A record, or a piece of one.

    Attributes:
        ids: ``(n,)`` int64 token ids, the start token first.
        counted: ``(n,)`` bool, which tokens are predicted for the loss or the score.
        record: index of the record it comes from.
        guide: what the target thinks of it, if that is learnt from.
    """

    ids: NDArray[np.int64]
    counted: NDArray[np.bool_]
    record: int
    guide: Guide | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class EncodedRecords:
    """Examples, how many records did not fit whole, and how many the target has no opinion on."""

    examples: Sequence[Example]
    split: int
    dropped: int
    tokens: int
    counted_tokens: int
    unguided: int = 0


def encode(records: Sequence[Record], encoding: Encoding) -> EncodedRecords:
    """Tokenise records.

    Prompt and response are tokenised apart, as the compressor does with the parts of a prompt: no token belongs to
    both, so the mask is exact. Text that looks like a special token is ordinary text.

    Raises:
        ConfigError: nothing is left to count.
    """
    encoded = encode_some(records, encoding)
    if not encoded.examples:
        raise nothing_left(len(records), encoding)
    return encoded


def nothing_left(records: int, encoding: Encoding) -> ConfigError:
    return ConfigError(
        f"none of {records} records has a token to count in rows of {encoding.max_length} tokens; raise "
        "data.max_length or set data.overlong=split"
    )


def encode_some(records: Sequence[Record], encoding: Encoding, first: int = 0) -> EncodedRecords:
    """As `encode`, but there may be no examples; ``first`` is the index of the first record."""
    examples: list[Example] = []
    split = dropped = unguided = 0
    for index, whole in enumerate(_sequences(records, encoding), start=first):
        unguided += whole.guide is not None and not len(whole.guide.nats)
        if len(whole.ids) < encoding.max_length:
            examples.append(_example(whole, index, encoding))
        elif encoding.overlong is Overlong.DROP:
            dropped += 1
        else:
            split += 1
            examples.extend(_pieces(whole, index, encoding))
    return EncodedRecords(
        examples=examples,
        split=split,
        dropped=dropped,
        tokens=sum(len(example) for example in examples),
        counted_tokens=sum(int(example.counted.sum()) for example in examples),
        unguided=unguided,
    )


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A whole record without its start token."""

    ids: NDArray[np.int64]
    counted: NDArray[np.bool_]
    guide: Guide | None


def _sequences(records: Sequence[Record], encoding: Encoding) -> Iterator[_Sequence]:
    rendered = [render(record, encoding.template) for record in records]
    prompts = _tokenise(encoding, [text.prompt for text in rendered])
    responses = _tokenise(encoding, [text.response for text in rendered])
    guides = _guides(records, rendered, encoding)
    for record, text, prompt, response, opinion in zip(records, rendered, prompts, responses, guides, strict=True):
        end = [] if encoding.end_id is None or _is_cut_short(record) else [encoding.end_id]
        ids = np.asarray([*prompt.ids, *response.ids, *end], dtype=np.int64)
        counted = np.ones(len(ids), dtype=np.bool_)
        if encoding.loss_on is LossOn.RESPONSE:
            counted[: len(prompt.ids)] = False
        if encoding.target is None:
            yield _Sequence(ids, counted, None)
            continue
        nowhere = np.full((len(end), 2), -1, dtype=np.int64)
        spans = np.concatenate([prompt.spans, response.spans + len(text.prompt), nowhere])
        yield _Sequence(ids, counted, guide(text, ids, spans, opinion, encoding.top_k))


def _guides(
    records: Sequence[Record], rendered: Sequence[RenderedRecord], encoding: Encoding
) -> Iterable[ScoredText | None]:
    if encoding.target is None:
        return [None] * len(records)
    return encoding.target.opinions([record.id for record in records], rendered)


@dataclass(frozen=True, eq=False)
class _Tokens:
    ids: list[int]
    spans: NDArray[np.int64]
    """``(n, 2)`` characters; empty where nobody asks for them."""


def _tokenise(encoding: Encoding, texts: list[str]) -> Iterator[_Tokens]:
    if not texts:
        return
    where = encoding.target is not None
    encoded = encoding.tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=where,
        verbose=False,
    )
    for index, ids in enumerate(encoded["input_ids"]):
        spans = encoded["offset_mapping"][index] if where else []
        yield _Tokens(ids, np.asarray(spans, dtype=np.int64).reshape(-1, 2))


def _is_cut_short(record: Record) -> bool:
    return record.generation is not None and record.generation.finish_reason in _CUT_SHORT


def _pieces(whole: _Sequence, record: int, encoding: Encoding) -> Iterator[Example]:
    """Consecutive pieces, each after a start token, as the compressor reads what is longer than the window."""
    size = encoding.max_length - 1
    for start in range(0, len(whole.ids), size):
        part = slice(start, start + size)
        opinion = None if whole.guide is None else whole.guide.piece(part)
        piece = _Sequence(whole.ids[part], whole.counted[part], opinion)
        if piece.counted.any() or (opinion is not None and len(opinion.nats)):
            yield _example(piece, record, encoding)


def _example(found: _Sequence, record: int, encoding: Encoding) -> Example:
    opinion = None if found.guide is None else found.guide.after_start()
    ids = np.insert(found.ids, 0, encoding.start_id)
    return Example(ids, np.insert(found.counted, 0, False), record, opinion)

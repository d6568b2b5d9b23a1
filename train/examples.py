"""From records to token sequences with a mask that says which tokens the loss counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.records import Record
from terselm.errors import ConfigError
from terselm.train.config import LossOn, Overlong, Template
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
    """

    tokenizer: Any
    start_id: int
    end_id: int | None
    template: Template
    loss_on: LossOn
    max_length: int
    overlong: Overlong


@dataclass(frozen=True, eq=False)
class Example:
    """A record, or a piece of one.

    Attributes:
        ids: ``(n,)`` int64 token ids, the start token first.
        counted: ``(n,)`` bool, which tokens are predicted for the loss or the score.
        record: index of the record it comes from.
    """

    ids: NDArray[np.int64]
    counted: NDArray[np.bool_]
    record: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class EncodedRecords:
    """Examples, and how many records did not fit whole."""

    examples: list[Example]
    split: int
    dropped: int
    tokens: int
    counted_tokens: int


def encode(records: Sequence[Record], encoding: Encoding) -> EncodedRecords:
    """Tokenise records.

    Prompt and response are tokenised apart, as the compressor does with the parts of a prompt: no token belongs to
    both, so the mask is exact. Text that looks like a special token is ordinary text.

    Raises:
        ConfigError: nothing is left to count.
    """
    examples: list[Example] = []
    split = dropped = 0
    rendered = [render(record, encoding.template) for record in records]
    for index, (ids, counted) in enumerate(_sequences(records, rendered, encoding)):
        if len(ids) < encoding.max_length:
            examples.append(_example(ids, counted, index, encoding))
        elif encoding.overlong is Overlong.DROP:
            dropped += 1
        else:
            split += 1
            examples.extend(_pieces(ids, counted, index, encoding))
    if not examples:
        raise ConfigError(
            f"none of {len(records)} records has a token to count in rows of {encoding.max_length} tokens; raise "
            "data.max_length or set data.overlong=split"
        )
    return EncodedRecords(
        examples=examples,
        split=split,
        dropped=dropped,
        tokens=sum(len(example) for example in examples),
        counted_tokens=sum(int(example.counted.sum()) for example in examples),
    )


def _sequences(
    records: Sequence[Record], rendered: Sequence[RenderedRecord], encoding: Encoding
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Token ids and mask of each record, without the start token."""
    prompts = _tokenise(encoding.tokenizer, [text.prompt for text in rendered])
    responses = _tokenise(encoding.tokenizer, [text.response for text in rendered])
    for record, prompt, response in zip(records, prompts, responses, strict=True):
        end = [] if encoding.end_id is None or _is_cut_short(record) else [encoding.end_id]
        ids = np.asarray([*prompt, *response, *end], dtype=np.int64)
        counted = np.ones(len(ids), dtype=np.bool_)
        if encoding.loss_on is LossOn.RESPONSE:
            counted[: len(prompt)] = False
        yield ids, counted


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def _is_cut_short(record: Record) -> bool:
    return record.generation is not None and record.generation.finish_reason in _CUT_SHORT


def _pieces(ids: NDArray[np.int64], counted: NDArray[np.bool_], record: int, encoding: Encoding) -> Iterator[Example]:
    """Consecutive pieces, each after a start token, as the compressor reads what is longer than the window."""
    size = encoding.max_length - 1
    for start in range(0, len(ids), size):
        piece = slice(start, start + size)
        if counted[piece].any():
            yield _example(ids[piece], counted[piece], record, encoding)


def _example(ids: NDArray[np.int64], counted: NDArray[np.bool_], record: int, encoding: Encoding) -> Example:
    return Example(np.insert(ids, 0, encoding.start_id), np.insert(counted, 0, False), record)

"""From records to token sequences with a mask that says which tokens the loss counts.

A record becomes text, the text becomes tokens, and those become one example, or several where it is longer than a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from terselm.data.records import Message, Record, Role
from terselm.errors import ModelError
from terselm.models.chat import chat_pieces, encode_pieces, without_end
from terselm.train.settings import LossOn, Overlong, Template

SEPARATOR = "\n\n"  # what the compressor puts between the parts of a prompt

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
NO_WORD = -1

_CUT_SHORT = ("length", "loop")  # finish reasons after which the target would have gone on


@dataclass(frozen=True, eq=False)
class Example:
    """A record, or a piece of one.

    Attributes:
        ids: ``(n,)`` int64 token ids, the start token first; of a chat, whatever token its template begins with.
        counted: ``(n,)`` bool, which tokens are predicted for the loss or the score.
        record: index of the record it comes from.
        guide: what the target thinks of it, if that is learnt from.
        labels: what its units are worth to the target, of a labelled prompt.
    """

    ids: NDArray[np.int64]
    counted: NDArray[np.bool_]
    record: int
    guide: Guide | None = None
    labels: UnitLabels | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitLabels:
    """What some units of a labelled prompt are worth to the target.

    Attributes:
        ends: ``(u,)`` int32, place in the example of the last token of each.
        values: ``(u,)`` float32, their utilities, standardised over all units of the prompt.
        share: of the prompt's units, in (0, 1].
    """

    ends: NDArray[np.int32]
    values: NDArray[np.float32]
    share: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """The target's opinion on one example of ``n`` tokens.

    Attributes:
        words: ``(n,)`` int32, the word that each token belongs to, counted from 0 in this example; `NO_WORD` where the
            target gives none, or where the word is not wholly in the example.
        nats: ``(words,)`` float32, the target's surprisal of each word.
        top_ids: ``(n, K)`` int32, the tokens that the target finds likeliest in each token's place, −1 where unknown;
            None where only words are compared.
        top_logprobs: ``(n, K)`` float32 nats, −inf where unknown.
    """

    words: NDArray[np.int32]
    nats: NDArray[np.float32]
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None

    def piece(self, part: slice | NDArray[np.int64], own: NDArray[np.bool_] | None = None) -> Guide:
        """The opinion on some of the tokens; words that lose a token are left out.

        Args:
            part: the tokens.
            own: of them, those on which it is asked for; by default all.
        """
        words = self.words[part]
        words = words if own is None else np.where(own, words, NO_WORD)
        here, everywhere = (np.bincount(w[w >= 0], minlength=len(self.nats)) for w in (words, self.words))
        kept = np.flatnonzero((here > 0) & (here == everywhere))
        number = np.full(len(self.nats) + 1, NO_WORD, dtype=np.int32)  # the last stands for NO_WORD
        number[kept] = np.arange(len(kept))
        top_ids = None if self.top_ids is None else self.top_ids[part]
        top_logprobs = None if self.top_logprobs is None else self.top_logprobs[part]
        if own is not None and top_ids is not None and top_logprobs is not None:
            top_ids = np.where(own[:, None], top_ids, np.int32(-1))
            top_logprobs = np.where(own[:, None], top_logprobs, np.float32(-np.inf))
        return Guide(words=number[words], nats=self.nats[kept], top_ids=top_ids, top_logprobs=top_logprobs)

    def after_start(self) -> Guide:
        """The same after one more token, on which there is no opinion."""
        return Guide(
            words=np.insert(self.words, 0, NO_WORD),
            nats=self.nats,
            top_ids=None if self.top_ids is None else np.insert(self.top_ids, 0, -1, axis=0),
            top_logprobs=None if self.top_logprobs is None else np.insert(self.top_logprobs, 0, -np.inf, axis=0),
        )


@dataclass(frozen=True)
class RenderedRecord:
    """Everything before the response, and the response.

    Attributes:
        messages: of a chat, which each model reads through its own template; None for text that all read alike.
    """

    prompt: str
    response: str
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """A text's tokens, and where in it they stand.

    Attributes:
        ids: ``(n,)`` int64.
        spans: ``(n, 2)`` int64 start and end of each token in characters; −1 at tokens without text. Empty where nobody
            asks for them.
    """

    ids: NDArray[np.int64]
    spans: NDArray[np.int64]


class GuidanceSource(Protocol):
    """Whoever knows what the target thinks of texts; see `guidance.TargetOpinions`."""

    def guides(
        self, ids: Sequence[str], rendered: Sequence[RenderedRecord], tokens: Sequence[TokenSpans]
    ) -> Iterator[Guide]:
        """One for each record: its id, its text, and its tokens under the small LM."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How records become examples.

    Attributes:
        tokenizer: a fast tokenizer.
        start_id: the token that every example starts with but a chat, whose template has its own; it is never counted.
        end_id: the token after a finished response; None where responses are not closed. A chat has its own.
        max_length: tokens, the start token included.
        guidance: whose opinion on the text is learnt from besides the text itself, if any.
        top_k: how many of its likeliest tokens are learnt from.
        every_turn: of a chat, count all that the assistant says, and what ends its turns; else the response alone.
    """

    tokenizer: Any
    start_id: int
    end_id: int | None
    template: Template
    loss_on: LossOn
    max_length: int
    overlong: Overlong
    guidance: GuidanceSource | None = None
    top_k: int = 0
    every_turn: bool = True


@dataclass(frozen=True)
class EncodedRecords:
    """Examples, how many records did not fit whole, and how many the target has no opinion on.

    Attributes:
        unordered: labelled prompts whose units are all worth the same, which say nothing.
    """

    examples: Sequence[Example]
    split: int
    dropped: int
    tokens: int
    counted_tokens: int
    unguided: int = 0
    unordered: int = 0


def encode_records(records: Sequence[Record], encoding: Encoding, first: int = 0) -> EncodedRecords:
    """Tokenise records; there may be no example.

    Prompt and response are tokenised apart, as the compressor does with the parts of a prompt: no token belongs to
    both, so the mask is exact. Text that looks like a special token is ordinary text, but in a chat, where the template
    writes such tokens as text.

    Args:
        records: some of a set.
        encoding: how.
        first: index of the first of them in the set.

    Raises:
        ModelError: the chat template refuses a record.
    """
    examples: list[Example] = []
    split = dropped = unguided = 0
    for index, (whole, start) in enumerate(_whole_records(records, encoding), start=first):
        unguided += whole.guide is not None and not len(whole.guide.nats)
        if len(whole) < encoding.max_length:
            examples.append(_after_start(whole, index, start))
        elif encoding.overlong is Overlong.DROP:
            dropped += 1
        else:
            split += 1
            examples.extend(_pieces(whole, index, encoding, start))
    return EncodedRecords(
        examples=examples,
        split=split,
        dropped=dropped,
        tokens=sum(len(example) for example in examples),
        counted_tokens=sum(int(example.counted.sum()) for example in examples),
        unguided=unguided,
    )


def render_record(record: Record, template: Template) -> RenderedRecord:
    """The text of a record by a plain template; the prompt holds whatever stands between it and the response.

    Source: the Alpaca template is ``prompt_no_input`` of github.com/tatsu-lab/stanford_alpaca.
    """
    prompt = SEPARATOR.join(message.content for message in record.messages)
    if template is Template.ALPACA:
        return RenderedRecord(_ALPACA.format(instruction=prompt), record.response)
    return RenderedRecord(prompt + SEPARATOR, record.response)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A record of any length, without its start token.

    Attributes:
        counted: ``(n,)`` bool.
        start_id: what it starts with.
    """

    text: RenderedRecord
    tokens: TokenSpans
    counted: NDArray[np.bool_]
    start_id: int


def _whole_records(records: Sequence[Record], encoding: Encoding) -> Iterator[tuple[Example, int]]:
    """Each record as one example of any length, still without its start token; and that token."""
    make = _chats if encoding.template is Template.CHAT else _plain_texts
    wholes = list(make(records, encoding))
    guides: Sequence[Guide | None] = [None] * len(records)
    if encoding.guidance is not None:
        names, texts = [record.id for record in records], [whole.text for whole in wholes]
        guides = list(encoding.guidance.guides(names, texts, [whole.tokens for whole in wholes]))
    for index, (whole, guide) in enumerate(zip(wholes, guides, strict=True)):
        yield Example(whole.tokens.ids, whole.counted, index, guide), whole.start_id


def _plain_texts(records: Sequence[Record], encoding: Encoding) -> Iterator[_Whole]:
    rendered = [render_record(record, encoding.template) for record in records]
    prompts = _tokenise(encoding, [text.prompt for text in rendered])
    responses = _tokenise(encoding, [text.response for text in rendered])
    for record, text, prompt, response in zip(records, rendered, prompts, responses, strict=True):
        end = [] if encoding.end_id is None or _is_cut_short(record) else [encoding.end_id]
        ids = np.concatenate([prompt.ids, response.ids, np.asarray(end, dtype=np.int64)])
        nowhere = np.full((len(end) if encoding.guidance is not None else 0, 2), -1, dtype=np.int64)
        spans = np.concatenate([prompt.spans, response.spans + len(text.prompt), nowhere])
        counted = np.ones(len(ids), dtype=np.bool_)
        if encoding.loss_on is LossOn.RESPONSE:
            counted[: len(prompt.ids)] = False
        yield _Whole(text, TokenSpans(ids, spans), counted, encoding.start_id)


def _is_cut_short(record: Record) -> bool:
    return record.generation is not None and record.generation.finish_reason in _CUT_SHORT


def _chats(records: Sequence[Record], encoding: Encoding) -> Iterator[_Whole]:
    """Conversations up to the end of the response: what the template writes after that, nobody says."""
    for record in records:
        pieces = _conversation(record, encoding.tokenizer)
        encoded = encode_pieces(encoding.tokenizer, [text for text, _ in pieces])
        tokens = [
            TokenSpans(np.asarray(ids, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2))
            for ids, spans in encoded
        ]
        yield _chat(record, pieces, tokens, encoding)


def _conversation(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """Pieces of text up to the end of the response, each with whether the assistant says it; see `chat_pieces`."""
    said = (*record.messages, Message(role=Role.ASSISTANT, content=record.response))
    try:
        pieces = chat_pieces(tokenizer, [{"role": turn.role.value, "content": turn.content} for turn in said])
    except ModelError as error:
        raise ModelError(f"record {record.id!r}: {error}") from None
    while pieces and not pieces[-1][1]:
        pieces.pop()
    if not pieces:
        raise ModelError(f"record {record.id!r}: the chat template renders no turn of the assistant; choose another")
    return pieces


def _chat(
    record: Record, pieces: Sequence[tuple[str, bool]], tokens: Sequence[TokenSpans], encoding: Encoding
) -> _Whole:
    """A conversation of which these are the tokens, piece by piece; spans are characters of each piece."""
    prompt = "".join(text for text, _ in pieces[:-1])
    start, end = _place_of_response(record, without_end(encoding.tokenizer, pieces[-1][0]))
    ids = np.concatenate([piece.ids for piece in tokens])
    last = np.arange(len(ids)) >= len(ids) - len(tokens[-1].ids)
    spans = np.full((len(ids), 2), -1, dtype=np.int64)
    spans[last] = tokens[-1].spans
    answer = last & (spans[:, 0] < end) & (spans[:, 1] > start)
    counted = answer
    if encoding.loss_on is LossOn.ALL:
        counted = np.ones(len(ids), dtype=np.bool_)
    elif encoding.every_turn:
        counted = np.repeat([own for _, own in pieces], [len(piece.ids) for piece in tokens])
    closed = encoding.every_turn and not _is_cut_short(record)
    length = len(ids) if closed or not answer.any() else int(np.flatnonzero(answer)[-1]) + 1
    # Only the response's tokens stand in a text that the target has an opinion on.
    spans = np.where(answer[:, None], spans + len(prompt), -1)[1:length]
    text = RenderedRecord(prompt + pieces[-1][0][:start], pieces[-1][0][start:end], record.messages)
    return _Whole(text, TokenSpans(ids[1:length], spans), counted[1:length], int(ids[0]))


def _place_of_response(record: Record, said: str) -> tuple[int, int]:
    """Characters of the assistant's turn that are the response: a template may trim it, and write before and after it.

    Raises:
        ModelError: it is not there.
    """
    response = record.response if record.response in said else record.response.strip()
    start = said.rfind(response)  # what is thought aloud before may hold it, too
    if start < 0:
        raise ModelError(f"record {record.id!r}: the chat template rewrites the response; choose another template")
    return start, start + len(response)


def _tokenise(encoding: Encoding, texts: list[str]) -> Iterator[TokenSpans]:
    if not texts:
        return
    with_spans = encoding.guidance is not None
    encoded = encoding.tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=with_spans,
        verbose=False,
    )
    for index, ids in enumerate(encoded["input_ids"]):
        spans = encoded["offset_mapping"][index] if with_spans else []
        yield TokenSpans(np.asarray(ids, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2))


def _pieces(whole: Example, record: int, encoding: Encoding, start_id: int) -> Iterator[Example]:
    """Consecutive pieces, each after a start token, as the compressor reads what is longer than the window.

    Args:
        start_id: what the first piece starts with.
    """
    size = encoding.max_length - 1
    for start in range(0, len(whole), size):
        part = slice(start, start + size)
        guide = None if whole.guide is None else whole.guide.piece(part)
        piece = Example(whole.ids[part], whole.counted[part], record, guide)
        if piece.counted.any() or (guide is not None and len(guide.nats)):
            yield _after_start(piece, record, encoding.start_id if start else start_id)


def _after_start(example: Example, record: int, start_id: int) -> Example:
    guide = None if example.guide is None else example.guide.after_start()
    ids = np.insert(example.ids, 0, start_id)
    return Example(ids, np.insert(example.counted, 0, False), record, guide)

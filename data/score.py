"""What a local target thinks of given texts: the log-probability of every token, read in batches.

Each text is read after the start token and nothing else, as the compressor reads it. A text longer than the model's
window is read in windows that overlap by half, so that each of its tokens is preceded by at least half a window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.logprobs import ScoredText
from terselm.data.texts import PlainText
from terselm.errors import ModelError
from terselm.models import CausalLM

if TYPE_CHECKING:
    from terselm.models.reading import OutputHead

_TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 15}  # of a pass, padding included


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A window of a text: after the start token, ``ids``, of which the first ``skip`` have been scored before."""

    text: int
    ids: list[int]
    skip: int


def score_texts(lm: CausalLM, texts: Sequence[PlainText], top_k: int = 0) -> Iterator[list[ScoredText]]:
    """Score texts, the longest first; yield those that each pass has completed.

    Args:
        top_k: how many of the likeliest tokens to give at each position, with their log-probabilities.

    Raises:
        ModelError: the memory is too small for one text, or the model's logits are not made as usual; see `OutputHead`.
    """
    from terselm.models.reading import OutputHead, in_halves

    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index].input_ids))
    pieces = [piece for index in order for piece in _pieces(index, encoded[index].input_ids, lm.window)]
    waiting = Counter(piece.text for piece in pieces)
    parts: dict[int, list[_Scores]] = {}
    head = OutputHead(lm.model)

    def read(some: Sequence[_Piece]) -> list[_Scores]:
        return _score(lm, head, some, top_k)

    def too_large(piece: _Piece) -> ModelError:
        return ModelError(
            f"the memory of {lm.model.device} is too small to read {len(piece.ids)} tokens with {lm.name!r}; choose "
            "another device, or a dtype of fewer bits"
        )

    for batch in _batches(pieces, _TOKENS_AT_ONCE.get(lm.model.device.type, _TOKENS_AT_ONCE["cpu"])):
        done = []
        for piece, scores in zip(batch, in_halves(read, batch, too_large), strict=True):
            parts.setdefault(piece.text, []).append(scores)
            waiting[piece.text] -= 1
            if not waiting[piece.text]:
                done.append(_join(texts[piece.text], encoded[piece.text], parts.pop(piece.text)))
        yield done


def _pieces(index: int, ids: list[int], window: int) -> Iterator[_Piece]:
    room = window - 1  # for the start token
    if len(ids) <= room:
        yield _Piece(text=index, ids=ids, skip=0)
        return
    half = room // 2
    yield _Piece(text=index, ids=ids[:room], skip=0)
    for start in range(room - half, len(ids) - half, room - half):
        yield _Piece(text=index, ids=ids[start : start + room], skip=half)


def _batches(pieces: Sequence[_Piece], tokens: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    width = 0
    for piece in pieces:
        width = max(width, len(piece.ids))
        if batch and (len(batch) + 1) * width > tokens:
            yield batch
            batch, width = [], len(piece.ids)
        batch.append(piece)
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class _Scores:
    logprobs: NDArray[np.float32]
    top_logprobs: NDArray[np.float32] | None
    top_ids: NDArray[np.int32] | None


def _score(lm: CausalLM, head: OutputHead, batch: Sequence[_Piece], top_k: int) -> list[_Scores]:
    import torch

    from terselm.models.reading import states_before

    rows, skips = [[lm.start_id, *piece.ids] for piece in batch], [1 + piece.skip for piece in batch]
    with torch.inference_mode():
        found = head.nll_and_likeliest(*states_before(lm.model, rows, skips), top_k)
    nats, top, tokens = (values.cpu().numpy() for values in found)
    ends = np.cumsum([len(piece.ids) - piece.skip for piece in batch])[:-1]
    return [
        # rounding can take a token a hair above certainty
        _Scores(
            logprobs=-mine.clip(min=0),
            top_logprobs=its_top.clip(max=0) if top_k else None,
            top_ids=its_tokens.astype(np.int32) if top_k else None,
        )
        for mine, its_top, its_tokens in zip(*(np.split(values, ends) for values in (nats, top, tokens)), strict=True)
    ]


def _join(text: PlainText, encoded: Any, parts: Sequence[_Scores]) -> ScoredText:
    top = parts[0].top_ids is not None
    offsets = np.array(encoded.offset_mapping, np.int32).reshape(-1, 2)
    return ScoredText(
        id=text.id,
        text=text.text,
        response_start=text.response_start,
        starts=offsets[:, 0],
        ends=offsets[:, 1],
        token_ids=np.array(encoded.input_ids, np.int32),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts if part.top_logprobs is not None])
        if top
        else None,
        top_ids=np.concatenate([part.top_ids for part in parts if part.top_ids is not None]) if top else None,
    )

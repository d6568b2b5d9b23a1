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

__all__ = ["PlainText", "score_texts", "tokens_at_once"]

_TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 15}  # of a pass, padding included


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A window of a text: after the start token, ``ids``, of which the first ``skip`` have been scored before."""

    text: int
    ids: list[int]
    skip: int

    @property
    def counted(self) -> slice:
        return slice(self.skip, len(self.ids))


def score_texts(lm: CausalLM, texts: Sequence[PlainText], top_k: int = 0) -> Iterator[list[ScoredText]]:
    """Score texts, the longest first; yield those that each pass has completed.

    Args:
        top_k: how many of the likeliest tokens to give at each position, with their log-probabilities.

    Raises:
        ModelError: the memory is too small for one text, or the model's logits are not made as usual; see `OutputHead`.
    """
    from terselm.models.reading import OutputHead

    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index].input_ids))
    pieces = [piece for index in order for piece in _pieces(index, encoded[index].input_ids, lm.window)]
    waiting = Counter(piece.text for piece in pieces)
    parts: dict[int, list[_Scores]] = {}
    head = OutputHead(lm.model)
    for batch in _batches(pieces, tokens_at_once(lm)):
        done = []
        for piece, scores in zip(batch, _score_or_halve(lm, head, batch, top_k), strict=True):
            parts.setdefault(piece.text, []).append(scores)
            waiting[piece.text] -= 1
            if not waiting[piece.text]:
                done.append(_join(texts[piece.text], encoded[piece.text], parts.pop(piece.text)))
        yield done


def tokens_at_once(lm: CausalLM) -> int:
    """How many positions a pass may hold."""
    return _TOKENS_AT_ONCE.get(lm.model.device.type, _TOKENS_AT_ONCE["cpu"])


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


def _score_or_halve(lm: CausalLM, head: OutputHead, batch: Sequence[_Piece], top_k: int) -> list[_Scores]:
    import torch

    try:
        return _score(lm, head, batch, top_k)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise ModelError(
                f"the memory of {lm.model.device} is too small to read {len(batch[0].ids)} tokens with {lm.name!r}; "
                "choose another device, or a dtype of fewer bits"
            ) from None
    torch.cuda.empty_cache()  # here, where the exception no longer holds the frames
    half = len(batch) // 2
    return [*_score_or_halve(lm, head, batch[:half], top_k), *_score_or_halve(lm, head, batch[half:], top_k)]


def _score(lm: CausalLM, head: OutputHead, batch: Sequence[_Piece], top_k: int) -> list[_Scores]:
    import torch

    from terselm.models.reading import last_states

    width = 1 + max(len(piece.ids) for piece in batch)
    ids = np.full((len(batch), width), lm.start_id, dtype=np.int64)
    counted = np.zeros(ids.shape, dtype=np.bool_)  # the places before the tokens that are scored
    for row, piece in enumerate(batch):
        ids[row, 1 : 1 + len(piece.ids)] = piece.ids
        counted[row, piece.counted] = True
    device = lm.model.device
    with torch.inference_mode():
        states = last_states(lm.model, torch.from_numpy(ids).to(device))
        places = torch.from_numpy(np.flatnonzero(counted)).to(device)
        chosen = states.flatten(0, 1)[places]  # (N, H)
        wanted = torch.from_numpy(ids[:, 1:][counted[:, :-1]]).to(device)
        # rounding can take a token a hair above certainty
        logprobs = -head.nll(chosen, wanted).clamp(min=0).cpu().numpy()
        top, tokens = head.likeliest(chosen, top_k) if top_k else (None, None)
    ends = np.cumsum([len(piece.ids) - piece.skip for piece in batch])[:-1]
    nothing = [None] * len(batch)
    return [
        _Scores(logprobs=mine, top_logprobs=its_top, top_ids=its_tokens)
        for mine, its_top, its_tokens in zip(
            np.split(logprobs, ends),
            nothing if top is None else np.split(top.clamp(max=0).cpu().numpy(), ends),
            nothing if tokens is None else np.split(tokens.int().cpu().numpy(), ends),
            strict=True,
        )
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

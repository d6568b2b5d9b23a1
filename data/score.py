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
from terselm.models import CausalLM

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PlainText", "score_texts", "tokens_at_once"]

_LOGIT_BYTES = 1 << 30
"""Memory for the logits of a pass; several copies of them live at once."""
_LOGIT_BYTES_CUDA = 1 << 33


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
    """
    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index].input_ids))
    pieces = [piece for index in order for piece in _pieces(index, encoded[index].input_ids, lm.window)]
    waiting = Counter(piece.text for piece in pieces)
    parts: dict[int, list[_Scores]] = {}
    for batch in _batches(pieces, tokens_at_once(lm)):
        done = []
        for piece, scores in zip(batch, _score(lm, batch, top_k), strict=True):
            parts.setdefault(piece.text, []).append(scores)
            waiting[piece.text] -= 1
            if not waiting[piece.text]:
                done.append(_join(texts[piece.text], encoded[piece.text], parts.pop(piece.text)))
        yield done


def tokens_at_once(lm: CausalLM) -> int:
    """How many positions a pass may hold, by the memory that their logits take."""
    room = _LOGIT_BYTES
    if lm.model.device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(lm.model.device)
        room = min(_LOGIT_BYTES_CUDA, free // 4)
    return max(256, room // (4 * int(lm.model.config.get_text_config().vocab_size)))


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


def _score(lm: CausalLM, batch: Sequence[_Piece], top_k: int) -> list[_Scores]:
    import torch

    width = 1 + max(len(piece.ids) for piece in batch)
    ids = torch.full((len(batch), width), lm.start_id)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(batch):
        ids[row, 1 : 1 + len(piece.ids)] = torch.tensor(piece.ids, dtype=torch.long)
        mask[row, : 1 + len(piece.ids)] = 1
    ids, mask = ids.to(lm.model.device), mask.to(lm.model.device)
    with torch.inference_mode():
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, 1 + S, V)
        return [_row(logits[row, piece.counted], ids[row, 1:][piece.counted], top_k) for row, piece in enumerate(batch)]


def _row(logits: Tensor, targets: Tensor, top_k: int) -> _Scores:
    """Of one piece, so that the float32 copy of the logits, ``(S, V)``, stays small."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)  # (S, 1)
    chosen = (logits.gather(-1, targets[:, None]) - total)[:, 0]
    # rounding can take the likeliest token a hair above certainty
    logprobs = chosen.clamp(max=0).cpu().numpy()
    if not top_k:
        return _Scores(logprobs=logprobs, top_logprobs=None, top_ids=None)
    top, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # (S, K)
    return _Scores(
        logprobs=logprobs, top_logprobs=(top - total).clamp(max=0).cpu().numpy(), top_ids=tokens.int().cpu().numpy()
    )


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

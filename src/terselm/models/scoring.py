"""How surprising given tokens are to a causal LM: rows of any length, read in batches, whatever the memory holds.

Each row is read after the start token and nothing else. Surprisal of a token = −log p(token | all before it), nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from terselm.models.load import CausalLM
from terselm.models.memory import in_halves, text_too_large
from terselm.models.reading import OutputHead, grain, last_states

_TOKENS_AT_ONCE = {"cpu": 1 << 10, "cuda": 1 << 16}  # of a pass, padding included
_FREE_PADDING = {"cpu": 0, "cuda": 1 << 13}  # tokens that cost less than one more pass would
_MOST_PADDING = 0.15


class Window(StrEnum):
    """How a row is read that is longer than the model's window.

    Attributes:
        PIECES: cut into pieces of window − 1 tokens, each read by itself: Stage 1 of the compressor
            (docs/algorithm.md, section 1.2).
        OVERLAP: in windows that overlap by half, so that half a window at least stands before every token that is not
            among the first: opinions on texts.
    """

    PIECES = "pieces"
    OVERLAP = "overlap"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScores:
    """What the model thinks of the ``T`` tokens of a row that were to be scored.

    Attributes:
        nats: ``(T,)`` float32, the surprisal of each.
        top_nats: ``(T, K)`` float32, the surprisals of the likeliest tokens in its place, ascending; None where they
            were not asked for.
        top_ids: ``(T, K)`` int64, these tokens.
    """

    nats: NDArray[np.float32]
    top_nats: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class _WindowPart:
    """A window of a row: ``ids`` ``(S,)`` after the start token, of which the first ``skip`` are not to be scored."""

    row: int
    ids: NDArray[np.int64]
    skip: int


class RowScorer:
    """Scores rows of token ids with one model.

    Args:
        lm: the model.
        head: its output head, where there is one already.
        states_of: gives the last hidden states ``(B, S, H)`` of ids ``(B, S)`` int64 that are padded at their ends, or
            None for the usual pass; such as a replay of CUDA graphs.
        give_back: called after the memory was exhausted.

    Raises:
        ModelError: the model's logits are not made as usual; see `OutputHead`.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        head: OutputHead | None = None,
        states_of: Callable[[NDArray[np.int64]], Tensor | None] | None = None,
        give_back: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self._lm = lm
        self._device: torch.device = lm.model.device
        self._head = head or OutputHead(lm.model)
        self._states_of = states_of
        self._give_back = give_back

    def score(
        self,
        rows: Sequence[ArrayLike],
        *,
        skips: Sequence[int] | None = None,
        top_k: int = 0,
        window: Window = Window.OVERLAP,
    ) -> Iterator[tuple[int, RowScores]]:
        """Number and scores of each row, in the order in which they become known: the longest first.

        Args:
            rows: token ids, each ``(T_i,)``, without the start token.
            skips: tokens at the start of each row that are read but not scored; none by default.
            top_k: how many of the likeliest tokens to give in each place.
            window: how rows are read that are longer than the model's window.

        Raises:
            ModelError: the memory is too small for one row.
        """
        return chain.from_iterable(self.passes(rows, skips=skips, top_k=top_k, window=window))

    def passes(
        self,
        rows: Sequence[ArrayLike],
        *,
        skips: Sequence[int] | None = None,
        top_k: int = 0,
        window: Window = Window.OVERLAP,
    ) -> Iterator[list[tuple[int, RowScores]]]:
        """As `score`: what each pass of the model has completed, which may be nothing."""
        pieces = [
            piece
            for number, row in enumerate(rows)
            for piece in _pieces(number, np.asarray(row, np.int64), skips[number] if skips else 0, window, self._room)
        ]
        waiting = Counter(piece.row for piece in pieces)
        parts: dict[int, list[RowScores]] = {}
        if unread := [number for number in range(len(rows)) if number not in waiting]:
            yield [(number, _nothing(top_k)) for number in unread]
        for batch in batches_for(self._device, [len(piece.ids) for piece in pieces]):
            done = []
            read = [pieces[index] for index in batch]
            for piece, scores in zip(read, self._read_what_fits(read, top_k), strict=True):
                parts.setdefault(piece.row, []).append(scores)
                waiting[piece.row] -= 1
                if not waiting[piece.row]:
                    done.append((piece.row, _joined(parts.pop(piece.row))))
            yield done

    @property
    def _room(self) -> int:
        """The most tokens of a piece: the window, but for the start token."""
        return self._lm.window - 1

    def _read_what_fits(self, pieces: Sequence[_WindowPart], top_k: int) -> list[RowScores]:
        return in_halves(
            lambda some: self._read(some, top_k),
            pieces,
            lambda piece: text_too_large(self._lm, len(piece.ids)),
            self._give_back,
        )

    @torch.inference_mode()
    def _read(self, pieces: Sequence[_WindowPart], top_k: int) -> list[RowScores]:
        lengths = np.array([len(piece.ids) for piece in pieces])
        skips = np.array([piece.skip for piece in pieces])
        states = read_rows(self._lm, [piece.ids[:-1] for piece in pieces], self._states_of)
        column = np.arange(states.shape[1])
        scored = (column >= skips[:, None]) & (column < lengths[:, None])
        before = states.flatten(0, 1)[on_device(np.flatnonzero(scored), self._device)]
        targets = np.concatenate([piece.ids[piece.skip :] for piece in pieces])
        values = self._head.nll_and_likeliest(before, on_device(targets, self._device), top_k)
        ends = np.cumsum(lengths - skips)[:-1]
        nats, top, tokens = (np.split(value.cpu().numpy(), ends) for value in values)
        return [
            RowScores(nats=mine, top_nats=-its_top if top_k else None, top_ids=its_tokens if top_k else None)
            for mine, its_top, its_tokens in zip(nats, top, tokens, strict=True)
        ]


def read_rows(
    lm: CausalLM, rows: Sequence[NDArray[np.int64]], states_of: Callable[[NDArray[np.int64]], Tensor | None] | None
) -> Tensor:
    """Last hidden states ``(B, S, H)`` of rows of ids, each after the start token, in one pass; padded at their ends.

    Args:
        lm: the model.
        rows: token ids, each ``(T_i,)``; with the start token they fit into the model's window.
        states_of: see `RowScorer`.
    """
    device = lm.model.device
    longest = 1 + max(len(row) for row in rows)
    step = grain(longest) if device.type == "cpu" else 1
    ids = np.full((len(rows), min(lm.window, -(-longest // step) * step)), lm.start_id, dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[1 : len(tokens) + 1] = tokens
    states = states_of(ids) if states_of is not None else None
    return last_states(lm.model, on_device(ids, device)) if states is None else states


def on_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The numbers, without waiting for them."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def batches_for(device: torch.device, lengths: Sequence[int]) -> Iterator[list[int]]:
    """`token_batches` of as many tokens as keep a device busy."""
    kind = device.type if device.type in _TOKENS_AT_ONCE else "cpu"
    return token_batches(lengths, _TOKENS_AT_ONCE[kind], _FREE_PADDING[kind])


def token_batches(lengths: Sequence[int], tokens_at_once: int, free_padding: int = 0) -> Iterator[list[int]]:
    """Indices of rows of similar length, the longest first, so that little of a batch is padding.

    Args:
        lengths: of the rows, in tokens.
        tokens_at_once: the most of a batch, padding included; a longer row stands alone.
        free_padding: tokens of padding in a batch that do not count.
    """
    batch: list[int] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch:
            longest = lengths[batch[0]]
            padding += longest - lengths[row]
            full = (len(batch) + 1) * longest > tokens_at_once
            if full or (padding > free_padding and lengths[row] < (1 - _MOST_PADDING) * longest):
                yield batch
                batch, padding = [], 0
        batch.append(row)
    if batch:
        yield batch


def _pieces(row: int, ids: NDArray[np.int64], skip: int, window: Window, room: int) -> Iterator[_WindowPart]:
    """The windows in which a row is read, in order, but for those in which nothing is to be scored."""
    half = room // 2 if window is Window.OVERLAP else 0
    start = 0  # of the window
    begin = skip  # the first token that no window has scored
    while begin < len(ids):
        end = min(start + room, len(ids))
        if end > begin:
            yield _WindowPart(row=row, ids=ids[start:end], skip=begin - start)
            begin = end
        start += room - half


def _joined(parts: Sequence[RowScores]) -> RowScores:
    if len(parts) == 1:
        return parts[0]
    tops = [part.top_nats for part in parts if part.top_nats is not None]
    ids = [part.top_ids for part in parts if part.top_ids is not None]
    return RowScores(
        nats=np.concatenate([part.nats for part in parts]),
        top_nats=np.concatenate(tops) if tops else None,
        top_ids=np.concatenate(ids) if ids else None,
    )


def _nothing(top_k: int) -> RowScores:
    nats = np.zeros(0, dtype=np.float32)
    if not top_k:
        return RowScores(nats=nats)
    return RowScores(nats=nats, top_nats=nats.reshape(0, top_k), top_ids=np.zeros((0, top_k), dtype=np.int64))

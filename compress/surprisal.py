"""The surprisal engine: the one place of the compressor that knows tensors and caches.

Surprisal of a token = −log p(token | all before it), nats, float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.compress.cache import EagerMemory, Memory
from terselm.compress.forward import Forward
from terselm.compress.graphs import GraphMemory, GraphPool
from terselm.compress.itpc import ScoreRequest
from terselm.compress.units import Ints
from terselm.errors import ModelError
from terselm.models import CausalLM
from terselm.models.memory import in_halves
from terselm.models.reading import grain

Surprisals = NDArray[np.float32]

_TOKENS_AT_ONCE = {"cpu": 1 << 10, "cuda": 1 << 16}  # of a coarse batch, padding included
_USUAL_PASS = 128  # tokens of a row: what was kept of a segment, and the next
_MOST_PADDING = 0.15
_CPU_CACHE = 2 << 30  # bytes
_SHARE_FOR_CACHE = 0.4  # of the memory: the buffers double as they grow, and the passes need some too
_FREE_PADDING = {"cpu": 0, "cuda": 1 << 13}  # tokens that cost less than one more pass would


class SurprisalEngine:
    """Surprisals under one causal LM, without ever holding (B, T, V) logits.

    Args:
        lm: the model; see `Forward`.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._forward = Forward(lm)
        self._graphs = GraphPool(self._forward) if self._forward.device.type == "cuda" else None
        self.start_id = lm.start_id
        self.window = lm.window

    def score_texts(self, texts: Sequence[Ints]) -> list[Surprisals]:
        """Surprisals of texts that each stand alone, after BOS.

        A text longer than the window is read in pieces of window − 1 tokens, each after BOS.

        Args:
            texts: token ids, each ``(T_i,)``, not empty.

        Returns:
            one ``(T_i,)`` float32 array a text, nats.
        """
        step = self.window - 1
        rows = [(i, begin) for i, text in enumerate(texts) for begin in range(0, len(text), step)]
        pieces = [texts[i][begin : begin + step] for i, begin in rows]
        results = [np.zeros(len(text), dtype=np.float32) for text in texts]
        for batch in self._batches([len(piece) for piece in pieces]):
            pieces_of_batch = [pieces[row] for row in batch]
            scored = in_halves(
                self._score_batch, pieces_of_batch, lambda ids: too_large(len(ids)), self.give_back_memory
            )
            for row, values in zip(batch, scored, strict=True):
                text, begin = rows[row]
                results[text][begin : begin + len(values)] = values
        return results

    def rows_at_once(self, longest: int) -> int:
        """How many prompts, none of which reads more than ``longest`` tokens, advance together in the free memory."""
        if self._forward.device.type == "cuda":
            free = torch.cuda.mem_get_info(self._forward.device)[0] + _reserved(self._forward.device)
        else:
            free = _CPU_CACHE
        return max(1, int(_SHARE_FOR_CACHE * free) // (self._forward.bytes_per_token * longest))

    def give_back_memory(self) -> None:
        """After the GPU's memory was exhausted."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()

    def session(self, rows: int) -> Session:
        """Start reading ``rows`` prompts segment by segment, in lock step."""
        if self._graphs is not None and self._graphs.takes(rows, _USUAL_PASS):
            return Session(self, GraphMemory(self._forward, self._graphs, rows), rows)
        return Session(self, EagerMemory(self._forward), rows)

    def nll_at(self, states: torch.Tensor, where: Ints, targets: Ints) -> Surprisals:
        """−log p of ``targets`` ``(N,)`` after the states at ``where`` ``(N,)`` of the flattened ``(B, S, H)``."""
        chosen = states.flatten(0, 1)[self._tensor(where)]
        return self._forward.nll(chosen, self._tensor(targets)).cpu().numpy()

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of similar length, so that little of a batch is padding."""
        device = self._forward.device.type
        most = _TOKENS_AT_ONCE.get(device, _TOKENS_AT_ONCE["cpu"])
        free = _FREE_PADDING.get(device, 0)
        batch: list[int] = []
        padding = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if batch:
                longest = lengths[batch[0]]
                padding += longest - lengths[row]
                full = (len(batch) + 1) * longest > most
                if full or (padding > free and lengths[row] < (1 - _MOST_PADDING) * longest):
                    yield batch
                    batch, padding = [], 0
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, pieces: Sequence[Ints]) -> list[Surprisals]:
        lengths = [len(piece) for piece in pieces]
        ids = np.full((len(pieces), self._width(max(lengths)) + 1), self.start_id, dtype=np.int64)
        for row, piece in zip(ids, pieces, strict=True):
            row[1 : len(piece) + 1] = piece
        states = self._graphs.texts(ids[:, :-1]) if self._graphs is not None else None
        if states is None:
            states = self._forward.texts(self._tensor(ids[:, :-1]))
        real = np.arange(ids.shape[1] - 1) < np.array(lengths)[:, None]
        flat = self.nll_at(states, np.flatnonzero(real), ids[:, 1:][real])
        return np.split(flat, np.cumsum(lengths)[:-1])

    def _width(self, longest: int) -> int:
        step = grain(longest) if self._forward.device.type == "cpu" else 1
        return min(self.window, -(-longest // step) * step)

    def _tensor(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._forward.device, non_blocking=True)


def too_large(tokens: int) -> ModelError:
    """The error of a prompt that does not fit into memory even by itself."""
    return ModelError(
        f"the GPU has too little free memory to read {tokens} tokens with this model; "
        "choose a smaller small LM, a dtype of fewer bits, or device cpu"
    )


def _reserved(device: torch.device) -> int:
    """Bytes that torch holds and does not use."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Session:
    """Prompts that are read segment by segment in lock step: exact, in one pass a segment.

    A pass forwards what each prompt has just decided to keep, then its next segment. The keys and values of the kept
    tokens stay in the cache; those of the segment leave it, since most of its tokens will be dropped.
    """

    def __init__(self, engine: SurprisalEngine, memory: Memory, rows: int) -> None:
        self._engine = engine
        self._memory = memory
        self._slots: Ints = np.zeros((rows, 0), dtype=np.int64)  # position in each slot, −1 for none
        self._length = np.zeros(rows, dtype=np.int64)  # tokens of each prefix that are in the cache
        self._last_id = np.zeros(rows, dtype=np.int64)
        self._last_slot = np.zeros(rows, dtype=np.int64)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._memory.select(rows)
        for name in ("_slots", "_length", "_last_id", "_last_slot"):
            setattr(self, name, getattr(self, name)[list(rows)])

    @torch.inference_mode()
    def step(self, requests: Sequence[ScoreRequest]) -> list[Surprisals]:
        """Surprisals of each row's segment, ``(len(segment),)`` float32, nats. One request a row."""
        pending = [self._take(row, request) for row, request in enumerate(requests)]
        width = max(len(tokens) for tokens in pending)
        shape = (len(requests), width + max(len(request.segment) for request in requests))
        ids = np.full(shape, self._engine.start_id, dtype=np.int64)
        positions = np.full(shape, -1, dtype=np.int64)
        columns, targets = [], []  # of the state before each segment token, in the flattened (B, S); the token
        for row, (tokens, request) in enumerate(zip(pending, requests, strict=True)):
            begin, size = self._length[row], len(request.segment)
            ids[row, : len(tokens)] = tokens
            positions[row, : len(tokens)] = begin + np.arange(len(tokens))
            ids[row, width : width + size] = request.segment
            positions[row, width : width + size] = begin + len(tokens) + np.arange(size)
            before = np.concatenate([[len(tokens) - 1], np.arange(width, width + size - 1)])
            columns.append(row * shape[1] + before)
            targets.append(request.segment)
        states = self._memory.read(ids, positions, np.concatenate([self._slots, positions], axis=1))
        self._keep(pending, positions[:, :width])
        flat = self._engine.nll_at(states, np.concatenate(columns), np.concatenate(targets))
        return np.split(flat, np.cumsum([len(target) for target in targets])[:-1])

    def _take(self, row: int, request: ScoreRequest) -> Ints:
        """The tokens that enter this row's prefix now: at least one, whose state predicts the segment's first."""
        if request.restart:
            self._slots[row] = -1
            self._length[row] = 0
            if len(self._slots) == 1:
                self._memory.clear()
                self._slots = self._slots[:, :0]
        append = request.prefix[request.read :]
        if self._length[row] == 0:
            return np.concatenate([[self._engine.start_id], append])
        if len(append):
            return append
        self._slots[row, self._last_slot[row]] = -1  # read the last token again
        self._length[row] -= 1
        return self._last_id[row : row + 1].copy()

    def _keep(self, pending: Sequence[Ints], positions: Ints) -> None:
        for row, tokens in enumerate(pending):
            self._length[row] += len(tokens)
            self._last_id[row] = tokens[-1]
            self._last_slot[row] = self._memory.used + len(tokens) - 1
        self._slots = np.concatenate([self._slots, positions], axis=1)
        self._memory.used += positions.shape[1]

"""The surprisal engine: texts by themselves, and prompts segment by segment.

Surprisal of a token = −log p(token | all before it), nats, float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from terselm.compress.engine.forward import EagerMemory, Forward, Memory
from terselm.compress.itpc import ScoreRequest
from terselm.compress.layout import Floats32, Ints
from terselm.models import CausalLM
from terselm.models.memory import free_bytes
from terselm.models.scoring import RowScorer, Window

_USUAL_PASS = 128  # tokens of a row: what was kept of a segment, and the next
_SHARE_FOR_CACHE = 0.4  # of the memory: the buffers double as they grow, and the passes need some too


class SurprisalEngine:
    """Surprisals under one causal LM, without ever holding (B, T, V) logits.

    Args:
        lm: the model; see `Forward`.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._forward = Forward(lm)
        self._graphs = None
        if self._forward.device.type == "cuda":
            from terselm.compress.engine.graphs import GraphPool

            self._graphs = GraphPool(self._forward)
        self.lm = lm
        self.start_id = lm.start_id
        self.window = lm.window
        self.device = self._forward.device

    def score_texts(self, texts: Sequence[Ints]) -> list[Floats32]:
        """Surprisals of texts that each stand alone, after BOS.

        A text longer than the window is read in pieces of window − 1 tokens, each after BOS.

        Args:
            texts: token ids, each ``(T_i,)``.

        Returns:
            one ``(T_i,)`` float32 array a text, nats.
        """
        return self._score(texts, [0] * len(texts), Window.PIECES)

    def score_after(self, pairs: Sequence[tuple[Ints, Ints]]) -> list[Floats32]:
        """Surprisals of texts that each follow another one, which follows BOS.

        Args:
            pairs: token ids of what stands before, ``(P_i,)``, and of the text, ``(T_i,)``; both fit into the window.

        Returns:
            one ``(T_i,)`` float32 array a pair, nats.
        """
        rows = [np.concatenate(pair) for pair in pairs]
        return self._score(rows, [len(before) for before, _ in pairs], Window.OVERLAP)

    def _score(self, rows: Sequence[Ints], skips: Sequence[int], window: Window) -> list[Floats32]:
        scorer = RowScorer(
            self.lm,
            head=self._forward.head,
            states_of=self._graphs.texts if self._graphs is not None else None,
            give_back=self.give_back_memory,
        )
        scores = dict(scorer.score(rows, skips=skips, window=window))
        return [scores[number].nats for number in range(len(rows))]

    def rows_at_once(self, longest: int) -> int:
        """How many prompts, none of which reads more than ``longest`` tokens, advance together in the free memory."""
        free = free_bytes(self._forward.device)
        return max(1, int(_SHARE_FOR_CACHE * free) // (self._forward.bytes_per_token * longest))

    def give_back_memory(self) -> None:
        """After the GPU's memory was exhausted."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()

    def session(self, rows: int) -> Session:
        """Start reading ``rows`` prompts segment by segment, in lock step."""
        if self._graphs is not None and (memory := self._graphs.memory(rows, _USUAL_PASS)) is not None:
            return Session(self, memory, rows)
        return Session(self, EagerMemory(self._forward), rows)

    def nll_at(self, states: torch.Tensor, where: Ints, targets: Ints) -> Floats32:
        """−log p of ``targets`` ``(N,)`` after the states at ``where`` ``(N,)`` of the flattened ``(B, S, H)``."""
        chosen = states.flatten(0, 1)[self._tensor(where)]
        return self._forward.head.nll(chosen, self._tensor(targets)).cpu().numpy()

    def _tensor(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._forward.device, non_blocking=True)


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
        chosen = list(rows)
        self._slots, self._length = self._slots[chosen], self._length[chosen]
        self._last_id, self._last_slot = self._last_id[chosen], self._last_slot[chosen]

    @torch.inference_mode()
    def step(self, requests: Sequence[ScoreRequest]) -> list[Floats32]:
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
        states = self._memory.read(ids, positions, np.concatenate([self._slots, positions], axis=1), width)
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
            self._last_slot[row] = self._slots.shape[1] + len(tokens) - 1
        self._slots = np.concatenate([self._slots, positions], axis=1)

"""The surprisal engine: the one place of the compressor that knows tensors and caches.

Surprisal of a token = −log p(token | all before it), nats, float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.compress.cache import SlotCache
from terselm.compress.itpc import ScoreRequest
from terselm.compress.units import Ints
from terselm.models import CausalLM

Surprisals = NDArray[np.float32]

_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}  # of the (rows, vocabulary) matrix
_TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 16}  # of a coarse batch, padding included
_MOST_PADDING = 0.15


class SurprisalEngine:
    """Surprisals under one causal LM, without ever holding (B, T, V) logits.

    Args:
        lm: any decoder-only model of transformers whose head is a linear layer (with a soft cap, a scale, or neither).
    """

    def __init__(self, lm: CausalLM) -> None:
        self._body = lm.model.base_model
        self._head = lm.model.get_output_embeddings()
        self._config = lm.model.config.get_text_config()
        self.start_id = lm.start_id
        self.device: torch.device = lm.model.device
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
            for row, values in zip(batch, self._score_batch([pieces[row] for row in batch]), strict=True):
                text, begin = rows[row]
                results[text][begin : begin + len(values)] = values
        return results

    def session(self, rows: int) -> Session:
        """Start reading ``rows`` prompts segment by segment, in lock step."""
        return Session(self, rows)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of similar length, so that little of a batch is padding."""
        most = _TOKENS_AT_ONCE.get(self.device.type, _TOKENS_AT_ONCE["cpu"])
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if batch:
                longest = lengths[batch[0]]
                full = (len(batch) + 1) * (longest + 1) > most
                if full or lengths[row] < (1 - _MOST_PADDING) * longest:
                    yield batch
                    batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, pieces: Sequence[Ints]) -> list[Surprisals]:
        lengths = [len(piece) for piece in pieces]
        ids = np.full((len(pieces), max(lengths) + 1), self.start_id, dtype=np.int64)
        for row, piece in zip(ids, pieces, strict=True):
            row[1 : len(piece) + 1] = piece
        # Padding stands at the end, where causal attention lets no real token see it: no mask is needed.
        states = self._body(input_ids=self._tensor(ids[:, :-1]), use_cache=False).last_hidden_state
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        flat = self.nll_at(states, np.flatnonzero(real), ids[:, 1:][real])
        return np.split(flat, np.cumsum(lengths)[:-1])

    def nll_at(self, states: torch.Tensor, where: Ints, targets: Ints) -> Surprisals:
        """−log p of ``targets`` ``(N,)`` after the states at ``where`` ``(N,)`` of the flattened ``(B, S, H)``."""
        chosen = states.flatten(0, 1)[self._tensor(where)]
        wanted_ids = self._tensor(targets)
        rows = max(1, _LOGITS_AT_ONCE.get(self.device.type, _LOGITS_AT_ONCE["cpu"]) // self._config.vocab_size)
        chunks = []
        for some, wanted in zip(torch.split(chosen, rows), torch.split(wanted_ids, rows), strict=True):
            logits = self._logits(some)
            chunks.append(logits.logsumexp(-1) - logits.gather(-1, wanted[:, None])[:, 0])
        return torch.cat(chunks).cpu().numpy()

    def read(self, ids: Ints, positions: Ints, slots: Ints, cache: SlotCache) -> torch.Tensor:
        """Last hidden states ``(B, S, H)`` of new tokens ``(B, S)``, whose keys and values enter ``cache``.

        Args:
            positions: ``(B, S)``, −1 at padding.
            slots: ``(B, used + S)``, the position that each slot holds for each row, −1 for none.
        """
        distance = self._tensor(positions)[:, :, None] - self._tensor(slots)[:, None, :]
        mask = (distance >= 0) & self._tensor(slots >= 0)[:, None, :]
        new = torch.arange(positions.shape[1], device=self.device)
        mask[:, new, cache.used + new] = True  # padding sees itself: attention to nothing would be NaN
        output = self._body(
            input_ids=self._tensor(ids),
            position_ids=self._tensor(positions.clip(0)),
            attention_mask=self._masks(mask, distance),
            past_key_values=cache,
            use_cache=True,
        )
        states: torch.Tensor = output.last_hidden_state
        return states

    def _masks(self, mask: torch.Tensor, distance: torch.Tensor) -> Any:
        """The mask in the form that this model takes: one, or one for each type of its layers."""
        width = getattr(self._config, "sliding_window", None)
        types = set(getattr(self._config, "layer_types", None) or ())
        narrow = mask & (distance < width) if width else mask
        if types:
            return {kind: self._form(narrow if kind == "sliding_attention" else mask) for kind in types}
        uses_window = width is not None and getattr(self._config, "use_sliding_window", True)
        return self._form(narrow if uses_window else mask)

    def _form(self, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None]  # (B, 1, S, used + S)
        if self._config._attn_implementation == "sdpa":
            return mask
        blocked = torch.finfo(self._head.weight.dtype).min
        return torch.zeros_like(mask, dtype=self._head.weight.dtype).masked_fill(~mask, blocked)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(states).float()
        if scale := getattr(self._config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(self._config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(self._config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


class Session:
    """Prompts that are read segment by segment in lock step: exact, in one pass a segment.

    A pass forwards what each prompt has just decided to keep, then its next segment. The keys and values of the kept
    tokens stay in the cache; those of the segment leave it, since most of its tokens will be dropped.
    """

    def __init__(self, engine: SurprisalEngine, rows: int) -> None:
        self._engine = engine
        self._cache = SlotCache()
        self._slots: Ints = np.zeros((rows, 0), dtype=np.int64)  # position in each slot, −1 for none
        self._length = np.zeros(rows, dtype=np.int64)  # tokens of each prefix that are in the cache
        self._last_id = np.zeros(rows, dtype=np.int64)
        self._last_slot = np.zeros(rows, dtype=np.int64)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._cache.select(rows)
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
        states = self._engine.read(ids, positions, np.concatenate([self._slots, positions], axis=1), self._cache)
        self._keep(pending, positions[:, :width])
        flat = self._engine.nll_at(states, np.concatenate(columns), np.concatenate(targets))
        return np.split(flat, np.cumsum([len(target) for target in targets])[:-1])

    def _take(self, row: int, request: ScoreRequest) -> Ints:
        """The tokens that enter this row's prefix now: at least one, whose state predicts the segment's first."""
        if request.restart:
            self._slots[row] = -1
            self._length[row] = 0
            if len(self._slots) == 1:
                self._cache = SlotCache()
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
            self._last_slot[row] = self._cache.used + len(tokens) - 1
        self._slots = np.concatenate([self._slots, positions], axis=1)
        self._cache.used += positions.shape[1]

"""Surprisals under the small LM: of texts by themselves, and of prompts that are read segment by segment in lock step.

Surprisal of a token = −log p(token | all before it), nats, float32. From the engine and its sessions down to the
forward pass and the slots that hold the keys and values of growing prefixes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from terselm.compress.itpc import ScoreRequest
from terselm.compress.layout import Floats32
from terselm.errors import ModelError
from terselm.models import CausalLM
from terselm.models.memory import free_bytes, kv_bytes
from terselm.models.reading import OutputHead, cache_argument, fast_attention, grain, last_states

if TYPE_CHECKING:
    from terselm.compress.utility import UtilityWindow
    from terselm.statistics import Ints

_LAYERS = {"full_attention", "sliding_attention"}
_USUAL_PASS = 128  # tokens of a row: what was kept of a segment, and the next
_SHARE_FOR_CACHE = 0.4  # of the memory: the buffers double as they grow, and the passes need some too
_GRAIN = 256  # slots
_PASSES_BETWEEN_TRIMS = 16


def require_attention(lm: CausalLM) -> None:
    """Raise `ModelError` for a model of which a prefix cannot lose tokens again: one with recurrent layers."""
    config = lm.model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others or getattr(lm.model, "_is_stateful", False):
        raise ModelError(
            f"{lm.name!r} ({type(lm.model).__name__}) has layers other than full and sliding attention"
            f"{' (' + ', '.join(sorted(others)) + ')' if others else ''}, so that no token "
            "can be taken out of what it has read; choose a small LM with attention alone, such as smollm2-135m"
        )


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
        return self._score(texts, [0] * len(texts), "pieces")

    def score_after(self, pairs: Sequence[tuple[Ints, Ints]]) -> list[Floats32]:
        """Surprisals of texts that each follow another one, which follows BOS.

        Args:
            pairs: token ids of what stands before, ``(P_i,)``, and of the text, ``(T_i,)``; both fit into the window.

        Returns:
            one ``(T_i,)`` float32 array a pair, nats.
        """
        rows = [np.concatenate(pair) for pair in pairs]
        return self._score(rows, [len(before) for before, _ in pairs], "overlap")

    def _score(self, rows: Sequence[Ints], skips: Sequence[int], window: str) -> list[Floats32]:
        from terselm.models.scoring import RowScorer, Window  # many prompts need no such text

        scorer = RowScorer(
            self.lm,
            head=self._forward.head,
            states_of=self._graphs.texts if self._graphs is not None else None,
            give_back=self.give_back_memory,
        )
        scores = dict(scorer.score(rows, skips=skips, window=Window(window)))
        return [scores[number].nats for number in range(len(rows))]

    def score_units(self, windows: Sequence[UtilityWindow]) -> list[Floats32]:
        """Scores of units by the model's utility head, without logits.

        Returns:
            one ``(n,)`` float32 array a window.

        Raises:
            ModelError: the model has no such head.
        """
        from terselm.compress.engine.utility import UtilityScorer  # few checkpoints have a head

        if self.lm.utility is None:
            raise ModelError(f"{self.lm.name!r} has no utility head, so that it cannot score units")
        scorer = UtilityScorer(
            self.lm,
            self.lm.utility,
            states_of=self._graphs.texts if self._graphs is not None else None,
            give_back=self.give_back_memory,
        )
        return scorer.score(windows)

    def rows_at_once(self, longest: int) -> int:
        """How many prompts, none of which reads more than ``longest`` tokens, advance together in the free memory."""
        free = free_bytes(self._forward.device)
        return max(1, int(_SHARE_FOR_CACHE * free) // (kv_bytes(self.lm.model, self.lm.model.dtype) * longest))

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


class Forward:
    """The forward pass of one model, in the two forms that the engine needs.

    Args:
        lm: any decoder-only model of transformers whose head is a linear layer (with a soft cap, a scale, or neither).

    Attributes:
        head: its output head.

    Raises:
        ModelError: it is another.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._model = lm.model
        self.head = OutputHead(lm.model)
        self._config = lm.model.config.get_text_config()
        self.parameters = int(lm.model.num_parameters())
        self.device: torch.device = lm.model.device
        self._dtype: torch.dtype = lm.model.dtype  # of the activations; int8 weights have none

    def texts(self, ids: Tensor) -> Tensor:
        """Last hidden states ``(B, T, H)`` of texts ``(B, T)`` that are padded at their ends."""
        return last_states(self._model, ids)

    def extend(self, ids: Tensor, positions: Tensor, slots: Tensor, new: Tensor, cache: Any) -> Tensor:
        """Last hidden states ``(B, S, H)`` of new tokens ``(B, S)``, whose keys and values enter ``cache``.

        Args:
            positions: ``(B, S)``, −1 at padding.
            slots: ``(B, C)``, the position that each slot of the cache holds for each row, −1 for none.
            new: ``(S,)``, the slots of the new tokens.
        """
        distance = positions[:, :, None] - slots[:, None, :]  # (B, S, C)
        itself = new[:, None] == torch.arange(slots.shape[1], device=new.device)  # else padding attends to nothing: NaN
        mask = (distance >= 0) & (slots >= 0)[:, None, :] | itself
        inputs = {"position_ids": positions.clamp(min=0), "attention_mask": self._masks(mask, distance)}
        inputs |= cache_argument(self._model.base_model, cache)
        with fast_attention():
            output = self._model.base_model(input_ids=ids, use_cache=True, **inputs)
        states: Tensor = output.last_hidden_state
        return states

    def _masks(self, mask: Tensor, distance: Tensor) -> Any:
        """The mask in the form that this model takes: one, or one for each type of its layers."""
        width = getattr(self._config, "sliding_window", None)
        types = set(getattr(self._config, "layer_types", None) or ())
        narrow = mask & (distance < width) if width else mask
        if types:
            return {kind: self._form(narrow if kind == "sliding_attention" else mask) for kind in types}
        uses_window = width is not None and getattr(self._config, "use_sliding_window", True)
        return self._form(narrow if uses_window else mask)

    def _form(self, mask: Tensor) -> Tensor:
        mask = mask[:, None]  # (B, 1, S, C)
        if self._config._attn_implementation == "sdpa":
            return mask
        blocked = torch.finfo(self._dtype).min
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill(~mask, blocked)


class Memory(Protocol):
    """What a session's prompts have read so far. All rows share slots: see `SlotCache`."""

    def read(self, ids: Ints, positions: Ints, slots: Ints, keep: int) -> Tensor:
        """Last hidden states of new tokens; the first ``keep`` of each row stay in the slots after the used ones.

        Args:
            ids, positions: ``(B, S)``; position −1 is padding.
            slots: ``(B, used + S)``, the position that each slot holds for each row, −1 for none.

        Returns:
            ``(B, S, H)``.
        """

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def clear(self) -> None:
        """Forget everything."""


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows share slots: token t of a pass is written into slot ``used + t`` of every row.

    What a slot means to a row (a position, or nothing) is the caller's to know and to say in the attention mask.
    Every layer keeps all slots, also where the model attends to a sliding window; the mask limits what is seen.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.used = 0
        self.shown = 0  # slots that the next pass attends to, or masks: at least the used ones and its own
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(B, H, S, D)`` keys and values behind the used slots; return ``(B, H, shown, D)``."""
        end = self.used + key_states.shape[2]
        if layer_idx == len(self._buffers):
            self._buffers.append((_grown(None, key_states, self.shown), _grown(None, value_states, self.shown)))
        keys, values = self._buffers[layer_idx]
        if keys.shape[2] < self.shown:
            keys, values = _grown(keys, key_states, self.shown), _grown(values, value_states, self.shown)
            self._buffers[layer_idx] = keys, values
        keys[:, :, self.used : end] = key_states
        values[:, :, self.used : end] = value_states
        return keys[:, :, : self.shown], values[:, :, : self.shown]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def select(self, rows: Sequence[int]) -> None:
        if self._buffers:
            index = torch.tensor(rows, device=self._buffers[0][0].device)
            self._buffers = [(keys[index], values[index]) for keys, values in self._buffers]


class EagerMemory:
    """`Memory` in buffers that grow, read with ordinary calls of the model."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._cache = SlotCache()
        self._passes = 0

    def read(self, ids: Ints, positions: Ints, slots: Ints, keep: int) -> Tensor:
        device = self._forward.device
        length = ids.shape[1]
        if device.type == "cpu":
            self._passes += 1
            if self._passes % _PASSES_BETWEEN_TRIMS == 0:
                _trim()
            excess = -length % grain(length)
            total = self._cache.used + length + excess
            ids = np.pad(ids, ((0, 0), (0, excess)))
            positions = np.pad(positions, ((0, 0), (0, excess)), constant_values=-1)
            slots = np.pad(slots, ((0, 0), (0, excess + -total % grain(total))), constant_values=-1)
        self._cache.shown = slots.shape[1]
        new = torch.arange(self._cache.used, self._cache.used + ids.shape[1], device=device)
        tokens, places, held = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (ids, positions, slots)
        )
        states = self._forward.extend(tokens, places, held, new, self._cache)
        self._cache.used += keep
        return states[:, :length]

    def select(self, rows: Sequence[int]) -> None:
        self._cache.select(rows)

    def clear(self) -> None:
        self._cache = SlotCache()


def _trim() -> None:
    """Have the C library return what is free: as a prefix grows, each pass needs larger pieces than were freed."""
    with suppress(OSError, AttributeError):  # other systems than Linux with glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _grown(old: Tensor | None, like: Tensor, slots: int) -> Tensor:
    """A buffer of at least ``slots`` slots that begins with ``old``; a quarter more than needed, to grow seldom."""
    slots = -(-(slots + slots // 4) // _GRAIN) * _GRAIN
    new = like.new_zeros(*like.shape[:2], slots, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new

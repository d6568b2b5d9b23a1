"""Answers decoded in slots: rows that are refilled as answers end, each step replayed from one captured CUDA graph.

A decoding step of a small model is a thousand small kernels, and launching them one by one takes several times longer
than they run. Captured once, they are launched together. That needs tensors that stay where they are: every slot has
room for the longest row, writes its next key and value at its own position, and attends to the positions up to it.
The host looks at the tokens of several steps together; a row that ended among them has computed a few tokens in vain.

A prompt's last token is decoded like those of the answer, so that prefilling needs no logits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from terselm.data.generate import Answer, Draws, Limits, Query, Reply, choose, start_replies
from terselm.models import CausalLM
from terselm.models.memory import free_bytes
from terselm.models.reading import cache_argument, fast_attention

ATTENTION = "terselm_slots"

_log = logging.getLogger(__name__)
_SLOTS = {"cuda": 256, "cpu": 8}
_SHARE = 0.6  # of the free memory, for keys and values
_STEPS = 8  # between two looks of the host
_REFILL_AT = 1 / 8  # of the slots are empty
_PREFILLED_TOGETHER = 1 << 14  # tokens, padding included
_GRAIN = 128  # slots are read up to a multiple of it
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNKNOWN = ("s_aux", "position_bias")  # what some models add to attention, and we do not


class UnsuitableModelError(Exception):
    """This model cannot be decoded in slots; the message says why."""


def decode(
    lm: CausalLM, queries: Sequence[Query], limits: Limits, *, slots: int | None = None
) -> Iterator[tuple[int, Answer]]:
    """Each answer with the index of its query, as soon as it is known.

    Args:
        slots: how many rows are decoded together at most; by default 256 on a GPU, or what its memory allows.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window.
        UnsuitableModelError: before the first answer.
        torch.OutOfMemoryError: no memory for a single slot.
    """
    waiting = dict(enumerate(start_replies(lm, queries, limits)))
    most = min(len(queries), slots or _SLOTS.get(lm.model.device.type, 8))
    while waiting:
        try:
            for index, reply in _Slots(lm, waiting, limits, most).run(waiting):
                del waiting[index]
                yield index, reply.answer()
        except torch.OutOfMemoryError:
            if most == 1:
                raise
        else:
            return
        most = max(1, most // 2)
        waiting = {index: reply.afresh() for index, reply in waiting.items()}
        torch.cuda.empty_cache()
        _log.info("out of memory; going on with %s slots", most)


class _Slots:
    """The rows of a batch that never changes its shape.

    Args:
        replies: what is to be answered, by index; sizes the slots.
        most: slots.
    """

    @torch.inference_mode()
    def __init__(self, lm: CausalLM, replies: dict[int, Reply], limits: Limits, most: int) -> None:
        self._model = lm.model
        self._limits = limits
        self._config = lm.model.config.get_text_config()
        self._device = lm.model.device
        self._sampled = any(reply.query.temperature > 0 for reply in replies.values())
        room = max(len(reply.prompt) for reply in replies.values()) + limits.max_new_tokens
        probe = self._probe(lm.start_id)
        self.count = self._affordable(probe, room, most)
        self._place = _Place(torch.arange(self.count, device=self._device), room)
        self._layers = [_SlotLayer(self._empty(keys), self._empty(values), self._place) for keys, values in probe]
        self._tokens = torch.full((self.count,), lm.start_id, device=self._device)
        blank = Query(prompt="", temperature=0.0, seed=0)
        self._draws = Draws.of([blank] * self.count, self._device)
        self._history = torch.zeros(_STEPS, self.count, dtype=torch.int64, device=self._device)
        self._tick = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._rows: list[tuple[int, Reply] | None] = [None] * self.count
        self._graphs: dict[int, Any] = {}  # by how far the slots are read; None where one step has run uncaptured
        self._pool: Any = None
        self._captures = self._device.type == "cuda"

    def _empty(self, probe: Tensor) -> Tensor:
        """Room in every slot for the keys or values of one layer, of which ``(1, heads, 1, D)`` are known."""
        return probe.new_zeros(self.count, probe.shape[1], self._place.room, probe.shape[3])

    def run(self, replies: dict[int, Reply]) -> Iterator[tuple[int, Reply]]:
        """Finish the replies, longest prompts first."""
        waiting = deque(sorted(replies.items(), key=lambda item: -len(item[1].prompt)))
        while waiting or any(self._rows):
            empty = [slot for slot, row in enumerate(self._rows) if row is None]
            if waiting and len(empty) >= self.count * _REFILL_AT:
                self._fill(empty, waiting)
            for tokens in self._advance():
                for row, token in zip(self._rows, tokens, strict=True):
                    if row is not None:
                        row[1].take(token)
            for slot, row in enumerate(self._rows):
                if row is not None and row[1].finish_reason is not None:
                    self._rows[slot] = None
                    yield row

    @torch.inference_mode()
    def _fill(self, empty: list[int], waiting: deque[tuple[int, Reply]]) -> None:
        """Put as many prompts into empty slots as there are."""
        slots: list[int] = []
        while waiting and len(slots) < len(empty):
            slot = empty[len(slots)]
            self._rows[slot] = waiting.popleft()
            slots.append(slot)
        replies = [row[1] for slot in slots if (row := self._rows[slot]) is not None]
        begin = 0
        while begin < len(slots):  # the prompts of a batch are as long as its first, or shorter
            width = len(replies[begin].prompt) - 1
            end = begin + max(1, _PREFILLED_TOGETHER // max(1, width))
            states = self._prefill([reply.prompt[:-1] for reply in replies[begin:end]]) if width else []
            rows = torch.tensor(slots[begin:end], device=self._device)
            for layer, (keys, values) in zip(self._layers, states, strict=False):
                layer.keys[rows, :, :width] = keys
                layer.values[rows, :, :width] = values
            begin = end
        rows = torch.tensor(slots, device=self._device)
        self._tokens[rows] = torch.tensor([reply.prompt[-1] for reply in replies], device=self._device)
        self._place.positions[rows] = torch.tensor([len(reply.prompt) - 1 for reply in replies], device=self._device)
        draws = Draws.of([reply.query for reply in replies], self._device)
        self._draws.temperatures[rows] = draws.temperatures
        self._draws.keys[rows] = draws.keys
        self._draws.steps[rows] = 0

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(P, heads, T, D)`` of each layer; beyond a prompt's end they mean nothing."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        cache = DynamicCache()  # of no config: layers with a window keep all, too
        # Padded on the right: no token sees what comes after it, so no mask is needed, and the fast kernels run.
        with fast_attention():
            self._model(
                input_ids=ids.to(self._device),
                position_ids=torch.arange(width, device=self._device)[None].expand(len(prompts), -1),
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self._model, cache),
            )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _probe(self, token: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of one token.

        Raises:
            UnsuitableModelError: a layer keeps something else.
        """
        types = set(getattr(self._config, "layer_types", None) or ())
        if not getattr(self._model, "_is_stateful", False) and types <= _LAYER_TYPES:
            probe = self._prefill([[token]])
            states = [state for layer in probe for state in layer]
            if len(probe) == self._config.num_hidden_layers and all(state.dim() == 4 for state in states):
                return probe
        raise UnsuitableModelError("its layers do not keep keys and values of every token")

    def _affordable(self, probe: Sequence[tuple[Tensor, Tensor]], room: int, most: int) -> int:
        """How many slots the free memory holds."""
        if self._device.type != "cuda":
            return most
        one = sum(state.nbytes for layer in probe for state in layer) * room  # the probe is one token
        return max(1, min(most, int(_SHARE * free_bytes(self._device)) // one))

    @torch.inference_mode()
    def _advance(self) -> list[list[int]]:
        """Some steps of all slots: the tokens of each step, by slot."""
        reach = max(len(row[1].prompt) + len(row[1].tokens) for row in self._rows if row is not None) + _STEPS - 1
        self._place.reach = min(self._place.room, -(-reach // _GRAIN) * _GRAIN)
        graph = self._graphs.get(self._place.reach)
        if graph is None:
            self._run_steps()
        else:
            for _ in range(_STEPS):
                graph.replay()
        tokens: list[list[int]] = self._history.tolist()
        return tokens

    def _run_steps(self) -> None:
        """The steps uncaptured, which warms up what they need, and then capture one for the next time."""
        its_own = self._config._attn_implementation
        self._model.set_attn_implementation(ATTENTION)
        try:
            for _ in range(_STEPS):
                self._step()
            if self._captures:
                self._capture()
        finally:
            self._model.set_attn_implementation(its_own)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the model waits for the device in the middle of a step
            self._captures = False
            torch.cuda.synchronize(self._device)
            _log.warning("the steps of this model cannot be captured, and run slower: %s", str(error).split("\n")[0])
            return
        self._pool = self._pool or graph.pool()
        self._graphs[self._place.reach] = graph

    def _step(self) -> None:
        """One token for every slot, empty ones included; only tensors that stay in place are read and written."""
        place = self._place
        out = self._model(
            input_ids=self._tokens[:, None],
            position_ids=place.own()[:, None],
            attention_mask=self._masks(),
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self._model, Cache(layers=list(self._layers))),
        )
        chosen = choose(out.logits[:, -1].float(), self._draws, self._limits, sampled=self._sampled)
        self._history.index_copy_(0, self._tick, chosen[None])
        self._tick.add_(1).remainder_(_STEPS)
        self._tokens.copy_(chosen)
        self._draws.steps.add_(1)
        place.positions.add_(1)

    def _masks(self) -> Any:
        """What each slot attends to, ``(B, 1, 1, reach)``: one mask, or one for each type of the model's layers."""
        own = self._place.own()[:, None]  # (B, 1)
        others = torch.arange(self._place.reach, device=self._device)[None]
        mask = others <= own
        width = getattr(self._config, "sliding_window", None)
        narrow = mask & (others > own - width) if width else mask
        mask, narrow = mask[:, None, None], narrow[:, None, None]
        if types := set(getattr(self._config, "layer_types", None) or ()):
            return {kind: narrow if kind == "sliding_attention" else mask for kind in types}
        return narrow if getattr(self._config, "use_sliding_window", True) else mask


class _Place:
    """Where the slots are.

    Attributes:
        rows: ``(B,)``, 0, 1, 2 …
        positions: ``(B,)``, where each slot's next token stands; past the end in slots whose row has ended.
        room: tokens that a slot holds.
        reach: tokens of each slot that a step reads.
    """

    def __init__(self, rows: Tensor, room: int) -> None:
        self.rows = rows
        self.positions = torch.zeros_like(rows)
        self.room = self.reach = room

    def own(self) -> Tensor:
        """The positions, kept within what is read."""
        return self.positions.clamp(max=self.reach - 1)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, ``(B, heads, room, D)``, written in place."""

    def __init__(self, keys: Tensor, values: Tensor, place: _Place) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True
        self._place = place

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write those of one token a slot, ``(B, heads, 1, D)``; returns all that the step reads."""
        rows, own, reach = self._place.rows, self._place.own(), self._place.reach
        self.keys[rows, :, own] = key_states[:, :, 0]
        self.values[rows, :, own] = value_states[:, :, 0]
        return self.keys[:, :, :reach], self.values[:, :, :reach]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.reach, 0

    def get_seq_length(self) -> int:
        return self._place.reach - 1

    def get_max_length(self) -> int:
        return self._place.room


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a row, in which the heads that share keys read them once. The signature is transformers'.

    Args:
        query: ``(B, H, 1, D)``.
        key: ``(B, H / groups, L, D)``.
        value: likewise.
        attention_mask: ``(B, 1, 1, L)`` bool.

    Returns:
        ``(B, 1, H, D)``, and no weights.

    Raises:
        UnsuitableModelError: the model wants something else besides.
    """
    if asked := [name for name in _UNKNOWN if other.get(name) is not None]:
        raise UnsuitableModelError(f"its attention takes {', '.join(asked)}")
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, width)  # (B, H / groups, groups, D)
    scores = (grouped @ key.transpose(-1, -2)).float() * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill_(~attention_mask, float("-inf")).softmax(-1).to(value.dtype)
    return (weights @ value).reshape(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, slot_attention)

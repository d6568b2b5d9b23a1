"""Reading texts with a causal LM: hidden states, and from them log-probabilities without (B, T, V) logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from terselm.errors import ModelError
from terselm.models import surprisal_kernel

_LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 27}  # of the (rows, vocabulary) matrix
_ROWS_AT_ONCE = {"cpu": 256, "cuda": 1 << 20}
_FEWEST_SHAPES = 16  # tokens
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names in model configurations; some models multiply by the value, others divide."""
_PROBE = 16  # tokens
_STRIDE = 7919  # a prime


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states ``(B, T, H)`` of texts ``(B, T)`` that are padded at their ends.

    Causal attention lets no real token see the padding, so no mask is needed.
    """
    with fast_attention():
        states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def states_before(model: Any, rows: Sequence[Sequence[int]], skips: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What predicts the tokens of each row but its first ``skip`` ones, at least one.

    Returns:
        ``(N, H)`` the last hidden states before these tokens; ``(N,)`` int64 the tokens; row after row.
    """
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    counted = np.zeros(ids.shape, dtype=np.bool_)
    for number, (row, skip) in enumerate(zip(rows, skips, strict=True)):
        ids[number, : len(row)] = row
        counted[number, skip : len(row)] = True
    states = last_states(model, torch.from_numpy(ids).to(model.device))
    places = torch.from_numpy(np.flatnonzero(counted) - 1).to(model.device)
    return states.flatten(0, 1)[places], torch.from_numpy(ids[counted]).to(model.device)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The argument of a pass that hands over keys and values, by the name that this model takes.

    transformers 5.24 renamed ``past_key_values`` to ``cache``; versions before know only the old name.
    """
    return {_cache_name(type(model)): cache}


def cache_of(output: Any) -> Any:
    """The keys and values that a pass has given back."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


@cache
def _cache_name(kind: type) -> str:
    return "past_key_values" if "past_key_values" in signature(kind.forward).parameters else "cache"


@contextmanager
def fast_attention() -> Iterator[None]:
    """All of torch's attention kernels but cuDNN's, which plans anew for every shape: half a millisecond a layer."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: ``cap · tanh(scale · x / cap)``, or ``scale · x`` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits.float() * self.scale
        return soft_cap(logits, self.cap)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """``cap · tanh(logits / cap)`` in float32; the logits as they are without a cap."""
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap


@torch.no_grad()
def logit_transform(model: Any) -> LogitTransform:
    """What a transformers causal LM does to its head's output, found by a pass over 16 tokens.

    Raises:
        ModelError: its logits are not made of its body's last states, its output head and such a transform; or they are
            no numbers.
    """
    ids = probe_ids(model)
    with _watched(model) as seen:
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    if logits.isnan().any():
        raise ModelError(
            f"{type(model).__name__} gives logits that are no numbers (NaN) in {model.dtype}; choose another dtype, or "
            "see whether its weights are damaged"
        )
    if seen.states is None or seen.read is None or seen.given is None or _distance(seen.states, seen.read) > 0:
        raise _unlike(model)
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    values = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
    found = [LogitTransform(scale, cap) for scale in (1.0, *values, *(1 / value for value in values))]
    errors = {transform: _distance(transform(seen.given), logits) for transform in found}
    best = min(found, key=errors.__getitem__)
    if errors[best] > 0.01:
        raise _unlike(model)
    return best


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest finite value."""
    found, expected = found.float(), expected.float()
    if found.shape != expected.shape:
        return float("inf")
    apart = torch.where(found == expected, 0.0, (found - expected).abs())  # of two infinities it would be NaN
    size = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else expected.new_tensor(1.0)
    return float(torch.nan_to_num(apart, nan=torch.inf).max() / size.clamp(min=1e-30))


def probe_ids(model: Any) -> Tensor:
    """``(T,)``: tokens from all over the vocabulary, as after a start of text.

    Control tokens, which come first in most vocabularies, drive trained models to states where bfloat16 is nats away.
    """
    config = model.config.get_text_config()
    length = min(_PROBE, int(getattr(config, "max_position_embeddings", None) or _PROBE))
    ids: Tensor = (torch.arange(length, device=model.device) * _STRIDE + _STRIDE) % config.vocab_size
    start = config.bos_token_id
    if isinstance(start, int) and 0 <= start < config.vocab_size:
        ids[0] = start
    return ids


@dataclass
class _Seen:
    """In one pass: the body's last states, what the head read of them, and what it gave."""

    states: Tensor | None = None
    read: Tensor | None = None
    given: Tensor | None = None


@contextmanager
def _watched(model: Any) -> Iterator[_Seen]:
    seen = _Seen()

    def body(_module: Any, _inputs: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        seen.states = None if states is None else states[0]

    def head(_module: Any, inputs: Any, output: Any) -> None:
        seen.read, seen.given = inputs[0][0], output[0]

    hooks = [model.base_model.register_forward_hook(body), model.get_output_embeddings().register_forward_hook(head)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _unlike(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does more to its last states than an output head, a scale and a soft cap, so its "
        "surprisals would be wrong here; choose another model"
    )


class OutputHead:
    """The head of one causal LM.

    Args:
        model: of transformers.

    Raises:
        ModelError: see `logit_transform`.
    """

    def __init__(self, model: Any) -> None:
        self._head: Any = model.get_output_embeddings()
        self._transform = logit_transform(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._device: torch.device = model.device
        self._widens = (
            self._device.type == "cuda"
            and type(self._head) is torch.nn.Linear
            and getattr(self._head, "bias", None) is None
            and self._head.weight.dtype in (torch.bfloat16, torch.float16)
        )

    def nll(self, states: Tensor, targets: Tensor) -> Tensor:
        """−log p of ``targets`` ``(N,)`` after ``states`` ``(N, H)``: ``(N,)`` float32, nats."""
        return self.nll_and_likeliest(states, targets, 0)[0]

    @torch.no_grad()
    def nll_and_likeliest(self, states: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the likeliest tokens in each place, the likeliest first; in chunks of rows.

        Returns:
            ``(N,)`` float32; ``(N, K)`` float32 log-probabilities; ``(N, K)`` int64 token ids.
        """
        count = len(targets)
        if self._device.type == "cpu" and (excess := -count % grain(count)):
            states, targets = pad(states, (0, 0, 0, excess)), pad(targets, (0, excess))
        parts = [
            self._chunk(some, wanted, min(top_k, self._vocabulary))
            for some, wanted in zip(self._chunks(states), self._chunks(targets), strict=True)
        ]
        nats, top, tokens = (torch.cat(part)[:count] for part in zip(*parts, strict=True))
        return nats, top, tokens

    def _chunk(self, states: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits(states)
        nats = surprisal_kernel.nll(logits, targets)
        top, tokens = logits.topk(top_k, dim=-1) if top_k else (logits[:, :0], targets[:, None][:, :0])
        total = nats + logits.gather(1, targets[:, None])[:, 0].float()  # log-sum-exp
        return nats, top.float() - total[:, None], tokens

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        place = self._device.type if self._device.type in _LOGITS_AT_ONCE else "cpu"
        return torch.split(rows, max(1, min(_ROWS_AT_ONCE[place], _LOGITS_AT_ONCE[place] // self._vocabulary)))

    def _logits(self, states: Tensor) -> Tensor:
        """``(N, V)``, float32 where the GPU can multiply into it: bfloat16 knows no step finer than 1/8 at 16."""
        if self._widens:
            return self._transform(torch.mm(states, self._head.weight.t(), out_dtype=torch.float32))
        return self._transform(self._head(states))


def grain(tokens: int) -> int:
    """What a number of rows is rounded up to on a CPU: a sixteenth of it, at least 16 tokens.

    oneDNN keeps a plan, a few MiB, for each number of rows that it has multiplied, a thousand of them.
    """
    return max(_FEWEST_SHAPES, 1 << max(0, tokens.bit_length() - 5))

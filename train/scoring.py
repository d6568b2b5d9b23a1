"""Negative log-likelihood of the counted tokens, without logits for all the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from terselm.errors import ModelError
from terselm.train.attention import PACKED_ATTENTION, UnsupportedAttentionError, register
from terselm.train.packing import IGNORED

_PROBE = 16  # tokens
_CHUNK = 1024  # positions whose logits are in memory at once: 200 MB in float32 for 49,152 tokens


def score_instead_of_logits(lm: Any, *, autocast: torch.dtype | None) -> None:
    """Make a transformers causal LM return the surprisal of each labelled token, in nats, instead of logits.

    Afterwards ``lm(input_ids, position_ids, labels)``, all ``(B, T)``, gives ``(n,)`` float32, in row-major order of
    the labels that are not `IGNORED`. It is done inside ``forward`` because wrappers such as DDP act on that alone.

    Args:
        lm: changed in place.
        autocast: number format of the matrix products; None leaves them as the weights are.

    Raises:
        ModelError: packed rows do not give what the model itself gives for each example alone.
    """

    def forward(input_ids: Tensor, position_ids: Tensor, labels: Tensor, **_: Any) -> Tensor:
        place = input_ids.device.type
        with torch.autocast(place, dtype=autocast) if autocast is not None else nullcontext():
            # A cache would switch off the mask between packed examples.
            hidden = lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            counted = labels != IGNORED
            return _surprisals(lm, hidden[counted], labels[counted])

    _choose_attention(lm, forward)
    lm.forward = forward


@torch.no_grad()
def _choose_attention(lm: Any, forward: Callable[..., Tensor]) -> None:
    """The fastest attention that keeps packed examples apart; also proves that we know the model's head."""
    ids = torch.arange(_PROBE, device=lm.device) % lm.config.vocab_size
    logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    alone = functional.cross_entropy(logits, ids[1:], reduction="none")
    labels = torch.cat([ids[1:], ids.new_tensor([IGNORED])])
    twice = {"input_ids": ids, "position_ids": torch.arange(_PROBE, device=lm.device), "labels": labels}
    packed = {name: tensor.repeat(2)[None] for name, tensor in twice.items()}
    its_own = lm.config._attn_implementation
    register()
    for attention in (PACKED_ATTENTION, its_own) if lm.device.type == "cpu" else (its_own,):
        lm.set_attn_implementation(attention)
        try:
            found = forward(**packed)
        except UnsupportedAttentionError:
            continue
        if torch.allclose(found, alone.repeat(2), atol=0.1, rtol=0.02):  # bfloat16's rounding is well below
            return
    raise ModelError(
        f"{type(lm).__name__} gives other probabilities in packed rows than for each text alone, so alignment would "
        "train something else; choose another small LM"
    )


def _surprisals(lm: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """``(n, H)`` hidden states and ``(n,)`` tokens to ``(n,)`` float32 nats, a chunk at a time."""
    if len(targets) <= _CHUNK:
        return _chunk_surprisals(lm, hidden, targets)
    chunks = zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_surprisals(lm, *chunk) for chunk in chunks])
    # Logits are recomputed in the backward pass rather than kept.
    return torch.cat([checkpoint(_chunk_surprisals, lm, *chunk, use_reentrant=False) for chunk in chunks])


def _chunk_surprisals(lm: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(_logits(lm, hidden), targets, reduction="none")


def _logits(lm: Any, hidden: Tensor) -> Tensor:
    """``(n, V)`` float32."""
    logits: Tensor = lm.get_output_embeddings()(hidden).float()
    cap = getattr(lm.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap

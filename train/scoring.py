"""Surprisals of the wanted tokens of packed rows, without logits for all the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from terselm.errors import ModelError
from terselm.models.reading import logit_transform, probe_ids
from terselm.train import attention, packing, varlen
from terselm.train.attention import PACKED_ATTENTION
from terselm.train.log_probabilities import surprisals
from terselm.train.packing import IGNORED
from terselm.train.varlen import VARLEN_ATTENTION, UnsupportedAttentionError


def score_instead_of_logits(lm: Any, *, autocast: torch.dtype | None) -> None:
    """Make a transformers causal LM return surprisals, in nats, instead of logits.

    Afterwards ``lm(input_ids, position_ids, labels)``, all ``(B, T)``, gives ``(n,)`` float32, in row-major order of
    the labels that are not `IGNORED`. With ``at`` and ``wanted`` in place of labels it gives, in the shape of
    ``wanted``, the surprisal of other tokens, and a GPU is not asked where the labels are. It is done inside
    ``forward`` because wrappers such as DDP act on that alone.

    Args:
        lm: changed in place.
        autocast: number format of the matrix products; None leaves them as the weights are.

    Raises:
        ModelError: packed rows do not give what the model itself gives for each example alone; or see
            `logit_transform`.
    """

    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        at: Tensor | None = None,
        wanted: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """``at`` ``(n,)``: places in the flattened rows; ``wanted`` ``(n,)`` or ``(n, K)``: tokens after them."""
        if at is None or wanted is None:
            assert labels is not None
            at = (labels != IGNORED).flatten().nonzero().flatten()
            wanted = labels.flatten()[at]
        place = input_ids.device.type
        with torch.autocast(place, dtype=autocast) if autocast is not None else nullcontext():
            hidden = _last_states(lm, input_ids, position_ids, cu_seqlens)
            return surprisals(lm, hidden.flatten(0, 1)[at], wanted, transform)

    transform = logit_transform(lm)
    _choose_attention(lm, forward, autocast)
    lm.forward = forward


def _last_states(lm: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``(B, T, H)``, or the same tokens in one row."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    extra: dict[str, Any] = {}
    if lm.config._attn_implementation == VARLEN_ATTENTION:
        spans = packing.cu_seqlens(position_ids.cpu()).to(lm.device) if cu_seqlens is None else cu_seqlens
        extra = {"cu_seqlens": spans, "longest": input_ids.shape[1]}
        inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
    # A cache would switch off the mask between packed examples.
    states: Tensor = lm.base_model(**inputs, **extra, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def _choose_attention(lm: Any, forward: Callable[..., Tensor], autocast: torch.dtype | None) -> None:
    """The fastest attention that keeps packed examples apart."""
    ids = probe_ids(lm)
    length = len(ids)
    with torch.autocast(lm.device.type, dtype=autocast) if autocast is not None else nullcontext():
        logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    expected = functional.cross_entropy(logits, ids[1:], reduction="none").repeat(2)
    labels = torch.cat([ids[1:], ids.new_tensor([IGNORED])])
    twice = {"input_ids": ids, "position_ids": torch.arange(length, device=lm.device), "labels": labels}
    packed = {name: tensor.repeat(2)[None] for name, tensor in twice.items()}
    exact = autocast is None and lm.dtype.itemsize >= 4
    for implementation in _candidates(lm):
        lm.set_attn_implementation(implementation)
        try:
            found = forward(**packed)
        except UnsupportedAttentionError:
            continue
        if exact and torch.allclose(found, expected, atol=0.01, rtol=0.01):
            return
        # Rounding in bfloat16 is 0.2 nats on average at most, examples that see each other ten.
        if not exact and (found - expected).abs().mean() <= 0.1 + 0.02 * expected.mean():
            return
    raise ModelError(
        f"{type(lm).__name__} gives other probabilities in packed rows than for each text alone, so alignment would "
        "train something else; choose another small LM"
    )


def _candidates(lm: Any) -> list[str]:
    """Attention implementations, the fastest first; the last is the model's own."""
    its_own = lm.config._attn_implementation
    attention.register()
    varlen.register()
    match lm.device.type:
        case "cpu":
            return [PACKED_ATTENTION, its_own]
        case "cuda" if varlen.is_available():
            return [VARLEN_ATTENTION, its_own]
    return [its_own]

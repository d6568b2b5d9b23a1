"""A small LM that gives the surprisals of chosen tokens in packed rows instead of (n, V) logits for all positions.

Logits exist for some positions at a time, and are made again in the backward pass where they are needed there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from terselm.errors import ModelError
from terselm.models import surprisal_kernel
from terselm.models.reading import LogitTransform, logit_transform, probe_ids, soft_cap
from terselm.train.attention import VARLEN_ATTENTION, UnsupportedAttentionError, attention_candidates
from terselm.train.packing import cu_seqlens as example_starts

UTILITY_HEAD = "utility_head"  # the module of a model that scores units
_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}


class Readings(NamedTuple):
    """What a model with a utility head gives.

    Attributes:
        surprisals: as without the head.
        scores: ``(U,)`` float32, of the units that end at ``unit_ends``.
    """

    surprisals: Tensor
    scores: Tensor


def give_surprisals(lm: Any, *, autocast: torch.dtype | None) -> None:
    """Make a transformers causal LM return surprisals, in nats, instead of logits.

    Afterwards it is called with what `packing.collate` makes, `packing.MODEL_INPUTS`, and gives the surprisals of the
    tokens that are asked for, float32, in the shape of ``wanted``; as `Readings`, with the scores of units, once it has
    a head (`model.add_head`). It is done inside ``forward`` because wrappers such as DDP act on that alone.

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
        at: Tensor,
        wanted: Tensor,
        cu_seqlens: Tensor,
        unit_ends: Tensor | None = None,
        **_: Any,
    ) -> Tensor | Readings:
        """``at`` ``(n,)``: places in the flattened rows; ``wanted`` ``(n,)`` or ``(n, K)``: tokens after them;
        ``unit_ends`` ``(U,)``: places of units' last tokens."""
        with _products_in(autocast, input_ids.device):
            hidden = _last_states(lm, input_ids, position_ids, cu_seqlens).flatten(0, 1)
            nats = surprisals(lm, hidden[at], wanted, transform)
        head = getattr(lm, UTILITY_HEAD, None)
        if head is None or unit_ends is None:
            return nats
        return Readings(nats, head(hidden[unit_ends]))

    transform = logit_transform(lm)
    _choose_attention(lm, forward, autocast)
    lm.forward = forward


def surprisals_of(output: Tensor | Readings) -> Tensor:
    """What a model gives, without the scores of units."""
    return output.surprisals if isinstance(output, Readings) else output


def surprisals(lm: Any, hidden: Tensor, wanted: Tensor, transform: LogitTransform) -> Tensor:
    """−log p of tokens after hidden states.

    Args:
        lm: a transformers causal LM; of it the output head.
        hidden: ``(n, H)``.
        wanted: ``(n,)`` or ``(n, K)`` int64 token ids.
        transform: what the model does to its head's output.

    Returns:
        float32 nats in the shape of ``wanted``.
    """
    head: Any = lm.get_output_embeddings()
    if not _is_plain(head):
        return _through_the_module(head, hidden, wanted, transform)
    if transform.scale != 1:
        hidden = hidden * transform.scale
    if wanted.dim() == 1 and not head.weight.requires_grad:
        frozen: Tensor = _FrozenHead.apply(hidden, head.weight, wanted, transform.cap)  # type: ignore[no-untyped-call]
        return frozen
    columns = wanted if wanted.dim() == 2 else wanted[:, None]
    values: Tensor = _AnyHead.apply(hidden, head.weight, columns, transform.cap)  # type: ignore[no-untyped-call]
    return values.view_as(wanted)


def _products_in(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


def _last_states(lm: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``(B, T, H)``, or the same tokens in one row."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    extra: dict[str, Any] = {}
    if lm.config._attn_implementation == VARLEN_ATTENTION:
        extra = {"cu_seqlens": cu_seqlens, "longest": input_ids.shape[1]}
        inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
    # A cache would switch off the mask between packed examples.
    states: Tensor = lm.base_model(**inputs, **extra, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def _choose_attention(lm: Any, forward: Callable[..., Tensor | Readings], autocast: torch.dtype | None) -> None:
    """The fastest attention that keeps packed examples apart: of one text twice in a row, each like the text alone."""
    ids = probe_ids(lm)
    with _products_in(autocast, lm.device):
        logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    expected = functional.cross_entropy(logits, ids[1:], reduction="none").repeat(2)
    places = torch.arange(len(ids), device=lm.device)
    positions = places.repeat(2)[None]
    packed = {
        "input_ids": ids.repeat(2)[None],
        "position_ids": positions,
        "at": torch.cat([places[:-1], places[:-1] + len(ids)]),
        "wanted": ids[1:].repeat(2),
        "cu_seqlens": example_starts(positions.cpu()).to(lm.device),
    }
    exact = autocast is None and lm.dtype.itemsize >= 4
    for implementation in attention_candidates(lm):
        lm.set_attn_implementation(implementation)
        try:
            nats = surprisals_of(forward(**packed))
        except UnsupportedAttentionError:
            continue
        if exact and torch.allclose(nats, expected, atol=0.01, rtol=0.01):
            return
        # Rounding in bfloat16 is 0.2 nats on average at most, examples that see each other ten.
        if not exact and (nats - expected).abs().mean() <= 0.1 + 0.02 * expected.mean():
            return
    raise ModelError(
        f"{type(lm).__name__} gives other probabilities in packed rows than for each text alone, so alignment would "
        "train something else; choose another small LM"
    )


def _is_plain(head: Any) -> bool:
    """One matrix that lies whole in this process; ZeRO-3, FSDP and adapters need their module's own forward."""
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        return False
    return not hasattr(head.weight, "ds_id") and not hasattr(head.weight, "device_mesh")


def _chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(1, _LOGITS_AT_ONCE.get(device.type, _LOGITS_AT_ONCE["cpu"]) // vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    place = weight.device.type
    return torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else weight.dtype


class _FrozenHead(Function):
    """The slope of each surprisal by its hidden state is made along the way, so the backward pass is one product.

    d(−log p_t)/dh = Σ_v (p_v − [v = t]) W_v, which needs no gradient from above but as a factor.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor, cap: float | None) -> Tensor:
        matrix = weight.to(_matmul_dtype(weight))
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), len(weight), hidden.device):
                states = hidden[rows].to(matrix.dtype)
                if slopes is None:
                    nats[rows] = surprisal_kernel.nll(soft_cap(states @ matrix.T, cap), wanted[rows])
                else:
                    nats[rows], by_logit = surprisal_kernel.nll_and_slopes(states @ matrix.T, wanted[rows], cap)
                    slopes[rows] = by_logit @ matrix
        ctx.save_for_backward(slopes)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None, None


class _AnyHead(Function):
    """Several tokens a position, or a head that is trained: logits are made twice.

    With s_k = −log p_k and upstream g_k: dL/dlogit_v = p_v Σ_k g_k − Σ_k g_k [v = k].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor, cap: float | None) -> Tensor:
        ctx.dtype, ctx.cap = _matmul_dtype(weight), cap
        matrix = weight.to(ctx.dtype)
        nats = torch.empty(wanted.shape, dtype=torch.float32, device=hidden.device)
        totals = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), len(weight), hidden.device):
                logits = soft_cap(hidden[rows].to(ctx.dtype) @ matrix.T, cap).float()
                totals[rows] = logits.logsumexp(-1)
                nats[rows] = totals[rows, None] - logits.gather(1, wanted[rows])
        ctx.save_for_backward(hidden, weight, wanted, totals)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, wanted, totals = ctx.saved_tensors
        matrix = weight.to(ctx.dtype)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), len(weight), hidden.device):
            states = hidden[rows].to(ctx.dtype)
            logits = soft_cap(states @ matrix.T, ctx.cap).float()
            slopes = (logits - totals[rows, None]).exp_().mul_(upstream[rows].sum(1, keepdim=True))
            slopes.scatter_add_(1, wanted[rows], -upstream[rows])
            if ctx.cap is not None:
                slopes *= 1 - (logits / ctx.cap) ** 2
            slopes = slopes.to(ctx.dtype)
            by_hidden[rows] = slopes @ matrix
            if by_weight is not None:
                by_weight += slopes.T @ states
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None, None


def _through_the_module(head: Any, hidden: Tensor, wanted: Tensor, transform: LogitTransform) -> Tensor:
    def nats_of(states: Tensor, tokens: Tensor) -> Tensor:
        logits = transform(head(states)).float()
        if tokens.dim() == 1:
            return functional.cross_entropy(logits, tokens, reduction="none")
        return logits.logsumexp(-1, keepdim=True) - logits.gather(1, tokens)

    parts = []
    for rows in _chunks(len(hidden), head.out_features, hidden.device) or [slice(0, 0)]:
        if torch.is_grad_enabled():
            parts.append(checkpoint(nats_of, hidden[rows], wanted[rows], use_reentrant=False))
        else:
            parts.append(nats_of(hidden[rows], wanted[rows]))
    return torch.cat(parts)

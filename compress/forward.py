"""Running a causal LM of transformers: its body with our masks, and its head without (B, T, V) logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from terselm.compress.kernels import fused_nll
from terselm.models import CausalLM

_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
_FEWEST_SHAPES = 16  # tokens
_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}  # of the (rows, vocabulary) matrix


class Forward:
    """The forward pass of one model, in the two forms that the engine needs.

    Args:
        lm: any decoder-only model of transformers whose head is a linear layer (with a soft cap, a scale, or neither).
    """

    def __init__(self, lm: CausalLM) -> None:
        self._body = lm.model.base_model
        self._head: Any = lm.model.get_output_embeddings()
        self._config = lm.model.config.get_text_config()
        self._transforms = any(getattr(self._config, name, None) for name in _LOGIT_TRANSFORMS)
        self.parameters = int(lm.model.num_parameters())
        self.device: torch.device = lm.model.device
        self._dtype: torch.dtype = lm.model.dtype  # of the activations; int8 weights have none
        self._kernel = fused_nll() if self.device.type == "cuda" else None
        self._widens = (
            self.device.type == "cuda"
            and type(self._head) is torch.nn.Linear
            and getattr(self._head, "bias", None) is None
            and self._head.weight.dtype in (torch.bfloat16, torch.float16)
        )

    def texts(self, ids: Tensor) -> Tensor:
        """Last hidden states ``(B, T, H)`` of texts ``(B, T)`` that are padded at their ends.

        Causal attention lets no real token see the padding, so no mask is needed.
        """
        with _attention():
            states: Tensor = self._body(input_ids=ids, use_cache=False).last_hidden_state
        return states

    @property
    def bytes_per_token(self) -> int:
        """Of the keys and values of one token, over all layers."""
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self._dtype.itemsize)

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
        with _attention():
            output = self._body(
                input_ids=ids,
                position_ids=positions.clamp(min=0),
                attention_mask=self._masks(mask, distance),
                past_key_values=cache,
                use_cache=True,
            )
        states: Tensor = output.last_hidden_state
        return states

    def nll(self, states: Tensor, targets: Tensor) -> Tensor:
        """−log p of ``targets`` ``(N,)`` after ``states`` ``(N, H)``: ``(N,)`` float32, in chunks of rows."""
        most = _LOGITS_AT_ONCE.get(self.device.type, _LOGITS_AT_ONCE["cpu"])
        rows = max(1, most // self._config.vocab_size)
        count = len(targets)
        if self.device.type == "cpu" and (excess := -count % grain(count)):
            states, targets = pad(states, (0, 0, 0, excess)), pad(targets, (0, excess))
        chunks = []
        for some, wanted in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
            logits = self._logits(some)
            if self._kernel is not None:
                chunks.append(self._kernel(logits, wanted))
            else:
                logits = logits.float()
                chunks.append(logits.logsumexp(-1) - logits.gather(-1, wanted[:, None])[:, 0])
        return torch.cat(chunks)[:count]

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

    def _logits(self, states: Tensor) -> Tensor:
        """``(N, V)``, float32 where the GPU can multiply into it: bfloat16 knows no step finer than 1/8 at 16."""
        logits: Tensor
        if self._widens:
            logits = torch.mm(states, self._head.weight.t(), out_dtype=torch.float32)
        else:
            logits = self._head(states)
        if self._transforms:
            logits = logits.float()
        if scale := getattr(self._config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(self._config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(self._config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


def grain(tokens: int) -> int:
    """What the length of a row is rounded up to on a CPU: a sixteenth of it, at least 16 tokens.

    oneDNN keeps a plan, a few MiB, for each number of rows that it has multiplied, a thousand of them.
    """
    return max(_FEWEST_SHAPES, 1 << max(0, tokens.bit_length() - 5))


@contextmanager
def _attention() -> Iterator[None]:
    """All of torch's attention kernels but cuDNN's, which plans anew for every shape: half a millisecond a layer."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield

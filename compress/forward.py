"""Running a causal LM of transformers: its body with our masks, and its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from terselm.errors import ModelError
from terselm.models import CausalLM
from terselm.models.reading import OutputHead, fast_attention, last_states

_LAYERS = {"full_attention", "sliding_attention"}


def require_attention(lm: CausalLM) -> None:
    """Raise `ModelError` for a model of which a prefix cannot lose tokens again: one with recurrent layers."""
    config = lm.model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others or getattr(lm.model, "_is_stateful", False):
        raise ModelError(
            f"{lm.name!r} ({type(lm.model).__name__}) has layers other than full and sliding attention"
            f"{' (' + ', '.join(sorted(others)) + ')' if others else ''}, of which a compressed prefix cannot be made; "
            "choose a small LM with attention alone, such as smollm2-135m"
        )


class Forward:
    """The forward pass of one model, in the two forms that the engine needs.

    Args:
        lm: any decoder-only model of transformers whose head is a linear layer (with a soft cap, a scale, or neither).

    Raises:
        ModelError: it is another.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._model = lm.model
        self._head = OutputHead(lm.model)
        self._config = lm.model.config.get_text_config()
        self.parameters = int(lm.model.num_parameters())
        self.device: torch.device = lm.model.device
        self._dtype: torch.dtype = lm.model.dtype  # of the activations; int8 weights have none

    def texts(self, ids: Tensor) -> Tensor:
        """Last hidden states ``(B, T, H)`` of texts ``(B, T)`` that are padded at their ends."""
        return last_states(self._model, ids)

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
        with fast_attention():
            output = self._model.base_model(
                input_ids=ids,
                position_ids=positions.clamp(min=0),
                attention_mask=self._masks(mask, distance),
                past_key_values=cache,
                use_cache=True,
            )
        states: Tensor = output.last_hidden_state
        return states

    def nll(self, states: Tensor, targets: Tensor) -> Tensor:
        """−log p of ``targets`` ``(N,)`` after ``states`` ``(N, H)``: ``(N,)`` float32, nats."""
        return self._head.nll(states, targets)

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

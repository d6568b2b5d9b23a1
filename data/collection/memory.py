"""How many answers are generated together: as many as fit, and fewer once they turn out not to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from terselm.data.generate import Answer, Limits, Query, generate
from terselm.errors import TargetLLMError
from terselm.models import CausalLM

_log = logging.getLogger(__name__)
_MOST = 1024
_ON_A_CPU = 32
_SHARE = 0.7  # of the free memory
_CACHE_COPIES = 2  # a cache that grows is copied
_LOGIT_COPIES = 6  # as they come, in float32, sorted, and their probabilities


class BatchSize:
    """Rows of a batch.

    Args:
        lm: the model that generates.
        asked: the user's number; None for what the memory allows.
    """

    def __init__(self, lm: CausalLM, asked: int | None) -> None:
        self._lm = lm
        self._asked = asked
        self._most = asked or _MOST

    def rows(self, tokens: int) -> int:
        """How many rows of so many tokens, prompt and answer, fit."""
        device = self._lm.model.device
        if self._asked is not None:
            return self._most
        if device.type != "cuda":
            return min(self._most, _ON_A_CPU)
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, min(self._most, int(_SHARE * free) // self._row_bytes(tokens)))

    def generate(self, queries: Sequence[Query], limits: Limits) -> list[Answer]:
        """As `generate`, in halves where the memory is too small for all.

        Raises:
            TargetLLMError: it is too small for one.
        """
        import torch

        try:
            return generate(self._lm, queries, limits)
        except torch.OutOfMemoryError:
            if len(queries) == 1:
                raise TargetLLMError(
                    f"the memory of {self._lm.model.device} is too small for one answer; lower max_new_tokens, or "
                    "shorten the prompts"
                ) from None
        torch.cuda.empty_cache()
        half = len(queries) // 2
        self._most = min(self._most, half)
        _log.info("out of memory with %s answers together; going on with %s", len(queries), self._most)
        return [*self.generate(queries[:half], limits), *self.generate(queries[half:], limits)]

    def _row_bytes(self, tokens: int) -> int:
        config = self._lm.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        element = self._lm.model.dtype.itemsize
        cache = 2 * config.num_hidden_layers * heads * width * element * tokens  # keys and values
        return int(_CACHE_COPIES * cache + _LOGIT_COPIES * 4 * config.vocab_size)

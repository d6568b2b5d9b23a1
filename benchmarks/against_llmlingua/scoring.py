"""The ceiling: the surprisal of every token of whole prompts, in plain batches, by the same model.

A compressor that reads each token of a prompt at least once cannot be faster than this.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

_ROWS = {"cpu": 1, "cuda": 16}  # prompts in a batch
_STATES = {"cpu": 256, "cuda": 8192}  # whose logits exist at once


def score(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Time the scoring of ``request["rows"]``, token ids, each cut to ``request["length"]``: nothing is padding."""
    device = model.device.type
    rows = torch.tensor([row[: request["length"]] for row in request["rows"]], device=model.device)
    body, log_probabilities = _parts(model, compiled=device == "cuda")
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for some in torch.split(rows, _ROWS[device]):
        states = body(input_ids=some[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        wanted = some[:, 1:].flatten()
        chunks = zip(torch.split(states, _STATES[device]), torch.split(wanted, _STATES[device]), strict=True)
        torch.cat([log_probabilities(*chunk) for chunk in chunks]).cpu()
    return {"seconds": time.perf_counter() - begin, "tokens": rows.numel()}


@cache
def _parts(model: Any, *, compiled: bool) -> tuple[Any, Any]:
    """The model's body, and a function from states and the tokens after them to log p."""
    head = model.get_output_embeddings()

    def log_probabilities(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(states).float()
        return logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)

    if not compiled:
        return model.base_model, log_probabilities
    return torch.compile(model.base_model, dynamic=False), torch.compile(log_probabilities, dynamic=False)

"""Answers of a local model to many queries at once, in which every row has its own temperature, seed and stop strings.

Two ways lead to the same answers, up to rounding: `slots` for a GPU, and the plain loop below for every model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from terselm.data.replies import Answer, Draws, Limits, Query, Reply, choose, encode, start_replies
from terselm.models import CausalLM

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answer", "Engine", "Limits", "Query", "encode", "generate", "generate_each"]

_log = logging.getLogger(__name__)
_COMPACT_AT = 0.75
"""Finished rows leave the batch once at most this share of it is alive: dropping a row copies the whole cache."""


class Engine(StrEnum):
    """What decodes: ``auto`` takes the slots on a GPU where the model suits them, else the loop."""

    AUTO = "auto"
    LOOP = "loop"
    SLOTS = "slots"


def generate(
    lm: CausalLM, queries: Sequence[Query], limits: Limits, *, engine: Engine | str = Engine.AUTO
) -> list[Answer]:
    """Answer all queries; the loop takes them as one batch.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window.
        torch.OutOfMemoryError: too many queries for the loop, or no memory for a single slot.
    """
    answers = dict(generate_each(lm, queries, limits, engine=engine))
    return [answers[index] for index in range(len(queries))]


def generate_each(
    lm: CausalLM, queries: Sequence[Query], limits: Limits, *, engine: Engine | str = Engine.AUTO
) -> Iterator[tuple[int, Answer]]:
    """As `generate`, but each answer with the index of its query, as soon as it is known."""
    engine = Engine(engine)
    if engine is Engine.AUTO:
        engine = Engine.SLOTS if lm.model.device.type == "cuda" else Engine.LOOP
    if engine is Engine.SLOTS:
        from terselm.data.slots import UnsuitableModelError, decode

        try:
            yield from decode(lm, queries, limits)
            return
        except UnsuitableModelError as error:  # before the first answer
            _log.warning("%s is decoded step by step, which is slower: %s", lm.name, error)
    yield from _loop(lm, queries, limits)


def _loop(lm: CausalLM, queries: Sequence[Query], limits: Limits) -> Iterator[tuple[int, Answer]]:
    """One batch, padded on the left, in which the host looks at every token."""
    import torch

    if not queries:
        return
    replies = start_replies(lm, queries, limits)
    with torch.inference_mode():
        _decode(lm, list(replies), limits)
    for index, reply in enumerate(replies):
        yield index, reply.answer()


def _decode(lm: CausalLM, alive: list[Reply], limits: Limits) -> None:
    import torch

    from terselm.models.reading import cache_argument, cache_of

    cache = None
    ids, mask = _left_pad([reply.prompt for reply in alive], lm)  # (B, P) each
    draws = Draws.of([reply.query for reply in alive], ids.device)
    sampled = any(reply.query.temperature > 0 for reply in alive)
    while True:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(lm.model, cache),
        )
        cache = cache_of(out)
        chosen = choose(out.logits[:, -1].float(), draws, limits, sampled=sampled)  # (B,)
        draws.steps.add_(1)
        for reply, token in zip(alive, chosen.tolist(), strict=True):
            reply.take(token)
        keep = [index for index, reply in enumerate(alive) if reply.finish_reason is None]
        if not keep:
            return
        if len(keep) <= _COMPACT_AT * len(alive):
            kept = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(kept)
            alive, draws = [alive[index] for index in keep], draws.of_rows(kept)
            mask, chosen = mask[kept], chosen[kept]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _left_pad(prompts: Sequence[Sequence[int]], lm: CausalLM) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``(B, P)`` int64 each; the padding is masked, so its id does not matter."""
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), lm.start_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(lm.model.device), mask.to(lm.model.device)

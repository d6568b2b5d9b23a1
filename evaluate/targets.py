"""What reads the prompts: a local model, or anything else that does the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from terselm.compress.counter import Count, TokenizerCounter
from terselm.errors import ContextLengthError
from terselm.models import CausalLM

if TYPE_CHECKING:
    from terselm.models.reading import OutputHead

_TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 16}  # of a scoring batch, padding included
_ROWS_AT_ONCE = {"cpu": 8, "cuda": 128}  # that are decoded together


@dataclass(frozen=True, kw_only=True)
class Score:
    """−log p of a gold answer after a prompt, in nats, summed over its ``tokens``."""

    nats: float
    tokens: int


class Target(Protocol):
    """A model that reads prompts.

    Attributes:
        count: tokens of a text, as this target counts them.
        can_score: whether `score` works.
    """

    count: Count
    can_score: bool

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers."""
        ...

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt."""
        ...


class LocalTarget:
    """A causal LM in this process.

    The gold answer is tokenised by itself, so that its tokens are the same after every prompt.
    """

    can_score = True

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self.count: Count = TokenizerCounter(lm.tokenizer)
        self._device = lm.model.device.type

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers.

        Raises:
            ContextLengthError: a prompt and its answer do not fit into the model's window.
        """
        from terselm.data.generate import Limits, Query, generate

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        rows = _ROWS_AT_ONCE.get(self._device, 8)
        for begin in range(0, len(order), rows):
            some = order[begin : begin + rows]
            queries = [Query(prompt=prompts[i], temperature=0.0, seed=0, stop=stop) for i in some]
            for i, answer in zip(some, generate(self.lm, queries, Limits(max_new_tokens=max_new_tokens)), strict=True):
                answers[i] = answer.text
        return answers

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt.

        Raises:
            ContextLengthError: the two do not fit into the model's window.
        """
        encode = self.lm.tokenizer
        rows = [
            ([self.lm.start_id, *encode(prompt, add_special_tokens=False).input_ids],
             list(encode(gold, add_special_tokens=False).input_ids))
            for prompt, gold in zip(prompts, golds, strict=True)
        ]  # fmt: skip
        for before, gold_ids in rows:
            if len(before) + len(gold_ids) > self.lm.window:
                raise ContextLengthError(
                    f"a prompt of {len(before)} tokens and a gold answer of {len(gold_ids)} do not fit into the window "
                    f"of {self.lm.window} tokens of {self.lm.name}; choose shorter prompts"
                )
        nats = [0.0] * len(rows)
        for batch in self._batches([len(before) + len(gold_ids) for before, gold_ids in rows]):
            for i, value in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                nats[i] = value
        return [Score(nats=value, tokens=len(gold_ids)) for value, (_, gold_ids) in zip(nats, rows, strict=True)]

    @cached_property
    def _head(self) -> OutputHead:
        from terselm.models.reading import OutputHead

        return OutputHead(self.lm.model)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        most = _TOKENS_AT_ONCE.get(self._device, 1 << 12)
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > most:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Sums of −log p of the second ids of each row after the first; only their states meet the head."""
        import torch

        from terselm.models.reading import states_before

        with torch.inference_mode():
            chosen = states_before(
                self.lm.model, [before + gold for before, gold in rows], [len(before) for before, _ in rows]
            )
            values = self._head.nll(*chosen).cpu().numpy()
        ends = np.cumsum([len(gold) for _, gold in rows])[:-1]
        return [float(part.sum(dtype=np.float64)) for part in np.split(values, ends)]

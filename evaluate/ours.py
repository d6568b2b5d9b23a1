"""Our own compressor as a method, and what its small LM tells the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terselm.compress.compressor import PromptCompressor
from terselm.compress.counter import Count, plain_backend
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.compress.prompt import Prompt
from terselm.errors import BudgetError
from terselm.evaluate.methods import Compressed
from terselm.models import CausalLM


@dataclass(frozen=True, kw_only=True)
class Ours:
    """`PromptCompressor` under some settings."""

    compressor: PromptCompressor
    count: Count

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt to its budget; to the smallest possible where that cannot be met."""
        asked = list(budgets)
        while True:
            try:
                results = self.compressor.compress_batch(prompts, budget=asked, counter=self.count)
                return [Compressed(text=result.text, result=result) for result in results]
            except BudgetError:
                asked = [self._possible(prompt, budget) for prompt, budget in zip(prompts, asked, strict=True)]

    def _possible(self, prompt: Prompt, budget: int) -> int:
        try:
            self.compressor.compress_batch([prompt], budget=budget, counter=self.count)
        except BudgetError as error:
            if error.smallest is None or error.smallest <= budget:
                raise
            return error.smallest
        return budget


class Surprisals:
    """Mean surprisal of spans of texts, under the small LM; each distinct text is read once."""

    def __init__(self, lm: CausalLM) -> None:
        self._engine = SurprisalEngine(lm)
        self._backend = plain_backend(lm.tokenizer)
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, text: str, spans: Sequence[tuple[int, int]]) -> list[float]:
        """0 for a span in which no token begins."""
        starts, values = self._read(text)
        means = []
        for start, end in spans:
            inside = values[np.searchsorted(starts, start) : np.searchsorted(starts, end)]
            means.append(float(inside.mean()) if len(inside) else 0.0)
        return means

    def _read(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Where each token begins, and its surprisal."""
        if text not in self._known:
            encoding = self._backend.encode(text, add_special_tokens=False)
            values = (
                self._engine.score_texts([np.array(encoding.ids, dtype=np.int64)])[0]
                if encoding.ids
                else np.zeros(0, dtype=np.float32)
            )
            self._known[text] = np.array([start for start, _ in encoding.offsets], dtype=np.int64), values
        return self._known[text]

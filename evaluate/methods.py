"""What a way of shortening prompts is; our own compressor as one, and the words that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from terselm.compress.counter import Count
from terselm.compress.prompt import Prompt
from terselm.errors import BudgetError
from terselm.statistics import word_spans

if TYPE_CHECKING:
    from terselm.compress.compressor import PromptCompressor
    from terselm.compress.result import CompressionResult

Word = tuple[str, int, int]  # part, index of the demonstration, number of the word


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A shortened prompt; ``result`` says what became of each token, where the method is ours."""

    text: str
    result: CompressionResult | None = field(default=None, repr=False)


class EvaluationMethod(Protocol):
    """A way of shortening prompts."""

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt to its budget, in the target's tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ours:
    """`PromptCompressor` under some settings."""

    compressor: PromptCompressor
    count: Count

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt to its budget; to the smallest possible where that cannot be met."""
        possible = list(budgets)
        while True:
            try:
                results = self.compressor.compress_batch(prompts, budget=possible, counter=self.count)
                return [Compressed(text=result.text, result=result) for result in results]
            except BudgetError:
                possible = [self._possible(prompt, budget) for prompt, budget in zip(prompts, possible, strict=True)]

    def _possible(self, prompt: Prompt, budget: int) -> int:
        try:
            self.compressor.compress_batch([prompt], budget=budget, counter=self.count)
        except BudgetError as error:
            if error.smallest is None or error.smallest <= budget:
                raise
            return error.smallest
        return budget


def kept_words(compressed: Compressed) -> set[Word]:
    """The words of which more than half of the characters are kept."""
    assert compressed.result is not None
    texts: dict[tuple[str, int], list[str]] = {}
    kept: dict[tuple[str, int], list[bool]] = {}
    for token in compressed.result.tokens:
        place = token.part.value, token.index
        texts.setdefault(place, []).append(token.text)
        kept.setdefault(place, []).extend([token.kept] * len(token.text))
    return {
        (*place, number)
        for place, parts in texts.items()
        for number, (start, end) in enumerate(word_spans("".join(parts)).tolist())
        if 2 * sum(kept[place][start:end]) > end - start
    }


def overlap(a: set[Word], b: set[Word]) -> float:
    """Dice's coefficient, 2 |A ∩ B| / (|A| + |B|): the share of words in common, whichever keeps a few more."""
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0

"""Simple ways of shortening a prompt. The instruction and the question stay whole, as most of them are used.

All of them count in the target's tokens and keep to the budget. Where instruction and question alone are over it,
these are all that is left: there is nothing that they could drop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from terselm.compress.counter import Count
from terselm.compress.prompt import Prompt
from terselm.evaluate.items import full_text
from terselm.evaluate.methods import Compressed

_WORD = re.compile(r"\s*\S+")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|\n|[。！？]")
_FUNCTION_WORD = re.compile(
    r"\s*(?:an?|the|of|in|on|at|to|for|with|by|from|and|or|but|that|which|if|is|are|was|were|has|have|had|will|would|"
    r"can|could|s?he|it|they|we|you|i|his|her|their|its)\b",
    re.IGNORECASE,
)

Cut = Callable[[str], list[tuple[int, int]]]
"""Spans of a text, in its order."""

SurprisalOf = Callable[[str, Sequence[tuple[int, int]]], list[float]]
"""Mean surprisal of each span of a text, read by itself."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What baselines work with.

    Attributes:
        count: the target's tokens of a text.
        surprisals: by the small LM; only called by methods that need it.
        seed: of random choices.
    """

    count: Count
    surprisals: SurprisalOf
    seed: int

    def chance(self, prompt: Prompt) -> random.Random:
        """The same for the same prompt."""
        digest = blake2b(full_text(prompt, "\x1f").encode(), digest_size=8).hexdigest()
        return random.Random(f"{self.seed}/{digest}")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A method that shortens one prompt at a time."""

    shorten: Callable[[Prompt, int, Tools], Prompt]
    tools: Tools

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt to its budget."""
        return [
            Compressed(text=full_text(self.shorten(prompt, budget, self.tools)))
            for prompt, budget in zip(prompts, budgets, strict=True)
        ]


def truncate(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the end of the demonstrations, next to the question, and drop what stands before."""
    return _longest(prompt, budget, tools, lambda spans, n: spans[len(spans) - n :])


def truncate_end(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the beginning of the demonstrations."""
    return _longest(prompt, budget, tools, lambda spans, n: spans[:n])


def random_words(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep words of the demonstrations at random."""
    spans = _spans(prompt, words)
    order = list(range(len(spans)))
    tools.chance(prompt).shuffle(order)
    return _longest(prompt, budget, tools, lambda spans, n: [spans[i] for i in sorted(order[:n])])


def random_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations at random."""
    order = list(range(len(prompt.demonstrations)))
    tools.chance(prompt).shuffle(order)
    return _whole(prompt, budget, tools, order)


def last_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, the last first."""
    return _whole(prompt, budget, tools, range(len(prompt.demonstrations) - 1, -1, -1))


def surprising_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, those of the highest perplexity first."""
    means = [tools.surprisals(text, [(0, len(text))])[0] for text in prompt.demonstrations]
    return _whole(prompt, budget, tools, sorted(range(len(means)), key=lambda i: -means[i]))


def similar_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, those that share most words with the question first (Jaccard's index)."""
    asked = _vocabulary(prompt.question)

    def similarity(text: str) -> float:
        words = _vocabulary(text)
        return len(words & asked) / max(1, len(words | asked))

    order = sorted(range(len(prompt.demonstrations)), key=lambda i: -similarity(prompt.demonstrations[i]))
    return _whole(prompt, budget, tools, order)


def random_sentences(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep sentences of the demonstrations at random.

    Source: the sentence selection of arXiv:2310.05736, §5.1.
    """
    order = list(range(len(_spans(prompt, sentences))))
    tools.chance(prompt).shuffle(order)
    return _ranked(prompt, budget, tools, sentences, order)


def selective_context(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the phrases of the demonstrations with the highest self-information.

    A phrase is a run of words up to a punctuation mark or a function word (the original takes spaCy's noun phrases).

    Source: arXiv:2310.06201.
    """
    return _by_surprisal(prompt, budget, tools, phrases)


def selective_sentences(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the sentences of the demonstrations with the highest self-information (arXiv:2310.06201)."""
    return _by_surprisal(prompt, budget, tools, sentences)


def words(text: str) -> list[tuple[int, int]]:
    """Spans of words with the white space before them."""
    return [match.span() for match in _WORD.finditer(text)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of sentences and lines, with the line ends after them."""
    spans: list[tuple[int, int]] = []
    ends = sorted({*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)})
    for start, end in pairwise([0, *ends]):
        if spans and not text[start:end].strip():
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def phrases(text: str) -> list[tuple[int, int]]:
    """Spans of runs of words that end at punctuation or before a function word."""
    spans: list[tuple[int, int]] = []
    for start, end in words(text):
        ended = not spans or text[spans[-1][1] - 1] in ",;:.!?)"
        if ended or _FUNCTION_WORD.fullmatch(text[start:end].rstrip(",;:.!?)")):
            spans.append((start, end))
        else:
            spans[-1] = (spans[-1][0], end)
    return spans


BASELINES: dict[str, Callable[[Prompt, int, Tools], Prompt]] = {
    "truncate": truncate,
    "truncate-end": truncate_end,
    "random-words": random_words,
    "demonstrations-random": random_demonstrations,
    "demonstrations-last": last_demonstrations,
    "demonstrations-perplexity": surprising_demonstrations,
    "demonstrations-similar": similar_demonstrations,
    "sentences-random": random_sentences,
    "selective-context": selective_context,
    "selective-sentences": selective_sentences,
}

_Span = tuple[int, int, int]  # demonstration, start, end


def _spans(prompt: Prompt, cut: Cut) -> list[_Span]:
    return [(i, start, end) for i, text in enumerate(prompt.demonstrations) for start, end in cut(text)]


def _with_spans(prompt: Prompt, spans: Sequence[_Span]) -> Prompt:
    """The prompt with these spans of its demonstrations alone."""
    parts: dict[int, str] = {}
    for i, start, end in spans:
        parts[i] = parts.get(i, "") + prompt.demonstrations[i][start:end]
    return replace(prompt, demonstrations=[part.strip() for part in parts.values() if part.strip()], pinned=())


def _longest(prompt: Prompt, budget: int, tools: Tools, take: Callable[[list[_Span], int], list[_Span]]) -> Prompt:
    """As many words as fit, of a choice that grows with their number."""
    spans = _spans(prompt, words)
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high + 1) // 2
        if tools.count(full_text(_with_spans(prompt, take(spans, middle)))) <= budget:
            low = middle
        else:
            high = middle - 1
    return _with_spans(prompt, take(spans, low))


def _whole(prompt: Prompt, budget: int, tools: Tools, order: Sequence[int]) -> Prompt:
    """Whole demonstrations in this order; one that does not fit is passed over."""
    chosen: list[int] = []
    for i in order:
        wider = sorted([*chosen, i])
        if tools.count(full_text(_of(prompt, wider))) <= budget:
            chosen = wider
    return _of(prompt, chosen)


def _of(prompt: Prompt, chosen: Sequence[int]) -> Prompt:
    return replace(prompt, demonstrations=[prompt.demonstrations[i] for i in chosen], pinned=())


def _by_surprisal(prompt: Prompt, budget: int, tools: Tools, cut: Cut) -> Prompt:
    scores: list[float] = []
    for text in prompt.demonstrations:
        scores += tools.surprisals(text, cut(text))
    return _ranked(prompt, budget, tools, cut, np.argsort(-np.array(scores), kind="stable").tolist())


def _ranked(prompt: Prompt, budget: int, tools: Tools, cut: Cut, order: Sequence[int]) -> Prompt:
    """As many spans as fit, the first of ``order`` first."""
    spans = _spans(prompt, cut)
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high + 1) // 2
        chosen = [spans[i] for i in sorted(order[:middle])]
        if tools.count(full_text(_with_spans(prompt, chosen))) <= budget:
            low = middle
        else:
            high = middle - 1
    return _with_spans(prompt, [spans[i] for i in sorted(order[:low])])


def _vocabulary(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))

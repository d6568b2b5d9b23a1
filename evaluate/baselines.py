"""Simple ways of shortening a prompt. The instruction and the question stay whole, as most of them are used.

All of them count in the target's tokens and keep to the budget. Where instruction and question alone are over it,
these are all that is left: there is nothing that they could drop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from terselm.compress.counter import Count, plain_backend
from terselm.compress.prompt import Prompt
from terselm.evaluate.items import full_text
from terselm.evaluate.methods import Compressed
from terselm.models import CausalLM
from terselm.statistics import Floats, Ints

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

    def shuffled(self, prompt: Prompt, n: int) -> list[int]:
        """0 … n − 1 in a random order, which is the same for the same prompt."""
        digest = blake2b(full_text(prompt, "\x1f").encode(), digest_size=8).hexdigest()
        order = list(range(n))
        random.Random(f"{self.seed}/{digest}").shuffle(order)
        return order


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
    return _spans_that_fit(prompt, budget, tools, words, lambda n: range(n - 1, -1, -1))


def truncate_end(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the beginning of the demonstrations."""
    return _spans_that_fit(prompt, budget, tools, words, range)


def random_words(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep words of the demonstrations at random."""
    return _spans_that_fit(prompt, budget, tools, words, lambda n: tools.shuffled(prompt, n))


def random_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations at random."""
    return _demonstrations_that_fit(prompt, budget, tools, tools.shuffled(prompt, len(prompt.demonstrations)))


def last_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, the last first."""
    return _demonstrations_that_fit(prompt, budget, tools, range(len(prompt.demonstrations) - 1, -1, -1))


def surprising_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, those of the highest perplexity first."""
    means = [tools.surprisals(text, [(0, len(text))])[0] for text in prompt.demonstrations]
    return _demonstrations_that_fit(prompt, budget, tools, sorted(range(len(means)), key=lambda i: -means[i]))


def similar_demonstrations(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep whole demonstrations, those that share most words with the question first (Jaccard's index)."""
    asked = _vocabulary(prompt.question)

    def similarity(text: str) -> float:
        words = _vocabulary(text)
        return len(words & asked) / max(1, len(words | asked))

    order = sorted(range(len(prompt.demonstrations)), key=lambda i: -similarity(prompt.demonstrations[i]))
    return _demonstrations_that_fit(prompt, budget, tools, order)


def random_sentences(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep sentences of the demonstrations at random.

    Source: the sentence selection of arXiv:2310.05736, §5.1.
    """
    return _spans_that_fit(prompt, budget, tools, sentences, lambda n: tools.shuffled(prompt, n))


def selective_context(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the phrases of the demonstrations with the highest self-information.

    A phrase is a run of words up to a punctuation mark or a function word (the original takes spaCy's noun phrases).

    Source: arXiv:2310.06201.
    """
    return _most_surprising_spans(prompt, budget, tools, phrases)


def selective_sentences(prompt: Prompt, budget: int, tools: Tools) -> Prompt:
    """Keep the sentences of the demonstrations with the highest self-information (arXiv:2310.06201)."""
    return _most_surprising_spans(prompt, budget, tools, sentences)


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


def _demonstrations_that_fit(prompt: Prompt, budget: int, tools: Tools, order: Sequence[int]) -> Prompt:
    """Whole demonstrations in this order; one that does not fit is passed over."""
    chosen: list[int] = []
    for i in order:
        wider = sorted([*chosen, i])
        if tools.count(full_text(_of(prompt, wider))) <= budget:
            chosen = wider
    return _of(prompt, chosen)


def _of(prompt: Prompt, chosen: Sequence[int]) -> Prompt:
    return replace(prompt, demonstrations=[prompt.demonstrations[i] for i in chosen], pinned=())


def _most_surprising_spans(prompt: Prompt, budget: int, tools: Tools, cut: Cut) -> Prompt:
    scores = np.array([score for text in prompt.demonstrations for score in tools.surprisals(text, cut(text))])
    return _spans_that_fit(prompt, budget, tools, cut, lambda n: np.argsort(-scores, kind="stable").tolist())


def _spans_that_fit(
    prompt: Prompt, budget: int, tools: Tools, cut: Cut, order: Callable[[int], Sequence[int]]
) -> Prompt:
    """As many spans of the demonstrations as fit, in their own order; found by bisection.

    Args:
        order: of n spans, their numbers: the first to keep comes first.
    """
    spans = [(i, start, end) for i, text in enumerate(prompt.demonstrations) for start, end in cut(text)]
    ranked = order(len(spans))

    def first(n: int) -> Prompt:
        return _with_spans(prompt, [spans[i] for i in sorted(ranked[:n])])

    low, high = 0, len(spans)
    while low < high:
        middle = (low + high + 1) // 2
        if tools.count(full_text(first(middle))) <= budget:
            low = middle
        else:
            high = middle - 1
    return first(low)


def _with_spans(prompt: Prompt, spans: Sequence[tuple[int, int, int]]) -> Prompt:
    """The prompt with these spans of its demonstrations alone: number of the demonstration, start, end."""
    parts: dict[int, str] = {}
    for i, start, end in spans:
        parts[i] = parts.get(i, "") + prompt.demonstrations[i][start:end]
    return replace(prompt, demonstrations=[part.strip() for part in parts.values() if part.strip()], pinned=())


def _vocabulary(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class Surprisals:
    """Mean surprisal of spans of texts under a small LM, which is opened when it is first needed.

    Each distinct text is read once.
    """

    def __init__(self, open_lm: Callable[[], CausalLM]) -> None:
        self._open_lm = open_lm
        self._known: dict[str, tuple[Ints, Floats]] = {}

    def __call__(self, text: str, spans: Sequence[tuple[int, int]]) -> list[float]:
        """0 for a span in which no token begins."""
        if text not in self._known:
            self._known[text] = self._read(text)
        starts, nats = self._known[text]
        means = []
        for start, end in spans:
            inside = nats[np.searchsorted(starts, start) : np.searchsorted(starts, end)]
            means.append(float(inside.mean()) if len(inside) else 0.0)
        return means

    def _read(self, text: str) -> tuple[Ints, Floats]:
        """Where each token begins, and its surprisal."""
        from terselm.models.scoring import Window, score_rows

        encoding = self._backend.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        if not encoding.ids:
            return starts, np.zeros(0)
        ((_, scores),) = score_rows(self._lm, [encoding.ids], window=Window.PIECES)
        return starts, scores.nats

    @cached_property
    def _lm(self) -> CausalLM:
        return self._open_lm()

    @cached_property
    def _backend(self) -> Any:
        return plain_backend(self._lm.tokenizer)

"""Simple ways of shortening a prompt. The instruction and the question stay whole, as most of them are used.

All of them count in the target's tokens and keep to the budget. Where instruction and question alone are over it,
these are all that is left: there is nothing that they could drop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from terselm.compress.length import Count, plain_backend
from terselm.compress.prompt import Prompt
from terselm.compress.ranking import Bm25Ranker, EmbeddingRanker, QuestionRanker, Ranker
from terselm.compress.settings import CompressionSettings, RankBy
from terselm.evaluate.items import full_text
from terselm.evaluate.methods import Compressed
from terselm.models import CausalLM
from terselm.statistics import Ints

if TYPE_CHECKING:
    from terselm.models.scoring import RowScorer

_WORD = re.compile(r"\s*\S+")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|\n|[。！？]")
_FUNCTION_WORD = re.compile(
    r"\s*(?:an?|the|of|in|on|at|to|for|with|by|from|and|or|but|that|which|if|is|are|was|were|has|have|had|will|would|"
    r"can|could|s?he|it|they|we|you|i|his|her|their|its)\b",
    re.IGNORECASE,
)

Cut = Callable[[str], list[tuple[int, int]]]
"""Spans of a text, in its order."""

Span = tuple[int, int, int]
"""Number of the demonstration, start, end."""

Order = Callable[[Prompt, Sequence[Span], "Tools"], list[int]]
"""Numbers of the spans: the first to keep comes first."""

SurprisalOf = Callable[[str, Sequence[tuple[int, int]]], list[float]]
"""Mean surprisal of each span of a text, read by itself."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What baselines work with.

    Attributes:
        count: the target's tokens of a text.
        surprisals: by the small LM; only called by methods that need it.
        seed: of random choices.
        ranker: for questions; only called by methods that need it.
    """

    count: Count
    surprisals: SurprisalOf
    seed: int
    ranker: Callable[[RankBy], Ranker]

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
        pairs = zip(prompts, budgets, strict=True)
        return [Compressed(text=full_text(self.shorten(prompt, budget, self.tools))) for prompt, budget in pairs]


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


def first_to_last(prompt: Prompt, spans: Sequence[Span], tools: Tools) -> list[int]:
    """As they stand."""
    return list(range(len(spans)))


def last_to_first(prompt: Prompt, spans: Sequence[Span], tools: Tools) -> list[int]:
    """Those next to the question first."""
    return list(range(len(spans) - 1, -1, -1))


def at_random(prompt: Prompt, spans: Sequence[Span], tools: Tools) -> list[int]:
    """As drawn by the seed."""
    return tools.shuffled(prompt, len(spans))


def by_surprisal(prompt: Prompt, spans: Sequence[Span], tools: Tools) -> list[int]:
    """Those of the highest mean self-information, and so of the highest perplexity, first."""
    means = [tools.surprisals(prompt.demonstrations[i], [(start, end)])[0] for i, start, end in spans]
    return sorted(range(len(spans)), key=lambda number: -means[number])


def by_likeness(prompt: Prompt, spans: Sequence[Span], tools: Tools) -> list[int]:
    """Those that share most words with the question first (Jaccard's index)."""
    asked = _vocabulary(prompt.question)
    there = [_vocabulary(prompt.demonstrations[i][start:end]) for i, start, end in spans]
    return sorted(range(len(spans)), key=lambda n: -len(there[n] & asked) / max(1, len(there[n] | asked)))


def by_rank(prompt: Prompt, spans: Sequence[Span], tools: Tools, ranked: RankBy, *, whole: bool = False) -> list[int]:
    """Those first that have most to do with the question; as they stand where there is none.

    Args:
        whole: the spans are whole demonstrations.
    """
    if not spans or not prompt.question.strip():
        return first_to_last(prompt, spans, tools)
    texts = [prompt.demonstrations[i][start:end] for i, start, end in spans]
    (ranking,) = tools.ranker(ranked).rank([(prompt.question, texts)], whole=whole)
    return [int(number) for number in np.argsort(-ranking.scores, kind="stable")]


def keep_demonstrations(prompt: Prompt, budget: int, tools: Tools, order: Order) -> Prompt:
    """Whole demonstrations in this order; one that does not fit is passed over."""
    chosen: list[int] = []
    for i in order(prompt, [(i, 0, len(text)) for i, text in enumerate(prompt.demonstrations)], tools):
        wider = sorted([*chosen, i])
        if tools.count(full_text(_of(prompt, wider))) <= budget:
            chosen = wider
    return _of(prompt, chosen)


def _of(prompt: Prompt, chosen: Sequence[int]) -> Prompt:
    return replace(prompt, demonstrations=[prompt.demonstrations[i] for i in chosen], pinned=())


def keep_spans(prompt: Prompt, budget: int, tools: Tools, cut: Cut, order: Order) -> Prompt:
    """As many spans of the demonstrations, in this order, as fit, which stay in their own; found by bisection."""
    spans = [(i, start, end) for i, text in enumerate(prompt.demonstrations) for start, end in cut(text)]
    ranked = order(prompt, spans, tools)

    def first(n: int) -> Prompt:
        parts: dict[int, str] = {}
        for i, start, end in (spans[number] for number in sorted(ranked[:n])):
            parts[i] = parts.get(i, "") + prompt.demonstrations[i][start:end]
        return replace(prompt, demonstrations=[part.strip() for part in parts.values() if part.strip()], pinned=())

    low, high = 0, len(spans)
    while low < high:
        middle = (low + high + 1) // 2
        if tools.count(full_text(first(middle))) <= budget:
            low = middle
        else:
            high = middle - 1
    return first(low)


def _vocabulary(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


BASELINES: dict[str, Callable[[Prompt, int, Tools], Prompt]] = {
    "truncate": partial(keep_spans, cut=words, order=last_to_first),  # the end, next to the question, is kept
    "truncate-end": partial(keep_spans, cut=words, order=first_to_last),
    "random-words": partial(keep_spans, cut=words, order=at_random),
    "demonstrations-random": partial(keep_demonstrations, order=at_random),
    "demonstrations-last": partial(keep_demonstrations, order=last_to_first),
    "demonstrations-perplexity": partial(keep_demonstrations, order=by_surprisal),
    "demonstrations-similar": partial(keep_demonstrations, order=by_likeness),
    # Whole documents by LongLLMLingua's first step (arXiv:2310.06839), or by words.
    "documents-ranked": partial(keep_demonstrations, order=partial(by_rank, ranked=RankBy.QUESTION, whole=True)),
    "documents-bm25": partial(keep_demonstrations, order=partial(by_rank, ranked=RankBy.BM25, whole=True)),
    "bm25-sentences": partial(keep_spans, cut=sentences, order=partial(by_rank, ranked=RankBy.BM25)),
    "minilm-sentences": partial(keep_spans, cut=sentences, order=partial(by_rank, ranked=RankBy.EMBEDDING)),
    "question-sentences": partial(keep_spans, cut=sentences, order=partial(by_rank, ranked=RankBy.QUESTION)),
    "sentences-random": partial(keep_spans, cut=sentences, order=at_random),  # §5.1 of arXiv:2310.05736
    # arXiv:2310.06201; there the phrases are spaCy's noun phrases.
    "selective-context": partial(keep_spans, cut=phrases, order=by_surprisal),
    "selective-sentences": partial(keep_spans, cut=sentences, order=by_surprisal),
}


class Surprisals:
    """Mean surprisal of spans of texts under a small LM, which is opened when it is first needed.

    Each distinct text is read once.
    """

    def __init__(self, open_lm: Callable[[], CausalLM]) -> None:
        self._open_lm = open_lm
        self._known: dict[str, tuple[Ints, NDArray[np.float32]]] = {}

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

    def _read(self, text: str) -> tuple[Ints, NDArray[np.float32]]:
        """Where each token begins, and its surprisal."""
        from terselm.models.scoring import Window

        backend, scorer = self._opened
        encoding = backend.encode(text, add_special_tokens=False)
        ((_, scores),) = scorer.score([encoding.ids], window=Window.PIECES)
        return np.array([start for start, _ in encoding.offsets], dtype=np.int64), scores.nats

    @cached_property
    def _opened(self) -> tuple[Any, RowScorer]:
        """The core of the tokenizer, and what reads."""
        from terselm.models.scoring import RowScorer

        lm = self._open_lm()
        return plain_backend(lm.tokenizer), RowScorer(lm)


class Rankers:
    """The compressor's rankers, each opened when it is first needed.

    Args:
        open_lm: gives the small LM, for the likelihood of the question.
        device: of the encoder, as `pick_device` takes it.
    """

    def __init__(self, open_lm: Callable[[], CausalLM], device: str) -> None:
        self._open_lm = open_lm
        self._device = device
        self._opened: dict[RankBy, Ranker] = {}

    def __call__(self, rank_by: RankBy) -> Ranker:
        """By BM25, by all-MiniLM-L6-v2, or by the small LM."""
        if rank_by not in self._opened:
            self._opened[rank_by] = self._open(rank_by)
        return self._opened[rank_by]

    def _open(self, rank_by: RankBy) -> Ranker:
        from terselm.models.encoder import MINILM
        from terselm.models.load import pick_device

        if rank_by is RankBy.BM25:
            return Bm25Ranker()
        if rank_by is RankBy.EMBEDDING:
            return EmbeddingRanker(MINILM, pick_device(self._device))
        return self._by_question()

    def _by_question(self) -> Ranker:
        from terselm.compress.engine.reader import ScoreReader
        from terselm.compress.engine.surprisal import SurprisalEngine

        lm = self._open_lm()
        backend = plain_backend(lm.tokenizer)

        def tokenise(texts: Sequence[str]) -> list[Ints]:
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

        return QuestionRanker(tokenise, ScoreReader(SurprisalEngine(lm), CompressionSettings().cache_bytes))

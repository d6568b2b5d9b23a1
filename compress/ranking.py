"""Rankers: how much texts have to do with a question (docs/algorithm.md, §5).

By what the small LM thinks of the question after them, by words, by embeddings, or by a cross-encoder. Of a ranker's
scores the higher is the better; only those of one call for one question can be compared.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from terselm.compress.layout import Floats32
from terselm.compress.settings import RankBy
from terselm.errors import ConfigError, ContextLengthError, ModelError
from terselm.extras import first_line, need
from terselm.statistics import Floats, Ints

if TYPE_CHECKING:
    from terselm.compress.engine.reader import ScoreReader

STATEMENT = " We can get the answer to this question in the given documents."
"""The restrictive statement of arXiv:2310.06839."""
_VECTORS = 1 << 14  # that an encoder remembers
LONGEST_QUESTION = 256  # tokens of a question that is read where nobody asked for ranking
_LABEL = re.compile(r"^\s*(?:question|query|q|user)\s*:\s*|\n\s*(?:answer|a|assistant|summary)\s*:?\s*$", re.IGNORECASE)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+|\d+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by did do does for from had has have he her his how i in into is it its me my "
        "no not of on or our she so than that the their them then there they this to was we were what when where which "
        "who whom whose why will with would you your",
    )
)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Scores of some texts for one question.

    Attributes:
        scores: ``(n_texts,)``, the higher the better.
        tokens_read, tokens_cached: that the small LM read for it, and those whose surprisals it knew.
    """

    scores: Floats
    tokens_read: int = 0
    tokens_cached: int = 0


class Ranker(Protocol):
    """Scores texts for questions."""

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        """One ranking for each question and its texts.

        Args:
            whole: the texts are whole demonstrations, not sentences or lines of them.
        """


def make_ranker(
    rank_by: RankBy, model: str | None, tokenise: Callable[[Sequence[str]], list[Ints]], reader: ScoreReader
) -> Ranker:
    """The ranker that the settings name; with ``auto`` one that reads long questions from their middle on.

    Args:
        model: of `EmbeddingRanker` or `CrossEncoderRanker`.
        tokenise: texts into tokens of the small LM.
        reader: has the small LM read.
    """
    if rank_by is RankBy.AUTO and model is not None:
        rank_by = RankBy.EMBEDDING
    if rank_by is RankBy.BM25:
        return Bm25Ranker()
    if rank_by is RankBy.EMBEDDING:
        return EmbeddingRanker(model or "minilm-l6", reader.device)
    if rank_by is RankBy.RERANKER:
        assert model is not None
        return CrossEncoderRanker(model, reader.device)
    return QuestionRanker(tokenise, reader, longest=LONGEST_QUESTION if rank_by is RankBy.AUTO else None)


class QuestionRanker:
    """Mean log p(question | text), over the question's tokens; of a whole demonstration, statement included.

    A text that does not fit into the window with the question is read in pieces, the best of which counts.

    Args:
        tokenise: texts into tokens of the small LM.
        reader: has the small LM read.
        longest: tokens that are read of a question: its last ones, since what asks mostly ends it. None: all.

    Source: Eq. 3 of arXiv:2310.06839 (there a perplexity: the order is the same).
    """

    def __init__(
        self, tokenise: Callable[[Sequence[str]], list[Ints]], reader: ScoreReader, *, longest: int | None = None
    ) -> None:
        self._tokenise = tokenise
        self._reader = reader
        self._longest = longest if longest is None else min(longest, reader.window // 2)

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        """See `Ranker`.

        Raises:
            ContextLengthError: a question that leaves no room for text in the model's window.
        """
        questions = self._tokenise([_after_text(question, whole=whole) for question, _ in asked])
        if self._longest is not None:
            questions = [ids[-self._longest :] for ids in questions]
        pairs: list[tuple[Ints, Ints]] = []
        owners: list[tuple[int, int]] = []
        for number, (ids, (_, texts)) in enumerate(zip(questions, asked, strict=True)):
            room = self._reader.window - 1 - len(ids)
            if room < 1:
                raise ContextLengthError(
                    f"the question has {len(ids)} tokens, as it is read to rank by it, which leaves no room for text "
                    f"in the model's window of {self._reader.window}; shorten it, or choose rank_by surprisal"
                )
            for place, text in enumerate(self._tokenise(texts)):
                windows = [text[begin : begin + room] for begin in range(0, max(1, len(text)), room)]
                pairs += [(window, ids) for window in windows]
                owners += [(number, place)] * len(windows)
        reading = self._reader.read_after(pairs)
        scores = [np.full(len(texts), -np.inf) for _, texts in asked]
        read = np.zeros((len(asked), 2), dtype=np.int64)
        for (number, place), nats, counts in zip(owners, reading.nats, reading.counts, strict=True):
            scores[number][place] = max(scores[number][place], -float(nats.mean(dtype=np.float64)))
            read[number] += counts
        return [
            Ranking(scores=values, tokens_read=int(new), tokens_cached=int(known))
            for values, (new, known) in zip(scores, read, strict=True)
        ]


class Bm25Ranker:
    """BM25 of the question's words in each text, among the texts of one prompt."""

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        """See `Ranker`.

        Raises:
            ConfigError: bm25s is not installed.
        """
        return [Ranking(scores=Bm25Index(texts).scores(bare_question(question))) for question, texts in asked]


class Bm25Index:
    """BM25 among some texts.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009; package bm25s (arXiv:2407.03618).

    Raises:
        ConfigError: bm25s is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._size = len(texts)
        corpus = [words_of(text) for text in texts]
        self._known = {word for words in corpus for word in words}
        self._index = _bm25s().BM25()
        if self._known:
            self._index.index(corpus, show_progress=False)

    def scores(self, question: str) -> Floats:
        """``(n_texts,)``; zeros where none has a word of the question."""
        words = [word for word in words_of(question) if word in self._known]
        return np.asarray(self._index.get_scores(words), dtype=np.float64) if words else np.zeros(self._size)


def _bm25s() -> ModuleType:
    """The package, without what it does besides: JAX, which it starts if it can, takes most of a GPU's memory."""
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = cast("ModuleType", None)  # not to be found
    try:
        package = need("bm25s", "rank")
    finally:
        if hidden:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells every index that it builds
    return package


class EmbeddingRanker:
    """Cosine of the embeddings of question and text: means of an encoder's last states, in windows of 256 tokens.

    Of a longer text the best window counts. Embeddings are remembered by text.

    Args:
        model: ``minilm-l6``, a folder or a hub id.
        device: a torch device.
    """

    def __init__(self, model: str, device: Any) -> None:
        self._name = model
        self._device = device
        self._known: OrderedDict[str, Floats32] = OrderedDict()

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        """See `Ranker`.

        Raises:
            ModelError: the encoder is not installed, or cannot be loaded.
        """
        questions = [bare_question(question) for question, _ in asked]
        vectors = self._vectors([*questions, *(text for _, texts in asked for text in texts)])
        rankings = []
        for question, (_, texts) in zip(questions, asked, strict=True):
            wanted = vectors[question][-1]
            best = [float((vectors[text] @ wanted).max()) for text in texts]
            rankings.append(Ranking(scores=np.array(best, dtype=np.float64)))
        return rankings

    def _vectors(self, texts: Sequence[str]) -> dict[str, Floats32]:
        """By text, ``(n_windows, H)`` of length 1."""
        distinct = list(dict.fromkeys(texts))
        vectors = {text: self._known[text] for text in distinct if text in self._known}
        unread = [text for text in distinct if text not in vectors]
        if unread:
            from terselm.models.encoder import load_encoder

            vectors |= zip(unread, load_encoder(self._name, str(self._device)).vectors(unread), strict=True)
        for text in distinct:
            self._known[text] = vectors[text]
            self._known.move_to_end(text)
        while len(self._known) > _VECTORS:
            self._known.popitem(last=False)
        return vectors


class CrossEncoderRanker:
    """What a cross-encoder of sentence-transformers says of question and text, read together.

    Args:
        model: a folder or hub id.
        device: a torch device.
    """

    def __init__(self, model: str, device: Any) -> None:
        self._name = model
        self._device = device

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        """See `Ranker`.

        Raises:
            ConfigError: sentence-transformers is not installed.
            ModelError: the model cannot be loaded.
        """
        pairs = [(bare_question(question), text) for question, texts in asked for text in texts]
        scores = np.asarray(self._loaded.predict(pairs, show_progress_bar=False), dtype=np.float64)
        if scores.ndim != 1:
            raise ConfigError(
                f"the ranker {self._name!r} gives {scores.shape[1]} numbers a text; expected a cross-encoder with one"
            )
        ends = np.cumsum([len(texts) for _, texts in asked])[:-1]
        return [Ranking(scores=values) for values in np.split(scores, ends)]

    @cached_property
    def _loaded(self) -> Any:
        package = need("sentence_transformers", "rerank")
        try:
            return package.CrossEncoder(self._name, device=str(self._device), trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"the ranker {self._name!r} cannot be loaded ({first_line(error)}); expected the folder or hub id of a "
                "cross-encoder"
            ) from None


def bare_question(question: str) -> str:
    """A question without labels such as "Question:" and "Answer:"; as it is if nothing else is there."""
    return _LABEL.sub("", question).strip() or question


def words_of(text: str) -> list[str]:
    """Words for BM25: lower case, split at underscores and humps, without stop words and plural's s."""
    words = [word.lower() for word in _WORD.findall(_CAMEL.sub(" ", text))]
    return [_singular(word) for word in words if word not in _STOP_WORDS]


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _after_text(question: str, *, whole: bool) -> str:
    """What the small LM reads after a text."""
    return f"\n\nQuestion: {bare_question(question)}{STATEMENT if whole else ''}"

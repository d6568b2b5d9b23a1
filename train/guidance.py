"""What the target thinks of a text, brought to the small LM's tokens: by characters, so tokenizers may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.logprobs import Given, LogProbFile, ScoredText
from terselm.data.score import score_texts
from terselm.data.texts import PlainText
from terselm.errors import ConfigError
from terselm.models import CausalLM, load_tokenizer
from terselm.statistics import word_spans, words_of_tokens
from terselm.train.templates import RenderedRecord

NO_WORD = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """The target's opinion on one example of ``n`` tokens.

    Attributes:
        words: ``(n,)`` int32, the word that each token belongs to, counted from 0 in this example; `NO_WORD` where the
            target gives none, or where the word is not wholly in the example.
        nats: ``(words,)`` float32, the target's surprisal of each word.
        top_ids: ``(n, K)`` int32, the tokens that the target finds likeliest in each token's place, −1 where unknown;
            None where only words are compared.
        top_logprobs: ``(n, K)`` float32 nats, −inf where unknown.
    """

    words: NDArray[np.int32]
    nats: NDArray[np.float32]
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None

    def piece(self, part: slice) -> Guide:
        """The opinion on some of the tokens; words that lose a token are left out."""
        words = self.words[part]
        whole = np.bincount(words[words >= 0], minlength=len(self.nats)) == np.bincount(
            self.words[self.words >= 0], minlength=len(self.nats)
        )
        kept = np.flatnonzero(whole & (np.bincount(words[words >= 0], minlength=len(self.nats)) > 0))
        number = np.full(len(self.nats) + 1, NO_WORD, dtype=np.int32)  # the last stands for NO_WORD
        number[kept] = np.arange(len(kept))
        return Guide(
            words=number[words],
            nats=self.nats[kept],
            top_ids=None if self.top_ids is None else self.top_ids[part],
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs[part],
        )

    def after_start(self) -> Guide:
        """The same after one more token, on which there is no opinion."""
        return Guide(
            words=np.insert(self.words, 0, NO_WORD),
            nats=self.nats,
            top_ids=None if self.top_ids is None else np.insert(self.top_ids, 0, -1, axis=0),
            top_logprobs=None if self.top_logprobs is None else np.insert(self.top_logprobs, 0, -np.inf, axis=0),
        )


class Target:
    """Where opinions come from: a local model that reads the texts now, or a file of stored log-probabilities.

    Args:
        source: a model, or the path of a file that `write_logprobs` wrote.
        top_k: how many of the likeliest tokens to learn from; 0 for words alone.
        small: the tokenizer of the small LM.

    Raises:
        ConfigError: likeliest tokens are wanted, but the target's vocabulary is another.
    """

    def __init__(self, source: CausalLM | Path, top_k: int, small: Any) -> None:
        self._top_k = top_k
        self._lm = source if isinstance(source, CausalLM) else None
        self._stored: dict[str, ScoredText] = {}
        if self._lm is not None:
            name, tokenizer = self._lm.name, self._lm.tokenizer
        else:
            file = LogProbFile(Path(str(source)))
            self._stored = {text.id: text for text in file}
            name = file.about.model
            tokenizer = load_tokenizer(file.about.tokenizer) if top_k else None
        if top_k and tokenizer.get_vocab() != small.get_vocab():
            raise ConfigError(
                f"objective.divergence compares token by token, but {name!r} and the small LM have different "
                "vocabularies; use objective.matching, which compares word by word"
            )

    def opinions(self, ids: Sequence[str], rendered: Sequence[RenderedRecord]) -> Iterator[ScoredText | None]:
        """Of each record, by its id; None where the file has none or one of another text."""
        if self._lm is None:
            for name, record in zip(ids, rendered, strict=True):
                found = self._stored.get(name)
                yield found if found is not None and _is_of(found, record) else None
            return
        texts = [PlainText(id=str(i), text=record.prompt + record.response) for i, record in enumerate(rendered)]
        scored = {text.id: text for some in score_texts(self._lm, texts, self._top_k) for text in some}
        yield from (scored[text.id] for text in texts)


def guide(
    record: RenderedRecord,
    token_ids: NDArray[np.int64],
    spans: NDArray[np.int64],
    opinion: ScoredText | None,
    top_k: int,
) -> Guide:
    """The target's opinion by the small LM's tokens.

    Args:
        record: the text.
        token_ids: ``(n,)``.
        spans: ``(n, 2)`` start and end of each token in prompt + response, in characters; −1 at tokens without text.
        opinion: of the whole text, or of the response alone.
        top_k: how many likeliest tokens to take over; 0 for none.
    """
    top = (len(token_ids), top_k)
    guided = Guide(
        words=np.full(len(token_ids), NO_WORD, dtype=np.int32),
        nats=np.zeros(0, dtype=np.float32),
        top_ids=np.full(top, -1, dtype=np.int32) if top_k else None,
        top_logprobs=np.full(top, -np.inf, dtype=np.float32) if top_k else None,
    )
    text = record.prompt + record.response
    if opinion is None or not text.strip():
        return guided
    shift = len(record.prompt) if opinion.text != text else 0
    theirs = np.stack([opinion.starts, opinion.ends], axis=1).astype(np.int64) + shift
    real = spans[:, 0] >= shift  # what the opinion is about
    words = words_of_tokens(text, spans[real])
    count = len(word_spans(text))
    of_theirs = words_of_tokens(text, theirs)
    nats = np.bincount(of_theirs, weights=-opinion.logprobs.astype(np.float64), minlength=count)
    known = (
        np.isfinite(nats) & (np.bincount(of_theirs, minlength=count) > 0) & (np.bincount(words, minlength=count) > 0)
    )
    number = np.full(count, NO_WORD, dtype=np.int32)
    number[known] = np.arange(known.sum())
    guided.words[real] = number[words]
    if guided.top_ids is not None and guided.top_logprobs is not None:
        _take_over(guided.top_ids, guided.top_logprobs, token_ids, spans, opinion, theirs)
    return Guide(
        words=guided.words,
        nats=nats[known].astype(np.float32),
        top_ids=guided.top_ids,
        top_logprobs=guided.top_logprobs,
    )


def _take_over(
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float32],
    token_ids: NDArray[np.int64],
    spans: NDArray[np.int64],
    opinion: ScoredText,
    theirs: NDArray[np.int64],
) -> None:
    """Copy the likeliest tokens where both read the same token in the same place."""
    if opinion.top_ids is None or opinion.top_logprobs is None or opinion.token_ids is None:
        raise ConfigError(
            "objective.divergence needs the likeliest tokens and their ids, which the stored log-probabilities do not "
            "have; score the texts again with --top-k, or use objective.matching"
        )
    place = {(*span, token): i for i, (span, token) in enumerate(zip(theirs.tolist(), opinion.token_ids, strict=True))}
    pairs = [
        (ours, place[key])
        for ours, (span, token) in enumerate(zip(spans.tolist(), token_ids.tolist(), strict=True))
        if (key := (*span, token)) in place
    ]
    if pairs:
        ours, found = (list(side) for side in zip(*pairs, strict=True))
        width = min(top_ids.shape[1], opinion.top_ids.shape[1])
        top_ids[ours, :width] = opinion.top_ids[found, :width]
        top_logprobs[ours, :width] = opinion.top_logprobs[found, :width]


def _is_of(opinion: ScoredText, record: RenderedRecord) -> bool:
    if opinion.given is Given.PROMPT:
        return opinion.text == record.response
    return opinion.text in (record.prompt + record.response, record.response)

"""What the target thinks of a text, brought to the small LM's tokens: by characters, so tokenizers may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.logprobs import Given, LogProbFile, ScoredText, score_texts
from terselm.data.schema import Message, PlainText
from terselm.errors import ConfigError
from terselm.models import CausalLM, load_tokenizer
from terselm.models.chat import ChatMode, chat_prompt, uses_chat
from terselm.statistics import word_spans, words_of_tokens
from terselm.train.examples import NO_WORD, SEPARATOR, Guide, RenderedRecord, TokenSpans


class TargetOpinions:
    """Where opinions come from: a local model that reads the texts now, or a file of stored log-probabilities.

    Args:
        source: a model, or the path of a file that `write_logprobs` wrote.
        top_k: how many of the likeliest tokens to learn from; 0 for words alone.
        small: the tokenizer of the small LM.

    Raises:
        ConfigError: likeliest tokens are to be learnt from, but the target's vocabulary is another.
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

    def guides(
        self, ids: Sequence[str], rendered: Sequence[RenderedRecord], tokens: Sequence[TokenSpans]
    ) -> Iterator[Guide]:
        """The opinion on each record, by its id, brought to its tokens under the small LM."""
        for record, mine, opinion in zip(rendered, tokens, self.opinions(ids, rendered), strict=True):
            yield guide(record, mine, opinion, self._top_k)

    def opinions(self, ids: Sequence[str], rendered: Sequence[RenderedRecord]) -> Iterator[ScoredText | None]:
        """Of each record, by its id; None where the file has none or one of another text."""
        if self._lm is None:
            for name, record in zip(ids, rendered, strict=True):
                opinion = self._stored.get(name)
                yield opinion if opinion is not None and _is_of(opinion, record) else None
            return
        if any(record.messages is not None for record in rendered):  # of a run, all or none
            yield from self._of_answers(self._lm, rendered)
            return
        texts = [PlainText(id=str(i), text=record.prompt + record.response) for i, record in enumerate(rendered)]
        scored = {text.id: text for batch in score_texts(self._lm, texts, self._top_k) for text in batch}
        yield from (scored[text.id] for text in texts)

    def _of_answers(self, lm: CausalLM, rendered: Sequence[RenderedRecord]) -> Iterator[ScoredText]:
        """On the responses of chats, each after its prompt as the target reads it."""
        texts = [PlainText(id=str(i), text=record.response, response_start=0) for i, record in enumerate(rendered)]
        prompts = [_target_prompt(lm, record.messages or ()) for record in rendered]
        scored = {text.id: text for batch in score_texts(lm, texts, self._top_k, prompts) for text in batch}
        yield from (scored[text.id] for text in texts)


def _target_prompt(lm: CausalLM, messages: Sequence[Message]) -> list[int]:
    """Token ids: in the target's chat template, or after its start token with blank lines between."""
    if uses_chat(lm.tokenizer, ChatMode.AUTO, lm.name):
        turns = [{"role": message.role.value, "content": message.content} for message in messages]
        return chat_prompt(lm.tokenizer, turns)
    text = "".join(message.content + SEPARATOR for message in messages)
    return [lm.start_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]


def guide(record: RenderedRecord, tokens: TokenSpans, opinion: ScoredText | None, top_k: int) -> Guide:
    """The target's opinion by the small LM's tokens.

    Args:
        record: the text.
        tokens: ``n`` of prompt + response.
        opinion: of the whole text, or of the response alone.
        top_k: how many likeliest tokens to take over; 0 for none.
    """
    top = (len(tokens.ids), top_k)
    guided = Guide(
        words=np.full(len(tokens.ids), NO_WORD, dtype=np.int32),
        nats=np.zeros(0, dtype=np.float32),
        top_ids=np.full(top, -1, dtype=np.int32) if top_k else None,
        top_logprobs=np.full(top, -np.inf, dtype=np.float32) if top_k else None,
    )
    text = record.prompt + record.response
    if opinion is None or not text.strip():
        return guided
    shift = len(record.prompt) if opinion.text != text else 0
    theirs = np.stack([opinion.starts, opinion.ends], axis=1).astype(np.int64) + shift
    real = tokens.spans[:, 0] >= shift  # what the opinion is about
    words = words_of_tokens(text, tokens.spans[real])
    count = len(word_spans(text))
    of_theirs = words_of_tokens(text, theirs)
    nats = np.bincount(of_theirs, weights=-opinion.logprobs.astype(np.float64), minlength=count)
    known = np.isfinite(nats) & np.isin(np.arange(count), np.intersect1d(of_theirs, words))
    number = np.full(count, NO_WORD, dtype=np.int32)
    number[known] = np.arange(known.sum())
    guided.words[real] = number[words]
    _take_over(guided, tokens, opinion, theirs)
    return replace(guided, nats=nats[known].astype(np.float32))


def _take_over(guided: Guide, tokens: TokenSpans, opinion: ScoredText, theirs: NDArray[np.int64]) -> None:
    """Copy the likeliest tokens, if they are learnt from, where both read the same token in the same place."""
    if guided.top_ids is None or guided.top_logprobs is None:
        return
    if opinion.top_ids is None or opinion.top_logprobs is None or opinion.token_ids is None:
        raise ConfigError(
            "objective.divergence needs the likeliest tokens and their ids, which the stored log-probabilities do not "
            "have; score the texts again with --top-k, or use objective.matching"
        )
    place = {(*span, token): i for i, (span, token) in enumerate(zip(theirs.tolist(), opinion.token_ids, strict=True))}
    pairs = [
        (ours, place[key])
        for ours, (span, token) in enumerate(zip(tokens.spans.tolist(), tokens.ids.tolist(), strict=True))
        if (key := (*span, token)) in place
    ]
    if pairs:
        ours, its = (list(side) for side in zip(*pairs, strict=True))
        width = min(guided.top_ids.shape[1], opinion.top_ids.shape[1])
        guided.top_ids[ours, :width] = opinion.top_ids[its, :width]
        guided.top_logprobs[ours, :width] = opinion.top_logprobs[its, :width]


def _is_of(opinion: ScoredText, record: RenderedRecord) -> bool:
    if opinion.given is Given.PROMPT:
        return opinion.text == record.response
    return opinion.text in (record.prompt + record.response, record.response)

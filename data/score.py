"""What a local target thinks of given texts: the log-probability of every token, read in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from terselm.data.logprobs import Given, ScoredText
from terselm.data.schema import PlainText
from terselm.models import CausalLM

if TYPE_CHECKING:
    from terselm.models.scoring import RowScores


def score_texts(
    lm: CausalLM, texts: Sequence[PlainText], top_k: int = 0, prompts: Sequence[Sequence[int]] | None = None
) -> Iterator[list[ScoredText]]:
    """Score texts, the longest first; yield those that each pass has completed.

    Args:
        top_k: how many of the likeliest tokens to give at each position, with their log-probabilities.
        prompts: token ids that are read before each text, exactly as they are, and not scored; by default, the start
            token.

    Raises:
        ModelError: the memory is too small for one text, or the model's logits are not made as usual; see `OutputHead`.
    """
    from terselm.models.scoring import RowScorer

    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    given = Given.TEXT if prompts is None else Given.PROMPT
    befores = [[lm.start_id]] * len(texts) if prompts is None else [list(prompt) for prompt in prompts]
    for first in sorted({before[0] for before in befores}):
        numbers = [number for number, before in enumerate(befores) if before[0] == first]
        rows = [[*befores[number][1:], *encoded[number].input_ids] for number in numbers]
        skips = [len(befores[number]) - 1 for number in numbers]
        for done in RowScorer(opened_by(lm, first)).passes(rows, skips=skips, top_k=top_k):
            yield [_scored_text(texts[numbers[row]], encoded[numbers[row]], scores, given) for row, scores in done]


def opened_by(lm: CausalLM, first: int) -> CausalLM:
    """The same model, whose texts start with the token ``first``: a chat template may open with another than BOS."""
    return _OtherStart(model=lm.model, tokenizer=lm.tokenizer, name=lm.name, first=first)


@dataclass(frozen=True, kw_only=True)
class _OtherStart(CausalLM):
    first: int

    @property
    def start_id(self) -> int:
        return self.first


def _scored_text(text: PlainText, encoding: Any, scores: RowScores, given: Given) -> ScoredText:
    offsets = np.array(encoding.offset_mapping, np.int32).reshape(-1, 2)
    return ScoredText(
        id=text.id,
        text=text.text,
        given=given,
        response_start=text.response_start,
        starts=offsets[:, 0],
        ends=offsets[:, 1],
        token_ids=np.array(encoding.input_ids, np.int32),
        # rounding can take a token a hair above certainty
        logprobs=-scores.nats.clip(min=0),
        top_logprobs=None if scores.top_nats is None else -scores.top_nats.clip(min=0),
        top_ids=None if scores.top_ids is None else scores.top_ids.astype(np.int32),
    )

"""What a local target thinks of given texts: the log-probability of every token, read in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from terselm.data.logprobs import ScoredText
from terselm.data.texts import PlainText
from terselm.models import CausalLM

if TYPE_CHECKING:
    from terselm.models.scoring import RowScores


def score_texts(lm: CausalLM, texts: Sequence[PlainText], top_k: int = 0) -> Iterator[list[ScoredText]]:
    """Score texts, the longest first; yield those that each pass has completed.

    Args:
        top_k: how many of the likeliest tokens to give at each position, with their log-probabilities.

    Raises:
        ModelError: the memory is too small for one text, or the model's logits are not made as usual; see `OutputHead`.
    """
    from terselm.models.scoring import RowScorer

    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    for done in RowScorer(lm).passes([encoding.input_ids for encoding in encoded], top_k=top_k):
        yield [_scored_text(texts[number], encoded[number], scores) for number, scores in done]


def _scored_text(text: PlainText, encoding: Any, scores: RowScores) -> ScoredText:
    offsets = np.array(encoding.offset_mapping, np.int32).reshape(-1, 2)
    return ScoredText(
        id=text.id,
        text=text.text,
        response_start=text.response_start,
        starts=offsets[:, 0],
        ends=offsets[:, 1],
        token_ids=np.array(encoding.input_ids, np.int32),
        # rounding can take a token a hair above certainty
        logprobs=-scores.nats.clip(min=0),
        top_logprobs=None if scores.top_nats is None else -scores.top_nats.clip(min=0),
        top_ids=None if scores.top_ids is None else scores.top_ids.astype(np.int32),
    )

"""The target's opinion on the small LM's tokens: the same words and nats whatever the tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from terselm.data.logprobs import About, Given, ScoredText, write_logprobs
from terselm.data.records import Message, Record, Role
from terselm.errors import ConfigError
from terselm.models import load_causal_lm
from terselm.train.examples import NO_WORD, Encoding, Guide, RenderedRecord, TokenSpans, encode_records
from terselm.train.guidance import TargetOpinions, guide
from terselm.train.settings import LossOn, Overlong, Template

TEXT = st.text(st.sampled_from("ab é日\n .,"), max_size=30)


def cut(text: str, draw: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Spans of tokens of one to four characters that cover the text."""
    ends = np.unique(np.minimum(np.cumsum(draw.integers(1, 5, len(text))), len(text)))
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1) if len(text) else np.zeros((0, 2), dtype=np.int64)


@given(prompt=TEXT, response=TEXT, seed=st.integers(0, 9), only_response=st.booleans())
def test_words_and_nats_are_those_of_a_count_by_hand(
    prompt: str, response: str, seed: int, only_response: bool
) -> None:
    draw = np.random.default_rng(seed)
    record = RenderedRecord(prompt, response)
    text = prompt + response
    spans = np.concatenate([cut(prompt, draw), cut(response, draw) + len(prompt), [[-1, -1]]])
    said = response if only_response else text
    theirs = cut(said, draw)
    logprobs = -draw.gamma(1, 3, len(theirs)).astype(np.float32)
    if len(logprobs):
        logprobs[0] = np.nan
    opinion = ScoredText(id="a", text=said, starts=theirs[:, 0], ends=theirs[:, 1], logprobs=logprobs)
    found = guide(record, TokenSpans(np.zeros(len(spans), dtype=np.int64), spans), opinion, top_k=0)
    shift = len(text) - len(said)
    ours = [span if span[0] >= shift else None for span in spans[:-1].tolist()]
    by_hand = words_by_hand(text, ours, theirs + shift, logprobs)
    assert found.nats.tolist() == pytest.approx([nats for _, nats in by_hand], rel=1e-5)
    assert [np.flatnonzero(found.words == word).tolist() for word in range(len(found.nats))] == [
        tokens for tokens, _ in by_hand
    ]
    assert found.words[-1] == NO_WORD


def words_by_hand(text: str, ours: Any, theirs: Any, logprobs: Any) -> list[tuple[list[int], float]]:
    """Tokens and nats of each word that both read and that the target gives a number for."""
    if not text.strip():
        return []
    word_at, word, inside = [], -1, False
    for character in text:  # the word that a character or the whitespace before it belongs to
        if not character.isspace() and not inside:
            word += 1
        inside = not character.isspace()
        word_at.append(word if inside else word + 1)
    word_at = [min(w, word) for w in word_at]
    result = []
    for number in range(word + 1):
        tokens = [i for i, span in enumerate(ours) if span and word_at[span[0]] == number]
        nats = [-logprobs[i] for i, (start, _) in enumerate(theirs) if word_at[start] == number]
        if tokens and nats and not np.isnan(sum(nats)):
            result.append((tokens, float(sum(nats))))
    return result


def test_a_piece_keeps_whole_words_only() -> None:
    whole = Guide(words=np.array([0, 0, -1, 1, 2, 2], dtype=np.int32), nats=np.array([1, 2, 3], dtype=np.float32))
    piece = whole.piece(slice(1, 5))
    assert piece.words.tolist() == [-1, -1, 0, -1]
    assert piece.nats.tolist() == [2.0]


def record(name: str, prompt: str, response: str) -> Record:
    return Record(id=name, messages=(Message(role=Role.USER, content=prompt),), response=response)


RECORDS = [record("a", "count the red list", "one two three"), record("b", "sort of blue", "and green is")]


def encoding(tokenizer: Any, target: TargetOpinions, top_k: int = 0) -> Encoding:
    return Encoding(
        tokenizer=tokenizer,
        start_id=0,
        end_id=1,
        template=Template.RAW,
        loss_on=LossOn.ALL,
        max_length=200,
        overlong=Overlong.SPLIT,
        guidance=target,
        top_k=top_k,
    )


def test_a_model_as_its_own_target_agrees_with_itself(tiny_model: Path) -> None:
    """Word by word and token by token, but where prompt and response are tokenised apart."""
    lm = load_causal_lm(tiny_model, device="cpu")
    encoded = encode_records(RECORDS, encoding(lm.tokenizer, TargetOpinions(lm, 5, lm.tokenizer), top_k=5))
    assert encoded.unguided == 0
    for example in encoded.examples:
        assert example.guide is not None
        assert example.guide.top_ids is not None
        assert example.guide.top_logprobs is not None
        import torch

        with torch.inference_mode():
            log_q = lm.model(input_ids=torch.tensor(example.ids)[None]).logits[0].double().log_softmax(-1)
        ours = [-log_q[t - 1, example.ids[t]].item() for t in range(1, len(example))]
        for word, nats in enumerate(example.guide.nats):
            tokens = np.flatnonzero(example.guide.words == word)
            assert sum(ours[t - 1] for t in tokens) == pytest.approx(nats, abs=1e-3)
        for t in np.flatnonzero((example.guide.top_ids >= 0).all(axis=1)):
            best, tokens = log_q[t - 1].topk(5)
            assert example.guide.top_ids[t].tolist() == tokens.tolist()
            assert example.guide.top_logprobs[t].tolist() == pytest.approx(best.tolist(), abs=1e-4)
        assert (example.guide.top_ids[1:-1] >= 0).all(axis=1).sum() >= len(example) - 4


def test_stored_opinions_are_found_by_id_and_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "stored.parquet"
    first = RECORDS[0].messages[0].content + "\n\n" + RECORDS[0].response
    texts = [
        ScoredText(id="a", text=first, **spans_of_words(first)),
        ScoredText(id="b", text="another text", **spans_of_words("another text")),
    ]
    write_logprobs(path, texts, About(model="far", tokenizer="far", source="https://far"))
    encoded = encode_records(RECORDS, encoding(tokenizer, TargetOpinions(path, 0, tokenizer)))
    assert encoded.unguided == 1
    found = encoded.examples[0].guide
    assert found is not None
    assert found.nats.tolist() == pytest.approx([1.0] * 7)


def test_an_opinion_given_the_prompt_covers_the_response(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "stored.parquet"
    response = RECORDS[0].response
    texts = [ScoredText(id="a", text=response, given=Given.PROMPT, **spans_of_words(response))]
    write_logprobs(path, texts, About(model="far", tokenizer="far", source="https://far"))
    (example,) = encode_records(RECORDS[:1], encoding(tokenizer, TargetOpinions(path, 0, tokenizer))).examples
    assert example.guide is not None
    assert example.guide.nats.tolist() == pytest.approx([1.0] * 3)
    first = int(np.flatnonzero(example.guide.words == 0)[0])
    assert tokenizer.decode(example.ids[first:-1]) == response


def test_divergence_needs_one_vocabulary(tiny_model: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lm = load_causal_lm(tiny_model, device="cpu")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ConfigError, match=r"different vocabularies; use objective\.matching"):
        TargetOpinions(lm, 5, other)


def spans_of_words(text: str) -> dict[str, Any]:
    """One nat a word."""
    import re

    spans = np.array([match.span() for match in re.finditer(r"\s*\S+", text)], dtype=np.int32)
    return {"starts": spans[:, 0], "ends": spans[:, 1], "logprobs": np.full(len(spans), -1.0, dtype=np.float32)}

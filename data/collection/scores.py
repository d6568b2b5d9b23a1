"""Log-probabilities in the ledger, and from it into the compact file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from terselm.data.collection.entries import State
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.plan import Request
from terselm.data.collection.responses import parse_response
from terselm.data.collection.settings import CollectSettings
from terselm.data.collection.token_scores import response_scores
from terselm.data.formats import Format, RecordReader
from terselm.data.logprobs import About, Given, ScoredText, write_logprobs
from terselm.data.schema import PlainText, record_text
from terselm.data.score import score_texts
from terselm.models import CausalLM

_ARRAYS = ("starts", "ends", "logprobs", "token_ids", "top_logprobs", "top_ids")


def score_records(load: Callable[[], CausalLM], ledger: Ledger, requests: Sequence[str], top_k: int) -> None:
    """Score the records of these requests, as raw text, where the ledger has no scores of them.

    Args:
        load: gives the target; not called where nothing is missing.
    """
    if missing := unscored(ledger, requests, top_k):
        score_all(load(), ledger, [(name, _text_of(ledger, name)) for name in missing], top_k)


def unscored(ledger: Ledger, requests: Sequence[str], top_k: int) -> list[str]:
    """Those of the requests that have a record, but no scores."""
    states, have = ledger.states(), ledger.scored(top_k)
    return [name for name in requests if states[name] is State.DONE and name not in have]


def score_all(lm: CausalLM, ledger: Ledger, texts: Sequence[tuple[str, PlainText]], top_k: int) -> None:
    """Score (key in the ledger, text); each pass is committed before the next begins."""
    with tqdm(total=len(texts), desc=f"Scoring with {lm.name}", unit="text", delay=2, disable=None) as bar:
        for batch in score_texts(lm, [replace(text, id=key) for key, text in texts], top_k):
            ledger.put_scores(((scored.id, pack(scored)) for scored in batch), top_k)
            bar.update(len(batch))


def export_logprobs(ledger: Ledger, requests: Sequence[Request], path: Path, settings: CollectSettings) -> None:
    """Write the file of log-probabilities that belongs to the records of these requests."""
    if settings.is_local:
        names = [request.id for request in requests if ledger.record(request.id) is not None]
        scored = stored_scores(ledger, ((name, _text_of(ledger, name)) for name in names))
    else:
        scored = endpoint_scores(ledger, requests)
    write_logprobs(path, scored, about(settings))


def about(settings: CollectSettings) -> About:
    """What the file says of itself."""
    if settings.is_local:
        return About(model=settings.target, tokenizer=settings.local_name, source="local")
    return About(model=settings.model, tokenizer=settings.model, source=settings.endpoint)


def stored_scores(ledger: Ledger, texts: Iterable[tuple[str, PlainText]]) -> Iterator[ScoredText]:
    """The scores of (key in the ledger, text); what has none is left out."""
    for key, text in texts:
        if (data := ledger.scores(key)) is not None:
            yield unpack(data, text)


def _text_of(ledger: Ledger, request: str) -> PlainText:
    record = ledger.record(request)
    assert record is not None, request
    return record_text(RecordReader(Format.RECORDS).record(record))


def endpoint_scores(ledger: Ledger, requests: Iterable[Request]) -> Iterator[ScoredText]:
    """The scores that came with an endpoint's answers."""
    states = ledger.states()
    for request in requests:
        raw = ledger.raw(request.id) if states[request.id] is State.DONE else None
        if raw is not None and (scored := response_scores(request.id, parse_response(raw))) is not None:
            yield scored


def pack(scored: ScoredText) -> bytes:
    """Everything but the text, which the ledger has already."""
    arrays: dict[str, Any] = {name: getattr(scored, name) for name in _ARRAYS if getattr(scored, name) is not None}
    rest: dict[str, Any] = {"given": scored.given, "tokens": _hex(scored.tokens)}
    rest["top_tokens"] = None if scored.top_tokens is None else [_hex(tokens) for tokens in scored.top_tokens]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, rest=np.frombuffer(json.dumps(rest).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def unpack(data: bytes, text: PlainText) -> ScoredText:
    """What `pack` packed."""
    with np.load(io.BytesIO(data)) as found:
        arrays = {name: found[name] for name in _ARRAYS if name in found}
        rest = json.loads(found["rest"].tobytes())
    tops = rest["top_tokens"]
    return ScoredText(
        id=text.id,
        text=text.text,
        response_start=text.response_start,
        given=Given(rest["given"]),
        tokens=_unhex(rest["tokens"]),
        top_tokens=None if tops is None else tuple(_unhex(tokens) or () for tokens in tops),
        **arrays,
    )


def _hex(tokens: Sequence[bytes] | None) -> list[str] | None:
    return None if tokens is None else [token.hex() for token in tokens]


def _unhex(tokens: Sequence[str] | None) -> tuple[bytes, ...] | None:
    return None if tokens is None else tuple(map(bytes.fromhex, tokens))

"""Log-probabilities: as an endpoint's response tells them, as the ledger keeps them, and as their file holds them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from terselm.data.collection.ledger import Ledger, State
from terselm.data.collection.outcome import Response, parse_response
from terselm.data.collection.plan import Request
from terselm.data.collection.settings import CollectSettings, LogProbSettings, PromptScores
from terselm.data.formats import Format, RecordReader
from terselm.data.logprobs import About, Given, ScoredText, write_logprobs
from terselm.data.schema import PlainText, Record, record_text

_ARRAYS = ("starts", "ends", "logprobs", "token_ids", "top_logprobs", "top_ids")


def export_logprobs(ledger: Ledger, requests: Sequence[Request], path: Path, settings: CollectSettings) -> None:
    """Write the file of log-probabilities that belongs to the records of these requests."""
    if settings.is_local:
        recorded = [request for request in requests if ledger.record(request.id) is not None]
        scored = stored_scores(ledger, ((request.id, text_of(ledger, request)) for request in recorded))
    else:
        scored = endpoint_scores(ledger, requests)
    write_logprobs(path, scored, about(settings))


def about(settings: CollectSettings) -> About:
    """What the file says of itself."""
    if settings.is_local:
        return About(model=settings.target, tokenizer=settings.local_name, source="local")
    return About(model=settings.model, tokenizer=settings.model, source=settings.endpoint)


def unscored(ledger: Ledger, requests: Sequence[str], top_k: int) -> list[str]:
    """Those of the requests that have a record, but no scores."""
    states, have = ledger.states(), ledger.scored(top_k)
    return [name for name in requests if states[name] is State.DONE and name not in have]


def stored_scores(ledger: Ledger, texts: Iterable[tuple[str, PlainText]]) -> Iterator[ScoredText]:
    """The scores of (key in the ledger, text); what has none is left out."""
    for key, text in texts:
        if (data := ledger.scores(key)) is not None:
            yield unpack(data, text)


def text_of(ledger: Ledger, request: Request) -> PlainText:
    """Of a local target's answer, what is scored: the record as the compressor reads it, or in a chat its response."""
    held = ledger.record(request.id)
    assert held is not None, request.id
    record: Record = RecordReader(Format.RECORDS).record(held)
    if request.chat:
        return PlainText(id=record.id, text=record.response, response_start=0)
    return record_text(record)


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


def response_scores(name: str, response: Response) -> ScoredText | None:
    """The log-probabilities of the response's own tokens; None where there are none."""
    found = response.logprobs
    if not isinstance(found, dict):
        return None
    entries = _as_chat(found) if found.get("content") is None else found["content"]
    if not entries:
        return None
    pieces = [_bytes(entry) for entry in entries]
    top = [entry.get("top_logprobs") or [] for entry in entries]
    starts, ends = spans(response.text, pieces)
    return ScoredText(
        id=name,
        text=response.text,
        given=Given.PROMPT,
        response_start=0,
        starts=starts,
        ends=ends,
        tokens=tuple(pieces),
        logprobs=_logprobs([entry["logprob"] for entry in entries]),
        **_tops(top),
    )


def text_scores(text: PlainText, raw: bytes, settings: LogProbSettings) -> ScoredText:
    """The log-probabilities of a text that was sent to be scored.

    Raises:
        ValueError: the response holds none, or not those of this text.
    """
    if settings.of_texts is PromptScores.ECHO:
        scored = echoed_scores(text.id, text.text, raw)
    else:
        scored = vllm_scores(text.id, text.text, raw, settings.top_k)
    return replace(scored, response_start=text.response_start)


def echoed_scores(name: str, text: str, raw: bytes) -> ScoredText:
    """The log-probabilities of a text that was sent with ``echo``.

    Raises:
        ValueError: the response holds none, or not those of this text.
    """
    found = parse_response(raw).logprobs
    if not isinstance(found, dict) or not found.get("tokens"):
        raise ValueError("the response holds no log-probabilities; the endpoint may not know echo")
    return _prompt_scores(name, text, _as_chat(found))


def vllm_scores(name: str, text: str, raw: bytes, top_k: int) -> ScoredText:
    """The log-probabilities of a text from vLLM's ``prompt_logprobs``.

    Each position lists the token that is there first, then the likeliest; the start token has no entry.

    Raises:
        ValueError: the response holds none, or not those of this text.
    """
    try:
        value = json.loads(raw)
        positions = value["choices"][0].get("prompt_logprobs") or value["prompt_logprobs"]
        entries = []
        for position in positions:
            if position is None:  # before the first token, nothing is known
                continue
            found = [
                {"id": int(token), "token": said["decoded_token"] or "", "logprob": said["logprob"]}
                for token, said in position.items()
            ]
            entries.append(found[0] | {"top_logprobs": sorted(found, key=lambda entry: -entry["logprob"])[:top_k]})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the response holds no prompt_logprobs: {type(error).__name__} {error}") from None
    return _prompt_scores(name, text, entries)


def _prompt_scores(name: str, text: str, entries: Sequence[dict[str, Any]]) -> ScoredText:
    pieces = [_bytes(entry) for entry in entries]
    starts, ends = spans(text, pieces)
    # A start token before the text, and what was generated after it, have no characters.
    kept = [index for index in range(len(entries)) if starts[index] < ends[index]]
    if text and not kept:
        raise ValueError("the log-probabilities are those of another text")
    ids = [entries[index].get("id") for index in kept]
    return ScoredText(
        id=name,
        text=text,
        starts=starts[kept],
        ends=ends[kept],
        tokens=tuple(pieces[index] for index in kept),
        token_ids=None if None in ids else np.array(ids, np.int32),
        logprobs=_logprobs([entries[index]["logprob"] for index in kept]),
        **_tops([entries[index].get("top_logprobs") or [] for index in kept]),
    )


def spans(text: str, pieces: Sequence[bytes]) -> tuple[Any, Any]:
    """Character spans of tokens given as bytes.

    Where the bytes are not those of the text (an endpoint that shows a part of a character as U+FFFD, or writes the
    spaces otherwise), tokens are found by looking for the next one that fits, and those between share what is between.

    Returns:
        ``(T,)`` int32 each: the first character, and the one after the last.
    """
    data = text.encode()
    if "▁" not in text:  # as SentencePiece writes a space
        pieces = [piece.replace("▁".encode(), b" ") for piece in pieces]
    character = np.zeros(len(data) + 1, np.int32)  # of each byte
    character[:-1] = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    character[-1] = len(text)
    places: list[tuple[int, int]] = []
    at, unplaced = 0, 0
    for piece in pieces:
        found = data.find(piece, at, at + len(piece) + 16 * (unplaced + 1)) if piece else at
        if data[at : at + len(piece)] == piece and not unplaced:
            places.append((at, at + len(piece)))
            at += len(piece)
        elif piece and found >= 0 and b"\xef\xbf\xbd" not in piece:
            places += [(at, found)] * unplaced + [(found, found + len(piece))]
            at, unplaced = found + len(piece), 0
        else:
            unplaced += 1
    places += [(at, len(data))] * unplaced
    starts = np.array([character[start] for start, _ in places], np.int32)
    ends = np.array([character[end - 1] + 1 if end > start else character[start] for start, end in places], np.int32)
    return starts, ends


def _tops(top: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    width = max(map(len, top), default=0)
    if not width:
        return {}
    table = np.full((len(top), width), -np.inf, np.float32)
    for row, entries in enumerate(top):
        table[row, : len(entries)] = _logprobs([entry["logprob"] for entry in entries])
    ids = None
    if all("id" in entry for entries in top for entry in entries):
        ids = np.full(table.shape, -1, np.int32)
        for row, entries in enumerate(top):
            ids[row, : len(entries)] = [entry["id"] for entry in entries]
    return {
        "top_logprobs": table,
        "top_ids": ids,
        "top_tokens": tuple(tuple(_bytes(entry) for entry in entries) for entries in top),
    }


def _as_chat(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The log-probabilities of ``/completions`` in the form of ``/chat/completions``."""
    values = found.get("token_logprobs") or []
    tops = found.get("top_logprobs") or [None] * len(values)
    return [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [
                {"token": other, "logprob": logprob}
                for other, logprob in sorted((top or {}).items(), key=lambda item: -item[1])
            ],
        }
        for token, value, top in zip(found.get("tokens") or [], values, tops, strict=True)
    ]


def _bytes(entry: dict[str, Any]) -> bytes:
    """A token's bytes; OpenAI lists them, others give text, with ``bytes:\\xe2`` for a part of a character."""
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    token = str(entry.get("token") or "")
    if token.startswith("bytes:"):
        return token.removeprefix("bytes:").encode("ascii", "ignore").decode("unicode_escape").encode("latin-1")
    return token.encode(errors="replace")


def _logprobs(values: Sequence[float | None]) -> Any:
    """NaN where there is none; rounding can take a certain token a hair above 0."""
    numbers = [math.nan if value is None else min(0.0, float(value)) for value in values]
    return np.array(numbers, np.float32)

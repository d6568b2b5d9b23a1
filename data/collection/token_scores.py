"""Log-probabilities in an endpoint's response: of the answer's tokens, or of a text that was sent to be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from terselm.data.collection.responses import Response, parse_response
from terselm.data.collection.settings import LogProbSettings, PromptScores
from terselm.data.logprobs import Given, ScoredText
from terselm.data.schema import PlainText


def response_scores(name: str, response: Response) -> ScoredText | None:
    """The log-probabilities of the response's own tokens; None where there are none."""
    found = response.logprobs
    if not isinstance(found, dict):
        return None
    entries = found.get("content")
    if entries is None:
        entries = _as_chat(found)
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
    entries = _as_chat(found)
    return _prompt_scores(name, text, entries)


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

"""What an endpoint's response says: the text, how it ended, and what it used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer of an endpoint.

    Attributes:
        metered: the response says what it used; else the counts are 0.
        filtered: a content filter, or the model itself, kept the answer back.
        logprobs: as they came, in the form of the interface that was asked; None without.
    """

    text: str
    finish_reason: str
    filtered: bool
    metered: bool
    prompt_tokens: int
    completion_tokens: int
    model: str | None
    system_fingerprint: str | None
    logprobs: Any


def parse_response(raw: bytes) -> Response:
    """Read a response of ``/chat/completions`` or ``/completions``.

    Raises:
        ValueError: it is torn, not JSON, or lacks what every answer has.
    """
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        refused = message is not None and bool(message.get("refusal"))
        usage = value.get("usage") or {}
        reason = choice.get("finish_reason") or "unknown"
        response = Response(
            text=text or "",
            finish_reason=str(reason),
            filtered=refused or reason == "content_filter",
            metered="prompt_tokens" in usage and "completion_tokens" in usage,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            model=value.get("model") or None,
            system_fingerprint=value.get("system_fingerprint") or None,
            logprobs=choice.get("logprobs"),
        )
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a response of this interface: {type(error).__name__} {error}") from None
    if not isinstance(response.text, str) or not isinstance(text, str | None):
        raise ValueError(f"the answer is {type(text).__name__}; expected text")
    if any("\ud800" <= character <= "\udfff" for character in response.text):
        raise ValueError("the answer holds half a surrogate pair, which is no character")
    return response

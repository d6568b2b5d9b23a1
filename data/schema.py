"""What a record is: the prompt that the target LLM was given, what it answered, and where the answer came from.

Nothing here reads files or imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

Parameter: TypeAlias = str | int | float | bool | list[str] | None


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a prompt.

    Raises:
        ValueError: the role is unknown, or the content is blank or not valid Unicode.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in list(Role):
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(Role)}")
        check_text("the content of a message", self.content)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens as the target counts them; the completion includes the token that ended it."""

    prompt_tokens: int
    completion_tokens: int

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            check_count(name, getattr(self, name), least=0)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Where a response came from.

    Attributes:
        parameters: as asked: temperature, top_p, seed, max_new_tokens; for a base model also prompt_template and stop.
        sample: index among the answers to the same messages from the same model with the same parameters.
        attempts: how often it was asked until the answer was fit to keep; attempt n was drawn with seed + n − 1.
        created: ISO-8601 date and time.
        finish_reason: ``stop``, ``length``, ``loop`` (cut where it began to repeat itself), or what the endpoint said.
        versions: of the packages that made it, by name.
        served_model: the model that answered, where the endpoint calls it otherwise than it was asked for.
        system_fingerprint: of the endpoint's configuration, where it gives one.

    Raises:
        ValueError: a blank model, a negative count, or a date that is not ISO-8601.
    """

    model: str
    parameters: Mapping[str, Parameter] = field(hash=False)
    sample: int = 0
    attempts: int = 1
    created: str
    finish_reason: str
    usage: Usage
    versions: Mapping[str, str] = field(hash=False, default_factory=dict)
    served_model: str | None = None
    system_fingerprint: str | None = None

    def __post_init__(self) -> None:
        check_text("generation.model", self.model)
        check_text("generation.finish_reason", self.finish_reason)
        for name in ("served_model", "system_fingerprint"):
            if getattr(self, name) is not None:
                check_text(f"generation.{name}", getattr(self, name))
        check_count("generation.sample", self.sample, least=0)
        check_count("generation.attempts", self.attempts, least=1)
        try:
            datetime.fromisoformat(self.created)
        except (TypeError, ValueError):
            raise ValueError(f"generation.created is {self.created!r}; expected an ISO-8601 date and time") from None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer of the target LLM.

    ``generation`` is None for text whose origin is unknown, such as an alpaca file.

    Raises:
        ValueError: no messages, a prompt that ends with the assistant, or a blank text.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    generation: Generation | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_prompt(self.messages)
        check_text("response", self.response)
        if self.category is not None:
            check_text("category", self.category)


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text as a model reads it.

    Attributes:
        response_start: character at which the response begins; None for a text that is not prompt and response.
    """

    id: str
    text: str
    response_start: int | None = None


def record_text(record: Record) -> PlainText:
    """The text of a record as the compressor reads it: the messages and the response, with blank lines between."""
    prompt = "".join(f"{message.content}\n\n" for message in record.messages)
    return PlainText(id=record.id, text=prompt + record.response, response_start=len(prompt))


def record_id(messages: Sequence[Message], model: str, parameters: Mapping[str, Parameter], sample: int) -> str:
    """20 hex digits that name one answer: equal exactly where all four arguments are; 0 and 0.0 are the same."""
    asked = {name: _plain_number(value) for name, value in parameters.items()}
    return _digest([[(m.role.value, m.content) for m in messages], model, asked, sample])


def prompt_hash(messages: Sequence[Message]) -> str:
    """20 hex digits that name a prompt, whoever answered it and however often."""
    return _digest([(m.role.value, m.content) for m in messages])


def check_prompt(messages: Sequence[Message]) -> None:
    """Raise ValueError unless there are messages and the last is not the assistant's."""
    if not messages:
        raise ValueError("messages is empty; expected at least one")
    if messages[-1].role is Role.ASSISTANT:
        raise ValueError("the prompt ends with an assistant message; the assistant's last words belong in the response")


def check_text(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a string that is not blank and that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}; expected a string")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} holds half a surrogate pair, which is no character")


def check_count(name: str, value: object, *, least: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def _plain_number(value: Parameter) -> Parameter:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(value: object) -> str:
    canonical = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]

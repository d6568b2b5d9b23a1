"""The shapes that records come in, and how each becomes a ``Record``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from terselm.data.rows import Json
from terselm.data.schema import Generation, Message, Record, Role, Usage, prompt_hash, record_id


class Format(StrEnum):
    """Shapes of one line; the keys that tell them apart.

    Attributes:
        RECORDS: our own: messages, response; id, generation and category besides.
        ALPACA: instruction, output (or response); input besides.
        SHAREGPT: conversations: a list of from, value.
        MESSAGES: OpenAI chat messages: a list of role, content that ends with the assistant.
        PROMPT_COMPLETION: prompt, completion: two strings.
    """

    RECORDS = "records"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"


FOREIGN_ROLES: Mapping[str, Role] = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "human": Role.USER,
    "user": Role.USER,
    "gpt": Role.ASSISTANT,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}


def detect_format(value: Json) -> Format:
    """Tell the format by the keys of a file's first object.

    Raises:
        ValueError: no known format has these keys.
    """
    keys = value.keys()
    if "messages" in keys:
        return Format.RECORDS if {"response", "generation"} & keys else Format.MESSAGES
    if "conversations" in keys:
        return Format.SHAREGPT
    if "prompt" in keys and "completion" in keys:
        return Format.PROMPT_COMPLETION
    if "instruction" in keys:
        return Format.ALPACA
    named = ", ".join(map(repr, keys)) or "none"
    raise ValueError(
        f"no known record format has these keys ({named}); expected 'messages' and 'response', 'instruction' and "
        "'output', 'conversations', 'messages' alone, or 'prompt' and 'completion'"
    )


def record_to_object(record: Record) -> Json:
    """The record as JSON, such as ``RecordReader`` with ``Format.RECORDS`` reads back."""
    value: Json = {"id": record.id}
    if record.category is not None:
        value["category"] = record.category
    value["messages"] = [message_to_object(message) for message in record.messages]
    value["response"] = record.response
    if (made := record.generation) is not None:
        value["generation"] = {
            "model": made.model,
            "parameters": dict(made.parameters),
            "sample": made.sample,
            "attempts": made.attempts,
            "created": made.created,
            "finish_reason": made.finish_reason,
            "usage": {
                "prompt_tokens": made.usage.prompt_tokens,
                "completion_tokens": made.usage.completion_tokens,
            },
            "versions": dict(made.versions),
        }
        for name in ("served_model", "system_fingerprint"):
            if (known := getattr(made, name)) is not None:
                value["generation"][name] = known
    return value


def message_to_object(message: Message) -> Json:
    """``{"role": …, "content": …}``."""
    return {"role": message.role.value, "content": message.content}


class RecordReader:
    """Turns the objects of one file into records; all must be of one format.

    Formats that carry no id get one from the prompt and the count of the same prompt before it in the file.
    """

    def __init__(self, format: Format) -> None:
        self.format = format
        self._seen: dict[str, int] = {}

    def record(self, value: Json) -> Record:
        """Raises ValueError saying what is wrong with ``value``."""
        return self._own(value) if self.format is Format.RECORDS else self._foreign(value)

    def _own(self, value: Json) -> Record:
        made = value.get("generation")
        return Record(
            id=_take(value, "id"),
            messages=messages_of(_take(value, "messages")),
            response=_take(value, "response"),
            generation=None if made is None else _generation(made),
            category=value.get("category"),
        )

    def _foreign(self, value: Json) -> Record:
        messages, response = _PARSERS[self.format](value)
        prompt = prompt_hash(messages)
        sample = self._seen.get(prompt, 0)
        self._seen[prompt] = sample + 1
        return Record(
            id=record_id(messages, model="", parameters={}, sample=sample), messages=messages, response=response
        )


def messages_of(value: object) -> tuple[Message, ...]:
    """Messages in our own form: exact roles, no blank contents.

    Raises:
        ValueError: saying which message is wrong (counted from 1), and how.
    """
    messages = []
    for number, item in enumerate(_list("messages", value), start=1):
        try:
            messages.append(Message(role=_role(_take(item, "role")), content=_take(item, "content")))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return tuple(messages)


def _generation(value: object) -> Generation:
    usage = _take(value, "usage", parent="generation")
    return Generation(
        model=_take(value, "model", parent="generation"),
        parameters=_parameters(_take(value, "parameters", parent="generation")),
        sample=_get(value, "sample", 0),
        attempts=_get(value, "attempts", 1),
        created=_take(value, "created", parent="generation"),
        finish_reason=_take(value, "finish_reason", parent="generation"),
        usage=Usage(
            prompt_tokens=_take(usage, "prompt_tokens", parent="usage"),
            completion_tokens=_take(usage, "completion_tokens", parent="usage"),
        ),
        versions=_mapping("generation.versions", _get(value, "versions", {})),
        served_model=_get(value, "served_model", None),
        system_fingerprint=_get(value, "system_fingerprint", None),
    )


def _parameters(value: object) -> Json:
    parameters = _mapping("generation.parameters", value)
    for name, item in parameters.items():
        scalar = item is None or isinstance(item, str | int | float | bool)
        if not scalar and not (isinstance(item, list) and all(isinstance(i, str) for i in item)):
            raise ValueError(f"generation.parameters.{name} is {item!r}; expected a scalar or a list of strings")
    return parameters


def _alpaca(value: Json) -> tuple[tuple[Message, ...], str]:
    instruction = _take(value, "instruction")
    extra = value.get("input") or ""
    if not isinstance(extra, str):
        raise ValueError(f"input is {type(extra).__name__}; expected a string")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    answer = _take(value, "output" if "output" in value or "response" not in value else "response")
    return (Message(role=Role.USER, content=prompt),), answer


def _prompt_completion(value: Json) -> tuple[tuple[Message, ...], str]:
    return (Message(role=Role.USER, content=_take(value, "prompt")),), _take(value, "completion")


def _sharegpt(value: Json) -> tuple[tuple[Message, ...], str]:
    return _conversation(_take(value, "conversations"), role_key="from", text_key="value")


def _messages(value: Json) -> tuple[tuple[Message, ...], str]:
    return _conversation(_take(value, "messages"), role_key="role", text_key="content")


def _conversation(value: object, role_key: str, text_key: str) -> tuple[tuple[Message, ...], str]:
    """The last assistant turn is the response, all before it the prompt."""
    turns = turns_of(value, role_key, text_key)
    if not turns or turns[-1].role is not Role.ASSISTANT:
        raise ValueError(
            "the conversation does not end with the assistant, so there is no response to learn from; "
            "collect the target's answers first, or leave the line out"
        )
    return tuple(turns[:-1]), turns[-1].content


def turns_of(value: object, role_key: str, text_key: str) -> list[Message]:
    """The messages of a foreign conversation; a blank system message is left out.

    Raises:
        ValueError: saying which message is wrong (counted from 1), and how.
    """
    turns = []
    for number, item in enumerate(_list("the conversation", value), start=1):
        try:
            role, text = _role(_take(item, role_key), FOREIGN_ROLES), _take(item, text_key)
            if role is not Role.SYSTEM or text != "":
                turns.append(Message(role=role, content=text))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return turns


_PARSERS: Mapping[Format, Callable[[Json], tuple[tuple[Message, ...], str]]] = {
    Format.ALPACA: _alpaca,
    Format.SHAREGPT: _sharegpt,
    Format.MESSAGES: _messages,
    Format.PROMPT_COMPLETION: _prompt_completion,
}


def _role(name: object, known: Mapping[str, Role] | None = None) -> Role:
    roles = known or {role.value: role for role in Role}
    if not isinstance(name, str) or name not in roles:
        raise ValueError(f"unknown role {name!r}; expected one of {', '.join(roles)}")
    return roles[name]


def _take(value: object, key: str, parent: str = "") -> Any:
    """The value of a key that must be there; its type is checked where it is used."""
    if not isinstance(value, dict):
        raise ValueError(f"{parent or 'item'} is {type(value).__name__}; expected an object")
    if key not in value:
        raise ValueError(f"missing key {(parent + '.' if parent else '') + key!r}")
    return value[key]


def _get(value: object, key: str, default: Any) -> Any:
    return value.get(key, default) if isinstance(value, dict) else default


def _mapping(name: str, value: object) -> Json:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {type(value).__name__}; expected an object")
    return value


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}; expected a list")
    return value

"""From the rows of a source to instructions, or to texts that are to be scored as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from terselm.data.formats import Reader, detect_format, turns_of
from terselm.data.instructions import Instruction
from terselm.data.jsonl import Json
from terselm.data.schema import Message, Role, prompt_hash
from terselm.data.sources.rows import read_rows
from terselm.data.texts import PlainText, record_text
from terselm.errors import DataFormatError

T = TypeVar("T")
_PROMPT_KEYS = ("instruction", "prompt", "question", "text")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The instructions of a source.

    Attributes:
        duplicates: rows that were left out, since their prompt had come before.
    """

    instructions: list[Instruction]
    duplicates: int


def load_instructions(source: str) -> Loaded:
    """Read instructions from any source; of equal prompts, the first stays.

    A row is one of: ``messages`` (ours, or OpenAI's with the answer last, which is left out), ``conversations``
    (sharegpt), ``instruction`` with ``input`` (alpaca), ``prompt``, ``question`` or ``text``. An answer in the row
    is passed over.

    Raises:
        ConfigError: the source cannot be had.
        DataFormatError: a bad row, an id that came before with another prompt, or no rows.
    """
    found: dict[str, Instruction] = {}
    names: dict[str, str] = {}
    rows = 0
    for number, row in read_rows(source):
        rows += 1
        instruction = _at(source, number, _instruction, row)
        prompt = prompt_hash(instruction.messages)
        if names.setdefault(instruction.id, prompt) != prompt:
            raise DataFormatError(source, number, f"id {instruction.id!r} came before with another prompt")
        found.setdefault(prompt, instruction)
    if not found:
        raise DataFormatError(source, None, "holds no instructions")
    return Loaded(instructions=list(found.values()), duplicates=rows - len(found))


def load_texts(source: str) -> list[PlainText]:
    """Read texts to score: rows with ``text``, or records of any format, which become prompt and response.

    Raises:
        ConfigError: the source cannot be had.
        DataFormatError: a bad row, an id that came before, or no rows.
    """
    texts: dict[str, PlainText] = {}
    reader: Reader | None = None
    for number, row in read_rows(source):
        if "text" in row:
            text = PlainText(id=str(row.get("id", number)), text=_at(source, number, _text, row))
        else:
            reader = reader or Reader(_at(source, number, detect_format, row))
            text = record_text(_at(source, number, reader.record, row))
        if text.id in texts:
            raise DataFormatError(source, number, f"id {text.id!r} came before")
        texts[text.id] = text
    if not texts:
        raise DataFormatError(source, None, "holds no texts")
    return list(texts.values())


def _at(source: str, number: int, make: Callable[[Json], T], row: Json) -> T:
    try:
        return make(row)
    except ValueError as error:
        raise DataFormatError(source, number, str(error)) from None


def _instruction(row: Json) -> Instruction:
    messages = tuple(_messages(row))
    name: Any = row.get("id")
    category = row.get("category")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    return Instruction(id=prompt_hash(messages) if name is None else name, messages=messages, category=category)


def _messages(row: Json) -> list[Message]:
    for key, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in row:
            turns = turns_of(row[key], role_key, text_key)
            return turns[:-1] if turns and turns[-1].role is Role.ASSISTANT else turns
    for key in _PROMPT_KEYS:
        if key in row:
            text = _string(key, row[key])
            given = _string("input", row.get("input") or "") if key == "instruction" else ""
            return [Message(role=Role.USER, content=f"{text}\n\n{given}" if given.strip() else text)]
    found = ", ".join(map(repr, row)) or "none"
    raise ValueError(
        f"no known instruction has these keys ({found}); expected 'messages', 'conversations', or one of "
        f"{', '.join(map(repr, _PROMPT_KEYS))}"
    )


def _text(row: Json) -> str:
    return _string("text", row["text"])


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}; expected a string")
    return value

"""Instructions: prompts that no one has answered yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from terselm.data.formats import message_to_object, messages_of
from terselm.data.jsonl import dump_object, read_objects
from terselm.data.schema import Message, check_prompt, check_text, prompt_hash
from terselm.errors import DataFormatError
from terselm.files import atomic_file


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A prompt for the target LLM, under a name of its own.

    Raises:
        ValueError: no messages, a prompt that ends with the assistant, or a blank text.
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None = None

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_prompt(self.messages)
        if self.category is not None:
            check_text("category", self.category)


def write_instructions(path: Path | str, instructions: Iterable[Instruction]) -> None:
    """Write instructions as JSON Lines, such as `read_instructions` reads; the file appears complete or not at all."""
    with atomic_file(Path(path)) as file:
        for one in instructions:
            category = {} if one.category is None else {"category": one.category}
            messages = [message_to_object(message) for message in one.messages]
            file.write(dump_object({"id": one.id, **category, "messages": messages}) + "\n")


def read_instructions(path: Path | str) -> list[Instruction]:
    """Read a JSON Lines file of ``{"id": …, "category": …, "messages": […]}``; the category may be left out.

    Raises:
        DataFormatError: no such file, none in it, a bad line, or an id or a prompt that came before.
    """
    path = Path(path)
    instructions = []
    seen: dict[str, int] = {}
    for number, value in read_objects(path):
        try:
            for key in ("id", "messages"):
                if key not in value:
                    raise ValueError(f"missing key {key!r}; expected 'id' and 'messages'")
            messages = messages_of(value["messages"])
            instruction = Instruction(id=value["id"], messages=messages, category=value.get("category"))
        except ValueError as error:
            raise DataFormatError(path, number, str(error)) from None
        for name in (f"id {instruction.id!r}", f"prompt {prompt_hash(messages)}"):
            if name in seen:
                raise DataFormatError(path, number, f"{name} is already that of line {seen[name]}")
            seen[name] = number
        instructions.append(instruction)
    if not instructions:
        raise DataFormatError(path, None, "holds no instructions")
    return instructions

"""What a target is to be asked or to score: prompts and texts from any source, less what must not be asked.

An instruction is a prompt that no one has answered yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from terselm.data.formats import RecordReader, detect_format, message_to_object, messages_of, turns_of
from terselm.data.rows import Json, dump_object, each_once, read_objects, read_rows
from terselm.data.schema import (
    Message,
    PlainText,
    Role,
    check_prompt,
    check_text,
    prompt_hash,
    record_text,
)
from terselm.errors import ConfigError, DataFormatError
from terselm.extras import first_line, need
from terselm.files import atomic_file, read_json

T = TypeVar("T")

OVERLAP = 13
"""Words in a row; as in GPT-3's appendix C (arXiv:2005.14165)."""
_LEAST_OVERLAP = 8  # a benchmark's text of fewer words than OVERLAP, but so many, counts as a whole
_SHINGLE = 3  # words
_PERMUTATIONS = 128
_PROMPT_KEYS = ("instruction", "prompt", "question", "text")


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
        ConfigError: a package is missing, or the data set cannot be loaded.
        DataFormatError: a bad row, an id that came before with another prompt, or no rows.
    """
    by_prompt: dict[str, Instruction] = {}
    names: dict[str, str] = {}
    rows = 0
    for number, row in read_rows(source):
        rows += 1
        instruction = _at(source, number, _instruction, row)
        prompt = prompt_hash(instruction.messages)
        if names.setdefault(instruction.id, prompt) != prompt:
            raise DataFormatError(source, number, f"id {instruction.id!r} came before with another prompt")
        by_prompt.setdefault(prompt, instruction)
    if not by_prompt:
        raise DataFormatError(source, None, "holds no instructions")
    return Loaded(instructions=list(by_prompt.values()), duplicates=rows - len(by_prompt))


def load_texts(source: str) -> list[PlainText]:
    """Read texts to score: rows with ``text``, or records of any format, which become prompt and response.

    Raises:
        ConfigError: a package is missing, or the data set cannot be loaded.
        DataFormatError: a bad row, an id that came before, or no rows.
    """
    return each_once(source, _texts(source), "texts")


def _texts(source: str) -> Iterator[tuple[int, PlainText]]:
    reader: RecordReader | None = None
    for number, row in read_rows(source):
        if "text" in row:
            yield number, PlainText(id=str(row.get("id", number)), text=_at(source, number, _text, row))
        else:
            reader = reader or RecordReader(_at(source, number, detect_format, row))
            yield number, record_text(_at(source, number, reader.record, row))


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


def without_near_duplicates(instructions: Sequence[Instruction], threshold: float) -> tuple[list[Instruction], int]:
    """Leave out instructions much like an earlier one; return what stays, and how many went.

    Two are much alike if the Jaccard similarity of their sets of three-word runs, as MinHash estimates it (Broder,
    1997), is at least ``threshold``. The longer a few-shot prompt's common examples, the more alike its questions
    look: give such prompts a high threshold, or none.

    Raises:
        ConfigError: the threshold is out of range, or datasketch is missing.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"near_duplicates is {threshold}; expected a similarity above 0 and below 1")
    datasketch = need("datasketch", "collect")
    # Rather look at too many than at too few: what it finds is compared below.
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    hashes: dict[str, Any] = {}
    kept = []
    for instruction in instructions:
        sketch = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([" ".join(run).encode() for run in _runs(_words(instruction), _SHINGLE)])
        near = index.query(sketch)
        if any(sketch.jaccard(hashes[name]) >= threshold for name in near):
            continue
        hashes[instruction.id] = sketch
        index.insert(instruction.id, sketch)
        kept.append(instruction)
    return kept, len(instructions) - len(kept)


def without_overlap(instructions: Sequence[Instruction], benchmarks: Iterable[Path]) -> tuple[list[Instruction], int]:
    """Leave out instructions that share thirteen words in a row with a benchmark; return what stays, and how many went.

    Args:
        benchmarks: JSON Lines, JSON, or any other text; every string in them counts.

    Raises:
        DataFormatError: a benchmark cannot be read, or holds no text of eight words.
    """
    runs: set[tuple[str, ...]] = set()
    for path in benchmarks:
        before = len(runs)
        for text in _strings(path):
            words = _split(text)
            if len(words) >= _LEAST_OVERLAP:
                runs.update(_runs(words, OVERLAP))
        if len(runs) == before:
            raise DataFormatError(path, None, f"holds no text of {_LEAST_OVERLAP} words that is not known already")
    lengths = {len(run) for run in runs}
    kept = [
        instruction
        for instruction in instructions
        if runs.isdisjoint(run for length in lengths for run in _runs(_words(instruction), length))
    ]
    return kept, len(instructions) - len(kept)


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
            extra = _string("input", row.get("input") or "") if key == "instruction" else ""
            return [Message(role=Role.USER, content=f"{text}\n\n{extra}" if extra.strip() else text)]
    keys = ", ".join(map(repr, row)) or "none"
    raise ValueError(
        f"no known instruction has these keys ({keys}); expected 'messages', 'conversations', or one of "
        f"{', '.join(map(repr, _PROMPT_KEYS))}"
    )


def _text(row: Json) -> str:
    return _string("text", row["text"])


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}; expected a string")
    return value


def _strings(path: Path) -> Iterator[str]:
    """Every text of a benchmark's file, however deep it stands."""
    if path.suffix == ".jsonl":
        for _, value in read_objects(path):
            yield from _inside(value)
    elif path.suffix == ".json":
        yield from _inside(read_json(path))
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataFormatError(path, None, f"cannot be read: {first_line(error)}") from None


def _inside(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item)


def _words(instruction: Instruction) -> list[str]:
    return _split("\n".join(message.content for message in instruction.messages))


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words; the whole where there are fewer."""
    for start in range(max(1, len(words) - length + 1)):
        yield tuple(words[start : start + length])

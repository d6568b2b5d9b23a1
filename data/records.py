"""Files of records, of what a target LLM was asked and what it answered: read, written, split, counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from terselm.data.formats import Format, RecordReader, detect_format, record_to_object
from terselm.data.rows import dump_object, read_rows
from terselm.data.schema import Generation, Message, Record, Role, Usage, prompt_hash, record_id
from terselm.errors import ConfigError, DataFormatError
from terselm.files import atomic_file

__all__ = [
    "Format",
    "Generation",
    "Message",
    "Record",
    "Role",
    "Usage",
    "prompt_hash",
    "read_records",
    "record_id",
    "split_by_instruction",
    "write_records",
]


def read_records(path: Path | str, format: Format | None = None) -> Iterator[Record]:
    """Read the records of a source, in order; keys that the format does not name are passed over.

    Args:
        path: a file, a folder or a hub id, as `read_rows` takes it.
        format: its format; by default told from the keys of the first row.

    Raises:
        ConfigError: a package is missing, or the data set cannot be loaded.
        DataFormatError: no such file, no records in it, or a bad line: broken JSON, a missing key, a wrong type, an
            empty text, an unknown role, an id that came before.
    """
    reader: RecordReader | None = None
    lines: dict[str, int] = {}
    for number, value in read_rows(path):
        try:
            reader = reader or RecordReader(format or detect_format(value))
            record = reader.record(value)
        except ValueError as error:
            where = f" (read as format {reader.format.value})" if reader else ""
            raise DataFormatError(path, number, f"{error}{where}") from None
        if record.id in lines:
            raise DataFormatError(path, number, f"id {record.id!r} is already that of line {lines[record.id]}")
        lines[record.id] = number
        yield record
    if not lines:
        raise DataFormatError(path, None, "holds no records")


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Write records as JSON Lines; the file appears complete or not at all.

    Raises:
        OSError: the disk is full or the folder is not writable; the file is then as it was.
    """
    with atomic_file(Path(path)) as file:
        for record in records:
            file.write(dump_object(record_to_object(record)) + "\n")


def split_by_instruction(records: Iterable[Record], held_out: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split into (training, held-out) records, each in the given order.

    The side depends on nothing but ``seed`` and the prompt: all answers to one prompt land on the same side, and a
    prompt stays on its side when others are added or taken away.

    Args:
        records: what to split.
        held_out: expected share of the prompts that is held out, in [0, 1); 0 holds out nothing.
        seed: another seed gives another split.

    Raises:
        ConfigError: ``held_out`` is out of range, or one side would be empty.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is {held_out}; expected a share of at least 0 and below 1")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        prompt = prompt_hash(record.messages)
        sides[is_held_out(prompt, held_out, seed)].append(record)
    refuse_empty_side(len(sides[0]), len(sides[1]), held_out, seed)
    return sides


def is_held_out(prompt: str, held_out: float, seed: int) -> bool:
    """The side of a prompt, by its hash, as `split_by_instruction` decides it."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < held_out


def refuse_empty_side(training: int, held_out_records: int, held_out: float, seed: int) -> None:
    """Raise ConfigError if a side of the split holds no records."""
    if not training or (held_out > 0 and not held_out_records):
        empty = "held-out" if training else "training"
        raise ConfigError(
            f"held_out={held_out} with seed {seed} leaves no {empty} records out of {training + held_out_records}; "
            "change held_out or add prompts"
        )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of numbers, such as lengths: the mean, the median and the 95th percentile."""

    mean: float
    median: float
    p95: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class RecordStatistics:
    """Counts of a file of records.

    Attributes:
        prompts: distinct ones.
        with_origin: records that say where they came from; the counts below are theirs.
        models, finish_reasons: records of each.
        temperatures: records at each; ``none`` where it was not set.
    """

    records: int
    prompts: int
    turns: dict[int, int]
    categories: dict[str, int]
    prompt_characters: Spread
    response_characters: Spread
    with_origin: int
    models: dict[str, int]
    finish_reasons: dict[str, int]
    temperatures: dict[str, int]
    prompt_tokens: int
    completion_tokens: int


def statistics(records: Iterable[Record]) -> RecordStatistics:
    """Count; the file must hold a record."""
    listed = list(records)
    made = [record.generation for record in listed if record.generation is not None]
    return RecordStatistics(
        records=len(listed),
        prompts=len({prompt_hash(record.messages) for record in listed}),
        turns=_counts(len(record.messages) for record in listed),
        categories=_counts(record.category for record in listed if record.category is not None),
        prompt_characters=_spread([sum(len(m.content) for m in record.messages) for record in listed]),
        response_characters=_spread([len(record.response) for record in listed]),
        with_origin=len(made),
        models=_counts(generation.model for generation in made),
        finish_reasons=_counts(generation.finish_reason for generation in made),
        temperatures=_counts(str(generation.parameters.get("temperature", "none")) for generation in made),
        prompt_tokens=sum(generation.usage.prompt_tokens for generation in made),
        completion_tokens=sum(generation.usage.completion_tokens for generation in made),
    )


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(values).most_common())


def _spread(values: list[int]) -> Spread:
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    return Spread(mean=round(fmean(values), 1), median=cuts[9], p95=cuts[18], largest=max(values))

"""Rows of any source: JSON Lines, JSON, CSV, Parquet, a folder of a data set, or a hub id.

What is wrong with a row is said with its file and its number: in JSON Lines and CSV the number of the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from terselm.errors import ConfigError, DataFormatError
from terselm.extras import first_line, need

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Json = dict[str, Any]


class HasId(Protocol):
    """What rows become that are known by an id."""

    @property
    def id(self) -> str: ...


Identified = TypeVar("Identified", bound=HasId)

HUB = "hub:"
ROWS_AT_ONCE = 1024  # of Parquet


def read_rows(source: str | Path) -> Iterator[tuple[int, Json]]:
    """Yield (number from 1, row) of a source.

    Values that are absent in the files' way (null in Parquet and data sets, nothing in CSV) are left out.

    Args:
        source: a file, its format told by its suffix (``.parquet``, ``.csv``, ``.json``, else JSON Lines); a folder
            that `datasets` can load; or ``hub:OWNER/NAME``, with ``#SPLIT`` and ``:CONFIG`` before that if there are
            several.

    Raises:
        ConfigError: a package is missing, or the data set cannot be loaded.
        DataFormatError: the file cannot be read.
    """
    name, path = str(source), Path(source)
    if name.startswith(HUB):
        return _dataset(name.removeprefix(HUB))
    if Path(name.partition("#")[0]).is_dir():
        return _dataset(name)
    match path.suffix.lower():
        case ".parquet":
            return _parquet(path)
        case ".csv":
            return _csv(path)
        case ".json":
            return _json(path)
        case _:
            return read_objects(path)


def read_objects(path: Path) -> Iterator[tuple[int, Json]]:
    """Yield (1-based line number, object) for each line of JSON Lines that is not blank.

    Lines end at LF alone, so that other Unicode line separators may stand inside a string.

    Raises:
        DataFormatError: the file cannot be read, or a line is not UTF-8, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_object(path, number, line)
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None


def each_once(source: str | Path, items: Iterable[tuple[int, Identified]], what: str) -> list[Identified]:
    """What the rows of a source became, in order.

    Args:
        items: number of the row, and what it became.
        what: these are, for complaints.

    Raises:
        DataFormatError: an id that came before, or no rows.
    """
    found: dict[str, Identified] = {}
    for number, item in items:
        if item.id in found:
            raise DataFormatError(source, number, f"id {item.id!r} came before")
        found[item.id] = item
    if not found:
        raise DataFormatError(source, None, f"holds no {what}")
    return list(found.values())


def parse_object(path: Path, number: int, line: bytes) -> Json:
    """The JSON object on a line.

    Raises:
        DataFormatError: the line is not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataFormatError(path, number, f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            value = []
        else:
            raise DataFormatError(path, number, f"broken JSON at character {error.pos + 1}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataFormatError(path, number, f"broken JSON: {error}") from None
    if isinstance(value, list):
        raise DataFormatError(
            path, number, "a JSON array; expected one JSON object a line (jq -c '.[]' FILE.json > FILE.jsonl makes it)"
        )
    if not isinstance(value, dict):
        raise DataFormatError(path, number, f"a JSON {type(value).__name__}; expected an object in braces")
    return value


def dump_object(value: Json) -> str:
    """One line, without its line end; text stays readable (no ASCII escapes)."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@contextmanager
def open_parquet(path: Path) -> Iterator[ParquetFile]:
    """An open Parquet file; errors inside the block that come of the file are turned into ours.

    Raises:
        ConfigError: pyarrow is not installed.
        DataFormatError: the file cannot be read.
    """
    parquet = need("pyarrow.parquet", "collect")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, need("pyarrow", "collect").ArrowException) as error:
        raise DataFormatError(path, None, f"cannot be read as Parquet: {first_line(error)}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Json]]:
    number = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}


def _csv(path: Path) -> Iterator[tuple[int, Json]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataFormatError(path, reader.line_num, "has another number of fields than the header")
                yield reader.line_num, {name: value for name, value in row.items() if value != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(path, None, f"cannot be read as CSV: {first_line(error)}") from None


def _json(path: Path) -> Iterator[tuple[int, Json]]:
    """An array of objects, as alpaca and sharegpt come, bare or as ``examples`` of an object, as BIG-Bench Hard comes;
    or JSON Lines under the wrong name."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        yield from read_objects(path)
        return
    if isinstance(value, dict) and isinstance(value.get("examples"), list):
        value = value["examples"]
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        if not isinstance(row, dict):
            raise DataFormatError(path, number, f"item {number} is {type(row).__name__}; expected an object")
        yield number, row


def _dataset(name: str) -> Iterator[tuple[int, Json]]:
    datasets = need("datasets", "train")
    name, _, split = name.partition("#")
    config = None
    if not Path(name).is_dir():
        name, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # of the hub's client, of the file formats, of whatever the data set is made of
        raise ConfigError(
            f"data set {name!r} cannot be loaded ({first_line(error)}); check the name, or give a local file instead"
        ) from None
    if not split and len(splits) > 1 and "train" not in splits:
        raise ConfigError(f"data set {name!r} has splits {', '.join(splits)}; name one: {name}#{next(iter(splits))}")
    split = split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise ConfigError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}")
    rows = enumerate(splits[split], start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataFormatError(name, None, f"cannot be read as a data set: {first_line(error)}") from None
        yield number, {key: value for key, value in row.items() if value is not None}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")

"""The rows of a bulk file in and out, as JSON Lines; Parquet is next door."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from terselm.compress.bulk.rows import passed_through
from terselm.data.rows import Json, parse_object
from terselm.errors import ConfigError, DataFormatError

_JSONL = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)

Results = Callable[[int], Json | None]
"""What the row of a number got; None for one that was rejected."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row as it was read.

    Attributes:
        number: 1-based; in JSON Lines the number of the line.
        content: the line, or the values of a Parquet row.
    """

    path: Path
    number: int
    content: bytes | Json

    def values(self) -> Json:
        """Raises `DataFormatError` for a line that is not a JSON object."""
        if isinstance(self.content, bytes):
            return parse_object(self.path, self.number, self.content)
        return self.content

    def for_display(self) -> Json | str:
        """The row such that JSON can hold it, come what may."""
        if isinstance(self.content, bytes):
            try:
                values = self.values()
                dump_row(values)
                return values
            except (DataFormatError, ValueError, RecursionError):
                return self.content.decode("utf-8", errors="replace").rstrip("\r\n")
        shown: Json = json.loads(json.dumps(self.content, default=str), parse_constant=str)
        return shown


class Source(ABC):
    """A file of rows.

    Attributes:
        digest: SHA-256 of its content.
        count: of rows.
    """

    path: Path
    digest: str
    count: int

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows, in order."""


class Output(ABC):
    """A way to write results."""

    @abstractmethod
    def check(self, row: Json) -> None:
        """Raise ValueError or TypeError for a row whose other values could not be written."""

    @abstractmethod
    def write(self, file: TextIO, results: Results) -> None:
        """Write every row that has a result, in order, into an empty file."""


class JsonlSource(Source):
    """JSON Lines; blank lines are passed over.

    Raises:
        DataFormatError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        digest, self.count = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    self.count += bool(line.strip())
        except OSError as error:
            raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None
        self.digest = digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(path=self.path, number=number, content=line)


class JsonlOutput(Output):
    """JSON Lines: the keys that are passed through, then those of the result."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def check(self, row: Json) -> None:
        dump_row(passed_through(row))

    def write(self, file: TextIO, results: Results) -> None:
        for row in self._source.rows():
            if (result := results(row.number)) is not None:
                file.write(dump_row(passed_through(row.values()) | result) + "\n")


def open_source(path: Path) -> Source:
    """The file of rows at ``path``, by the ending of its name.

    Raises:
        ConfigError: another ending; or Parquet without pyarrow.
        DataFormatError: it cannot be read.
    """
    if _is_parquet(path):
        from terselm.compress.bulk.parquet import ParquetSource

        return ParquetSource(path)
    return JsonlSource(path)


def open_output(path: Path, source: Source) -> Output:
    """How to write the results for ``source`` to ``path``, by the ending of its name.

    Raises:
        ConfigError: another ending; Parquet without pyarrow; or values that a Parquet column cannot hold.
    """
    if _is_parquet(path):
        from terselm.compress.bulk.parquet import ParquetOutput

        return ParquetOutput(source)
    return JsonlOutput(source)


def dump_row(row: Json) -> str:
    """One line of JSON.

    Raises:
        ValueError: a number that is infinite or not a number.
        TypeError: a value that has no form in JSON, such as bytes.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_text)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can express
        return json.dumps(row, allow_nan=False, default=_text)
    return line


def _text(value: Any) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} has no form in JSON; write a .parquet file instead")


def _is_parquet(path: Path) -> bool:
    if (suffix := path.suffix.lower()) not in (*_JSONL, *_PARQUET):
        raise ConfigError(
            f"{path} is neither JSON Lines nor Parquet; expected a name in {', '.join(_JSONL + _PARQUET)}"
        )
    return suffix in _PARQUET

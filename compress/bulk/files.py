"""The rows of a bulk file in and out: JSON Lines and Parquet. pyarrow is imported on first use."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from terselm.compress.bulk.rows import READ_KEYS, RESULT_KEYS, passed_through
from terselm.data.jsonl import Json, parse_object
from terselm.errors import ConfigError, DataFormatError
from terselm.extras import first_line, need

_JSONL = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)

_ROWS_AT_ONCE = 1024  # of Parquet

Results = Callable[[int], Json | None]
"""What the row of a number got; None for one that was rejected."""


def open_source(path: Path) -> RowSource:
    """The file of rows at ``path``, by the ending of its name.

    Raises:
        ConfigError: another ending; or Parquet without pyarrow.
        DataFormatError: it cannot be read.
    """
    if _is_parquet(path):
        return ParquetSource(path)
    return JsonlSource(path)


def open_output(path: Path, source: RowSource) -> Output:
    """How to write the results for ``source`` to ``path``, by the ending of its name.

    Raises:
        ConfigError: another ending; Parquet without pyarrow; or values that a Parquet column cannot hold.
    """
    if _is_parquet(path):
        return ParquetOutput(source)
    return JsonlOutput(source)


def _is_parquet(path: Path) -> bool:
    if (suffix := path.suffix.lower()) not in (*_JSONL, *_PARQUET):
        raise ConfigError(
            f"{path} is neither JSON Lines nor Parquet; expected a name in {', '.join(_JSONL + _PARQUET)}"
        )
    return suffix in _PARQUET


@dataclass(frozen=True, kw_only=True)
class SourceRow:
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


class RowSource(ABC):
    """A file of rows.

    Attributes:
        digest: SHA-256 of its content.
        count: of rows.
    """

    path: Path
    digest: str
    count: int

    @abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """All rows, in order."""


class Output(ABC):
    """A way to write results."""

    @abstractmethod
    def check(self, row: Json) -> None:
        """Raise ValueError or TypeError for a row whose other values could not be written."""

    @abstractmethod
    def write(self, file: BinaryIO, results: Results) -> None:
        """Write every row that has a result, in order, into an empty file."""


class JsonlSource(RowSource):
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

    def rows(self) -> Iterator[SourceRow]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield SourceRow(path=self.path, number=number, content=line)


class JsonlOutput(Output):
    """JSON Lines: the keys that are passed through, then those of the result."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def check(self, row: Json) -> None:
        dump_row(passed_through(row))

    def write(self, file: BinaryIO, results: Results) -> None:
        for row in self._source.rows():
            if (result := results(row.number)) is not None:
                file.write(dump_row(passed_through(row.values()) | result).encode() + b"\n")


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


class ParquetSource(RowSource):
    """A Parquet file.

    Raises:
        ConfigError: pyarrow is missing, or a column bears a name that the result needs.
        DataFormatError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parquet = need("pyarrow.parquet", "collect")
        with self._readable():
            with path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
            with parquet.ParquetFile(path) as file:
                self.count: int = file.metadata.num_rows
                self.schema: Any = file.schema_arrow
        if taken := [name for name in self.schema.names if name in RESULT_KEYS]:
            raise ConfigError(f"{path} has a column {taken[0]!r} already, which the result needs; rename it")

    def rows(self) -> Iterator[SourceRow]:
        number = 0
        for batch in self.batches():
            for values in batch.to_pylist():
                number += 1
                yield SourceRow(path=self.path, number=number, content=values)

    def batches(self) -> Iterator[Any]:
        """All rows, as record batches."""
        with self._readable(), need("pyarrow.parquet", "collect").ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, need("pyarrow", "collect").ArrowException) as error:
            raise DataFormatError(self.path, None, f"cannot be read as Parquet: {first_line(error)}") from None


class ParquetOutput(Output):
    """Parquet: the columns that are passed through, then those of the result.

    Columns of a Parquet source keep their types. Those of JSON Lines get types that hold all values of the file.

    Raises:
        ConfigError: pyarrow is missing, or there are no such types.
    """

    def __init__(self, source: RowSource) -> None:
        self._source = source
        arrow = need("pyarrow", "collect")
        if isinstance(source, ParquetSource):
            # Without the file's metadata, which describe the columns that there were.
            self._schema = arrow.schema([field for field in source.schema if field.name not in READ_KEYS])
        else:
            self._schema = _infer(source)
        whole, text = arrow.int64(), arrow.string()
        self._results = arrow.schema(
            zip(RESULT_KEYS, (text, whole, whole, arrow.float64(), arrow.list_(whole)), strict=True)
        )

    def check(self, row: Json) -> None:
        """Nothing to do: a file whose values do not fit is refused as a whole."""

    def write(self, file: BinaryIO, results: Results) -> None:
        arrow = need("pyarrow", "collect")
        schema = arrow.unify_schemas([self._schema, self._results])
        with need("pyarrow.parquet", "collect").ParquetWriter(file, schema) as writer:
            for numbers, columns in self._columns():
                outcomes = [results(number) for number in numbers]
                there = arrow.array([result is not None for result in outcomes], type=arrow.bool_())
                kept = {name: column.filter(there) for name, column in columns.items()}
                for field in self._results:
                    values = [result[field.name] for result in outcomes if result is not None]
                    kept[field.name] = arrow.array(values, type=field.type)
                writer.write_table(arrow.table(kept, schema=schema))

    def _columns(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The numbers of some rows, and their columns that are passed through."""
        if isinstance(self._source, ParquetSource):
            begin = 1
            for batch in self._source.batches():
                yield list(range(begin, begin + batch.num_rows)), {n: batch.column(n) for n in self._schema.names}
                begin += batch.num_rows
        else:
            for rows in _chunks(self._source):
                arrays = {field.name: _array([row.get(field.name) for _, row in rows], field) for field in self._schema}
                yield [number for number, _ in rows], arrays


def _infer(source: RowSource) -> Any:
    """A schema for what rows of JSON Lines pass through; every value has been converted to it once."""
    arrow = need("pyarrow", "collect")
    types: dict[str, Any] = {}
    name = ""
    try:
        for rows in _chunks(source):
            for name in dict.fromkeys(key for _, row in rows for key in row):
                here = arrow.schema([(name, arrow.array([row.get(name) for _, row in rows]).type)])
                before = arrow.schema([(name, types.get(name, arrow.null()))])
                types[name] = arrow.unify_schemas([before, here], promote_options="permissive").field(name).type
        schema = arrow.schema(types.items())
        for name in types:
            with need("pyarrow.parquet", "collect").ParquetWriter(
                arrow.BufferOutputStream(), arrow.schema([schema.field(name)])
            ):
                pass  # not every type of Arrow is one of Parquet
        for rows in _chunks(source):
            for name in types:
                _array([row.get(name) for _, row in rows], schema.field(name))
    except (arrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"the key {name!r} of {source.path} cannot become a Parquet column ({first_line(error)}); write a .jsonl "
            "file instead"
        ) from None
    return schema


def _array(values: list[Any], field: Any) -> Any:
    return need("pyarrow", "collect").array(values, type=field.type)


def _chunks(source: RowSource) -> Iterator[list[tuple[int, Json]]]:
    """Numbers of the rows that can be read, with what they pass through."""
    readable = _readable_rows(source)
    while chunk := list(islice(readable, _ROWS_AT_ONCE)):
        yield chunk


def _readable_rows(source: RowSource) -> Iterator[tuple[int, Json]]:
    for row in source.rows():
        try:
            values = passed_through(row.values())
        except DataFormatError:  # it will be set aside
            continue
        yield row.number, {key: value for key, value in values.items() if key not in RESULT_KEYS}

"""The rows of a bulk file in and out, as Parquet. pyarrow is imported on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from terselm.compress.bulk.files import Output, Results, Row, Source
from terselm.compress.bulk.rows import READ_KEYS, RESULT_KEYS, passed_through
from terselm.data.rows import Json
from terselm.errors import ConfigError, DataFormatError

_ROWS_AT_ONCE = 1024


class ParquetSource(Source):
    """A Parquet file.

    Raises:
        ConfigError: pyarrow is missing, or a column bears a name that the result needs.
        DataFormatError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parquet = _pyarrow("pyarrow.parquet")
        with self._readable():
            with path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
            with parquet.ParquetFile(path) as file:
                self.count: int = file.metadata.num_rows
                self.schema: Any = file.schema_arrow
        if taken := [name for name in self.schema.names if name in RESULT_KEYS]:
            raise ConfigError(f"{path} has a column {taken[0]!r} already, which the result needs; rename it")

    def rows(self) -> Iterator[Row]:
        number = 0
        for batch in self.batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(path=self.path, number=number, content=values)

    def batches(self) -> Iterator[Any]:
        """All rows, as record batches."""
        with self._readable(), _pyarrow("pyarrow.parquet").ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, _pyarrow("pyarrow").ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
            raise DataFormatError(self.path, None, f"cannot be read as Parquet: {reason}") from None


class ParquetOutput(Output):
    """Parquet: the columns that are passed through, then those of the result.

    Columns of a Parquet source keep their types. Those of JSON Lines get types that hold all values of the file.

    Raises:
        ConfigError: pyarrow is missing, or there are no such types.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        arrow = _pyarrow("pyarrow")
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

    def write(self, file: TextIO, results: Results) -> None:
        arrow = _pyarrow("pyarrow")
        schema = arrow.unify_schemas([self._schema, self._results])
        with _pyarrow("pyarrow.parquet").ParquetWriter(file.buffer, schema) as writer:
            for numbers, columns in self._columns():
                found = [results(number) for number in numbers]
                there = arrow.array([result is not None for result in found], type=arrow.bool_())
                kept = {name: column.filter(there) for name, column in columns.items()}
                for field in self._results:
                    values = [result[field.name] for result in found if result is not None]
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


def _infer(source: Source) -> Any:
    """A schema for what rows of JSON Lines pass through; every value has been converted to it once."""
    arrow = _pyarrow("pyarrow")
    types: dict[str, Any] = {}
    name = ""
    try:
        for rows in _chunks(source):
            for name in dict.fromkeys(key for _, row in rows for key in row):
                found = arrow.schema([(name, arrow.array([row.get(name) for _, row in rows]).type)])
                known = arrow.schema([(name, types.get(name, arrow.null()))])
                types[name] = arrow.unify_schemas([known, found], promote_options="permissive").field(name).type
        schema = arrow.schema(types.items())
        for name in types:
            with _pyarrow("pyarrow.parquet").ParquetWriter(
                arrow.BufferOutputStream(), arrow.schema([schema.field(name)])
            ):
                pass  # not every type of Arrow is one of Parquet
        for rows in _chunks(source):
            for name in types:
                _array([row.get(name) for _, row in rows], schema.field(name))
    except (arrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"the key {name!r} of {source.path} cannot become a Parquet column ({reason}); write a .jsonl file instead"
        ) from None
    return schema


def _array(values: list[Any], field: Any) -> Any:
    return _pyarrow("pyarrow").array(values, type=field.type)


def _chunks(source: Source) -> Iterator[list[tuple[int, Json]]]:
    """Numbers of the rows that can be read, with what they pass through."""
    readable = _readable_rows(source)
    while chunk := list(islice(readable, _ROWS_AT_ONCE)):
        yield chunk


def _readable_rows(source: Source) -> Iterator[tuple[int, Json]]:
    for row in source.rows():
        try:
            values = passed_through(row.values())
        except DataFormatError:  # it will be set aside
            continue
        yield row.number, {key: value for key, value in values.items() if key not in RESULT_KEYS}


def _pyarrow(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError("Parquet needs pyarrow; run: pip install 'terselm[train]'") from None

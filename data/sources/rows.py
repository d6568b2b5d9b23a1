"""Rows of any source: JSON Lines, JSON, CSV, Parquet, a folder of a data set, or a hub id."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terselm.data.jsonl import Json, read_objects
from terselm.errors import ConfigError, DataFormatError

HUB = "hub:"
_ROWS_AT_ONCE = 1024


def read_rows(source: str) -> Iterator[tuple[int, Json]]:
    """Yield (number from 1, row) of a source.

    Args:
        source: a file, its format told by its suffix (``.parquet``, ``.csv``, ``.json``, else JSON Lines); a folder
            that `datasets` can load; or ``hub:OWNER/NAME``, with ``#SPLIT`` and ``:CONFIG`` before that if there are
            several.

    Raises:
        ConfigError: a package is missing, or the data set cannot be had.
        DataFormatError: the file cannot be read.
    """
    path = Path(source)
    if source.startswith(HUB):
        return _dataset(source.removeprefix(HUB))
    if Path(source.partition("#")[0]).is_dir():
        return _dataset(source)
    match path.suffix.lower():
        case ".parquet":
            return _parquet(path)
        case ".csv":
            return _csv(path)
        case ".json":
            return _json(path)
        case _:
            return read_objects(path)


def _parquet(path: Path) -> Iterator[tuple[int, Json]]:
    from terselm.data.logprobs import parquet

    reader = parquet()
    from pyarrow import ArrowException

    number = 0
    try:
        with reader.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (OSError, ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise DataFormatError(path, None, f"cannot be read as Parquet: {reason}") from None


def _csv(path: Path) -> Iterator[tuple[int, Json]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataFormatError(path, reader.line_num, "has another number of fields than the header")
                yield reader.line_num, {name: value for name, value in row.items() if value != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataFormatError(path, None, f"cannot be read as CSV: {reason}") from None


def _json(path: Path) -> Iterator[tuple[int, Json]]:
    """One array of objects, as alpaca and sharegpt come; or JSON Lines under the wrong name."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None
    except ValueError:
        yield from read_objects(path)
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        if not isinstance(value, dict):
            raise DataFormatError(path, number, f"item {number} is {type(value).__name__}; expected an object")
        yield number, value


def _dataset(name: str) -> Iterator[tuple[int, Json]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError("data sets need the datasets package; run: pip install 'terselm[train]'") from None

    name, _, split = name.partition("#")
    config = None
    if not Path(name).is_dir():
        name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # of the hub's client, of the file formats, of whatever the data set is made of
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"data set {name!r} cannot be loaded: {first}") from None
    if not split and len(found) > 1 and "train" not in found:
        raise ConfigError(f"data set {name!r} has splits {', '.join(found)}; name one: {name}#{next(iter(found))}")
    split = split or ("train" if "train" in found else next(iter(found)))
    if split not in found:
        raise ConfigError(f"data set {name!r} has no split {split!r}; it has {', '.join(found)}")
    rows = enumerate(found[split], start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise DataFormatError(name, None, f"cannot be read as a data set: {first}") from None
        yield number, {key: value for key, value in row.items() if value is not None}

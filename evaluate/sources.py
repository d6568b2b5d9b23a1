"""Rows of a data set: from local files, or from the hub by its id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terselm.data.rows import read_objects
from terselm.errors import ConfigError, DataFormatError

Row = dict[str, Any]


def rows(path: Path | None, hub_id: str, config: str | None, split: str) -> list[tuple[str, Row]]:
    """(where, row) of a local ``.jsonl`` or ``.json`` file, or of a hub data set.

    Args:
        path: the local file; None for the hub.

    Raises:
        DataFormatError: the file cannot be read.
        ConfigError: the hub did not give the data set.
    """
    return list(_local(path)) if path is not None else _hub(hub_id, config, split)


def _local(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".json":
        for number, row in enumerate(read_json_list(path), start=1):
            yield f"{path}, row {number}", row
        return
    for line, row in read_objects(path):
        yield f"{path}:{line}", row


def read_json_list(path: Path) -> list[Row]:
    """A JSON array of objects, or an object whose ``examples`` is one (the form of BIG-Bench Hard).

    Raises:
        DataFormatError: it is not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataFormatError(path, None, f"broken JSON: {error}") from None
    listed = value.get("examples") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise DataFormatError(path, None, "expected a JSON array of objects, or an object with one under 'examples'")
    return listed


def _hub(hub_id: str, config: str | None, split: str) -> list[tuple[str, Row]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"reading {hub_id} from the hub needs datasets; run: pip install 'terselm[train]', or give local files"
        ) from None
    try:
        found = load_dataset(hub_id, config, split=split)
    except Exception as error:  # of whichever library the hub's client is built on
        raise ConfigError(
            f"the hub did not give {hub_id} ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
            "give local files instead"
        ) from None
    return [(f"{hub_id}, {split} row {number}", dict(row)) for number, row in enumerate(found)]


def text_of(where: str, row: Row, key: str) -> str:
    """A row's text under ``key``.

    Raises:
        ConfigError: there is none.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: expected a text under {key!r}, got {value!r}")
    return value

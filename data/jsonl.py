"""JSON Lines: one JSON object a line, with the line number in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from terselm.errors import DataFormatError

Json = dict[str, Any]


def read_objects(path: Path) -> Iterator[tuple[int, Json]]:
    """Yield (1-based line number, object) for each line that is not blank.

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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")

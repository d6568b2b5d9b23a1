"""An append-only file that outlives its writer: what was committed is there after kill -9, once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from terselm.data.jsonl import Json, dump_object, parse_object


class Journal:
    """JSON objects, one a line, committed to disk in groups.

    Only for one writer at a time; the caller holds a lock.

    Attributes:
        entries: what the file held when it was opened.

    Raises:
        DataFormatError: a line other than a torn last one is broken.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        try:
            self._file.seek(0)
            lines = self._file.read().split(b"\n")
            # A write that was cut off has no line end; what it held was never committed.
            if lines[-1]:
                self._file.truncate(self._file.tell() - len(lines[-1]))
            self.entries = [parse_object(path, number, line) for number, line in enumerate(lines[:-1], start=1)]
        except BaseException:
            self._file.close()
            raise

    def append(self, entries: Iterable[Json]) -> None:
        """Write entries and flush them to disk."""
        self._file.write(b"".join(dump_object(entry).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Delete the file, once its entries are safe elsewhere."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

"""An append-only file that outlives its writer: what was committed is there after kill -9, once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from terselm.data.rows import Json, dump_object, parse_object


class JournalReader:
    """Follows a journal, which another process may be writing.

    A write that was cut off, or is under way, has no line end; what it holds is not committed and is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = 0
        self._end = 0  # bytes that were read

    def new(self) -> Iterator[tuple[int, Json]]:
        """Yield (offset in bytes, entry) of each line that was committed since the last call.

        Raises:
            DataFormatError: a committed line is broken.
        """
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._lines += 1
                entry = parse_object(self.path, self._lines, line)
                self._end += len(line)
                yield self._end - len(line), entry


class Journal:
    """JSON objects, one a line, committed to disk in groups.

    Only for one writer at a time; the caller holds a lock. A torn last line is removed on opening.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        try:
            self._file.seek(0)
            self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))
        except BaseException:
            self._file.close()
            raise

    @property
    def entries(self) -> list[Json]:
        """What is committed.

        Raises:
            DataFormatError: a committed line is broken.
        """
        return [entry for _, entry in JournalReader(self.path).new()]

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

"""What a bulk run has done so far, on disk beside its output: one journal for each of its processes.

The first line of a journal says which run it belongs to; every other line is what became of one row. Nothing is
assumed about which journal a row stands in, so a run may be taken up with another number of processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from terselm.data.journal import Journal, JournalReader
from terselm.data.rows import Json
from terselm.errors import ConfigError, DataFormatError
from terselm.files import lock_of


class Journals:
    """The journals of all processes that write, or wrote, to ``out``.

    Args:
        out: the output that they will make.
        binding: what the run depends on, as plain values; another run's journals are refused.
        processes: that write now.

    Attributes:
        rejected: numbers of the rows that are done, but without a result.
    """

    def __init__(self, out: Path, binding: Mapping[str, Any], processes: int) -> None:
        self._out = out
        self._binding = json.loads(json.dumps(binding))
        ours = re.compile(re.escape(out.name) + r"\.journal(-\d+)?")
        paths = {path for path in out.parent.iterdir() if ours.fullmatch(path.name)}
        paths |= {self.path(index) for index in range(processes)}
        self._readers = {path: JournalReader(path) for path in sorted(paths)}
        self._bound: set[Path] = set()
        self._places: dict[int, tuple[Path, int]] = {}
        self.rejected: set[int] = set()

    def path(self, process: int) -> Path:
        """The journal of a process."""
        return self._out.with_name(f"{self._out.name}.journal" + (f"-{process}" if process else ""))

    @contextmanager
    def writer(self, process: int) -> Iterator[Callable[[Iterable[Json]], None]]:
        """Yield a function that commits entries to the journal of a process."""
        path = self.path(process)
        head = [] if path in self._bound else [self._binding]  # with the first entries: without any, it binds nobody
        with Journal(path) as journal:

            def commit(entries: Iterable[Json]) -> None:
                journal.append([*head, *entries])
                head.clear()

            yield commit

    def refresh(self) -> None:
        """Read what has been committed since the last time.

        Raises:
            ConfigError: a journal belongs to another run.
            DataFormatError: one is damaged.
        """
        for path, reader in self._readers.items():
            with suppress(FileNotFoundError):  # not begun, or removed since all is done
                for offset, entry in reader.new():
                    if path not in self._bound:
                        self._check(path, entry)
                        self._bound.add(path)
                    elif isinstance(entry.get("line"), int) and ("result" in entry) != ("reason" in entry):
                        place = path, offset
                        if self._places.setdefault(entry["line"], place) == place and "reason" in entry:
                            self.rejected.add(entry["line"])
                    else:
                        raise DataFormatError(path, None, f"holds a line that is not an entry (at byte {offset})")

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        """Rows that are done."""
        return len(self._places)

    def sizes(self) -> list[int]:
        """Bytes of each journal."""
        return [path.stat().st_size if path.exists() else 0 for path in self._readers]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], Json]]:
        """Yield a function that gives the entry of a row."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in self._bound}

            def entry(number: int) -> Json:
                path, offset = self._places[number]
                files[path].seek(offset)
                outcome: Json = json.loads(files[path].readline())
                return outcome

            yield entry

    def remove(self) -> None:
        """Delete the journals, once the output holds what they say, and the locks of processes that were killed."""
        for path in self._readers:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                lock_of(path).unlink()

    def _check(self, path: Path, head: Json) -> None:
        if head == self._binding:
            return
        if head.keys() != self._binding.keys():
            raise DataFormatError(path, 1, f"not the head of a journal; remove {path} if it is not needed")
        differences = [
            "another input" if key == "input" else f"{key} {head[key]!r}, not {self._binding[key]!r}"
            for key in head
            if head[key] != self._binding[key]
        ]
        raise ConfigError(
            f"{path} is of an unfinished run with other settings ({'; '.join(differences)}); give those to finish it, "
            f"name another output, or remove {self._out}.journal* to begin anew"
        )

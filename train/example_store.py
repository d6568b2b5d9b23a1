"""Examples as columns of numbers in a folder, written in order and mapped, so that a set may be larger than memory."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from terselm.train.examples import Example, Guide, UnitLabels

_ABOUT = "columns.json"
_TOKENS = {"ids": "<i4", "counted": "?"}
_EXAMPLES = {"length": "<i4", "record": "<i8"}
_OPINIONS = {"words": "<i4", "nats": "<f4", "nat_count": "<i4"}
_LIKELIEST = {"top_ids": "<i4", "top_logprobs": "<f4"}
_LABELS = {"ends": "<i4", "values": "<f4", "unit_count": "<i4", "share": "<f8"}
_KINDS = {**_TOKENS, **_EXAMPLES, **_OPINIONS, **_LIKELIEST, **_LABELS}


class ExampleWriter:
    """Appends examples to the columns of a folder; a context that closes the files.

    Args:
        folder: an empty folder.
        guided: whether the examples hold the target's opinion.
        top_k: how many likeliest tokens that opinion names.
        labelled: whether some are of labelled prompts.
    """

    def __init__(self, folder: Path, *, guided: bool, top_k: int, labelled: bool = False) -> None:
        self._folder = folder
        self._top_k = top_k
        self._names = [*_TOKENS, *_EXAMPLES, *(_OPINIONS if guided else ())]
        self._names += _LIKELIEST if guided and top_k else ()
        self._names += _LABELS if labelled else ()
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> ExampleWriter:
        for name in self._names:
            self._files[name] = self._stack.enter_context((self._folder / name).open("wb"))
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()
        about = {"columns": self._names, "top_k": self._top_k}
        (self._folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")

    def append(self, examples: Iterable[Example]) -> None:
        for example in examples:
            columns = {
                "ids": example.ids,
                "counted": example.counted,
                "length": np.asarray([len(example)]),
                "record": np.asarray([example.record]),
            }
            if (guide := example.guide) is not None:
                columns |= {"words": guide.words, "nats": guide.nats, "nat_count": np.asarray([len(guide.nats)])}
                if guide.top_ids is not None and guide.top_logprobs is not None:
                    columns |= {"top_ids": guide.top_ids, "top_logprobs": guide.top_logprobs}
            labels = example.labels or _UNLABELLED
            columns |= {"ends": labels.ends, "values": labels.values, "share": np.asarray([labels.share])}
            columns["unit_count"] = np.asarray([len(labels.ends)])
            for name in self._names:
                self._files[name].write(np.ascontiguousarray(columns[name], dtype=_KINDS[name]).tobytes())


_UNLABELLED = UnitLabels(ends=np.zeros(0, dtype=np.int32), values=np.zeros(0, dtype=np.float32), share=0.0)


class _LazyExamples(Sequence[Example]):
    """Reads an example when it is asked for."""

    @abstractmethod
    def example(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(len(self))[index]
        return self.example(places) if isinstance(places, int) else [self.example(place) for place in places]


class ExampleStore(_LazyExamples):
    """What an `ExampleWriter` wrote.

    Attributes:
        lengths: ``(examples,)`` int64, tokens.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self._columns = {name: _mapped(folder / name) for name in about["columns"]}
        for name in _LIKELIEST.keys() & self._columns.keys():
            self._columns[name] = self._columns[name].reshape(-1, about["top_k"])
        self.lengths: NDArray[np.int64] = self._columns["length"].astype(np.int64)
        self._starts = _starts(self.lengths)
        if "nats" in self._columns:
            self._nat_starts = _starts(self._columns["nat_count"])
        if "ends" in self._columns:
            self._unit_starts = _starts(self._columns["unit_count"])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def counted(self) -> NDArray[np.int64]:
        """``(examples,)``: counted tokens of each."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self._columns["counted"], self._starts[:-1], dtype=np.int64)

    @property
    def labelled(self) -> int:
        """Examples with labelled units."""
        return int(np.count_nonzero(self._columns["unit_count"])) if "unit_count" in self._columns else 0

    def example(self, index: int) -> Example:
        tokens = slice(self._starts[index], self._starts[index + 1])
        return Example(
            ids=self._columns["ids"][tokens].astype(np.int64),
            counted=np.array(self._columns["counted"][tokens]),
            record=int(self._columns["record"][index]),
            guide=self._guide(index, tokens) if "nats" in self._columns else None,
            labels=self._labels(index) if "ends" in self._columns else None,
        )

    def _labels(self, index: int) -> UnitLabels | None:
        units = slice(self._unit_starts[index], self._unit_starts[index + 1])
        if units.start == units.stop:
            return None
        ends, values = (np.array(self._columns[name][units]) for name in ("ends", "values"))
        return UnitLabels(ends=ends, values=values, share=float(self._columns["share"][index]))

    def _guide(self, index: int, tokens: slice) -> Guide:
        part = {name: np.array(self._columns[name][tokens]) for name in _LIKELIEST if name in self._columns}
        nats = self._columns["nats"][self._nat_starts[index] : self._nat_starts[index + 1]]
        return Guide(words=np.array(self._columns["words"][tokens]), nats=np.array(nats), **part)


class StoredRow(_LazyExamples):
    """A packed row that reads its examples when it is asked for them."""

    def __init__(self, store: ExampleStore, places: Sequence[int]) -> None:
        self._store = store
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def example(self, index: int) -> Example:
        return self._store.example(self._places[index])


def _mapped(path: Path) -> NDArray[np.generic]:
    kind = np.dtype(_KINDS[path.name])
    if not path.stat().st_size:  # nothing can be mapped
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


def _starts(lengths: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

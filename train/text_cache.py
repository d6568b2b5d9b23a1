"""Tokenised texts on disk, by what they were made from: the first process that needs them makes them, all map them.

A folder of the cache holds ``training/`` and ``held_out/`` (columns of examples, so that a set may be larger than
memory), ``held_out.jsonl`` and ``held_out_labels.jsonl`` (their records and labelled prompts) and ``about.json``. It
may be removed at any time between runs; what no run has used for a month is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from terselm.data.formats import Format, RecordReader, record_to_object
from terselm.data.records import Record, is_held_out, prompt_hash, read_records
from terselm.data.rows import dump_object, read_objects
from terselm.data.utility import LabelledPrompt
from terselm.files import atomic_folder, remove_partials
from terselm.models import cache_folder
from terselm.train.examples import EncodedRecords, Encoding, Example, GuidanceSource, Guide, UnitLabels, encode_records
from terselm.train.labelled import documents_hash, encode_labelled, read_labelled
from terselm.train.run_folder import clear_disk_errors
from terselm.train.settings import LossOn, Template

_FORM = 1  # of the files; another number makes all of them anew
_LABELS_FORM = 1  # of those with labelled prompts
_AT_ONCE = 1000  # records
_KEPT_SECONDS = 30 * 24 * 3600
_COUNTS = ("split", "dropped", "tokens", "counted_tokens")  # of `EncodedRecords`
_OF_TRAINING = (*_COUNTS, "unguided", "unordered")

_ABOUT = "columns.json"
_TOKENS = {"ids": "<i4", "counted": "?"}
_EXAMPLES = {"length": "<i4", "record": "<i8"}
_OPINIONS = {"words": "<i4", "nats": "<f4", "nat_count": "<i4"}
_LIKELIEST = {"top_ids": "<i4", "top_logprobs": "<f4"}
_LABELS = {"ends": "<i4", "values": "<f4", "unit_count": "<i4", "share": "<f8"}
_KINDS = {**_TOKENS, **_EXAMPLES, **_OPINIONS, **_LIKELIEST, **_LABELS}


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """One file, folder or hub id.

    Attributes:
        name: as the user wrote it.
        times: how often an epoch sees each of its records; of a fraction, as many are drawn.
        fingerprint: changes with its content.
        labelled: whether it holds labelled prompts.
    """

    name: str
    times: float
    fingerprint: str
    labelled: bool = False


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What decides the content of a folder of the cache, but for the tokenizer and its encoding.

    Attributes:
        sources: of the records; how often they are seen decides nothing here.
        held_out: expected share of the prompts.
        seed: of the split.
        encoding: of the training text, without guidance.
        question_dropped: share of the labelled prompts that are read without their question.
        target: what the target is, so that another one makes other texts; empty without one.
        make_guidance: loads it; only called where the texts have to be made.
    """

    sources: Sequence[RecordSource]
    held_out: float
    seed: int
    encoding: Encoding
    question_dropped: float = 0.0
    target: str = ""
    make_guidance: Callable[[], GuidanceSource | None] = field(default=lambda: None)

    @property
    def key(self) -> str:
        encoding = self.encoding
        parts = {
            "form": _FORM,
            "sources": [source.fingerprint for source in self.sources],
            "split": [self.held_out, self.seed],
            "tokenizer": hashlib.sha256(encoding.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "encoding": [encoding.start_id, encoding.end_id, encoding.template, encoding.loss_on],
            "rows": [encoding.max_length, encoding.overlong],
            "target": [self.target, encoding.top_k],
        }
        if any(source.labelled for source in self.sources):
            parts["labels"] = [_LABELS_FORM, self.question_dropped]
        if encoding.template is Template.CHAT:
            tokenizer = encoding.tokenizer
            parts["chat"] = [str(tokenizer.chat_template), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class TokenisedTexts:
    """What a folder of the cache holds.

    Attributes:
        records: how many are trained on.
        targets: the models that wrote the responses, as far as the records say, or whose answers are labelled.
        label_targets: those whose answers are labelled.
        sizes: training examples of each source.
        store: of the training examples.
        training: its counts.
        held_out: encoded.
        held_out_records: their records.
        held_out_labels: held-out labelled prompts.
    """

    records: int
    targets: list[str]
    label_targets: list[str]
    sizes: list[int]
    store: ExampleStore
    training: EncodedRecords
    held_out: EncodedRecords
    held_out_records: list[Record]
    held_out_labels: list[LabelledPrompt]

    @property
    def labelled_examples(self) -> int:
        """How many examples are trained on that have units with utilities."""
        return self.store.labelled


def tokenised(request: TextRequest) -> TokenisedTexts:
    """From the cache, or made now; of several processes one makes it, while the others wait.

    Raises:
        ConfigError: a source cannot be read.
        DataFormatError: a bad row.
        CheckpointError: the cache cannot be written.
    """
    from filelock import FileLock

    kept = cache_folder() / "texts"
    folder = kept / request.key
    with clear_disk_errors(kept, "TERSELM_CACHE can name a folder elsewhere"):
        kept.mkdir(parents=True, exist_ok=True)
        with FileLock(kept / f"{request.key}.lock"):
            if not folder.is_dir():
                remove_partials(folder)
                for old in kept.iterdir():  # a run that still reads it keeps its files, as they are mapped
                    if old.is_dir() and time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                        shutil.rmtree(old, ignore_errors=True)
                with atomic_folder(folder) as partial:
                    _write(request, partial)
        os.utime(folder)
    return _read(folder)


def _write(request: TextRequest, folder: Path) -> None:
    held_out: list[Record] = []
    held_out_labels: list[LabelledPrompt] = []
    encoding = replace(request.encoding, guidance=request.make_guidance())
    counts = dict.fromkeys(("records", *_OF_TRAINING), 0)
    targets: set[str] = set()
    label_targets: set[str] = set()
    sizes = []
    (folder / "training").mkdir()
    labelled = any(source.labelled for source in request.sources)
    guided = encoding.guidance is not None
    with ExampleWriter(folder / "training", guided=guided, top_k=encoding.top_k, labelled=labelled) as writer:
        for source in request.sources:
            examples = 0
            parts = (
                _labelled_parts(source, request, encoding, held_out_labels, label_targets)
                if source.labelled
                else _record_parts(source, request, encoding, held_out, targets)
            )
            for read, encode in parts:
                encoded = encode(counts["records"])
                writer.append(encoded.examples)
                examples += len(encoded.examples)
                counts["records"] += read
                for name in _OF_TRAINING:
                    counts[name] += getattr(encoded, name)
            sizes.append(examples)
    about = {**counts, "targets": sorted(targets | label_targets), "label_targets": sorted(label_targets)}
    about |= {"sizes": sizes, "held_out": _write_held_out(request, held_out, folder)}
    write_lines(folder / "held_out_labels.jsonl", (label.to_json() for label in held_out_labels))
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


_Part = tuple[int, Callable[[int], EncodedRecords]]
"""How many records, and what encodes them where that many came before."""


def _record_parts(
    source: RecordSource, request: TextRequest, encoding: Encoding, held_out: list[Record], targets: set[str]
) -> Iterator[_Part]:
    """Records that are trained on; what is held out, and who wrote the responses, is noted."""
    training = _training_records(source, request, held_out)
    while records := list(islice(training, _AT_ONCE)):
        targets.update(record.generation.model for record in records if record.generation is not None)
        yield len(records), partial(encode_records, records, encoding)


def _labelled_parts(
    source: RecordSource, request: TextRequest, encoding: Encoding, held_out: list[LabelledPrompt], targets: set[str]
) -> Iterator[_Part]:
    """Labelled prompts that are trained on; what is held out, and whose answers they are, is noted."""
    labels: Iterator[LabelledPrompt] = read_labelled(source.name)
    while part := list(islice(labels, _AT_ONCE)):
        targets.update(label.target for label in part)
        sides: tuple[list[LabelledPrompt], list[LabelledPrompt]] = ([], held_out)
        for label in part:
            sides[is_held_out(documents_hash(label), request.held_out, request.seed)].append(label)
        yield (
            len(sides[0]),
            partial(encode_labelled, sides[0], encoding, dropped=request.question_dropped, seed=request.seed),
        )


def _training_records(source: RecordSource, request: TextRequest, held_out: list[Record]) -> Iterator[Record]:
    """Those that are not held out; the others are appended to ``held_out``."""
    for record in read_records(source.name):
        if is_held_out(prompt_hash(record.messages), request.held_out, request.seed):
            held_out.append(record)
        else:
            yield record


def _write_held_out(request: TextRequest, records: list[Record], folder: Path) -> dict[str, int]:
    encoding = replace(request.encoding, end_id=None, loss_on=LossOn.RESPONSE, every_turn=False)
    encoded = encode_records(records, encoding)
    (folder / "held_out").mkdir()
    with ExampleWriter(folder / "held_out", guided=False, top_k=0) as writer:
        writer.append(encoded.examples)
    write_lines(folder / "held_out.jsonl", map(record_to_object, records))
    return {name: getattr(encoded, name) for name in _COUNTS}


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, into a folder that appears whole or not at all."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(dump_object(value) + "\n" for value in values)


def _read(folder: Path) -> TokenisedTexts:
    about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    store = ExampleStore(folder / "training")
    counts = {name: about.get(name, 0) for name in _OF_TRAINING}
    reader = RecordReader(Format.RECORDS)
    labels = folder / "held_out_labels.jsonl"  # not there in folders of earlier versions
    return TokenisedTexts(
        records=about["records"],
        targets=about["targets"],
        label_targets=about.get("label_targets", []),
        sizes=about["sizes"],
        store=store,
        training=EncodedRecords(examples=store, **counts),
        held_out=EncodedRecords(examples=list(ExampleStore(folder / "held_out")), **about["held_out"]),
        held_out_records=[reader.record(value) for _, value in read_objects(folder / "held_out.jsonl")],
        held_out_labels=[LabelledPrompt.from_json(value) for _, value in read_objects(labels)]
        if labels.exists()
        else [],
    )


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

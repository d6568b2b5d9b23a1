"""Tokenised texts, kept by what they were made from: the first process that needs them makes them, all map them.

A folder of the cache holds ``training/`` and ``held_out/`` (columns of examples), ``held_out.jsonl`` (their records)
and ``about.json``. It may be removed at any time between runs; what no run has used for a month is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from terselm.data.formats import Format, RecordReader, record_to_object
from terselm.data.records import Record, is_held_out, prompt_hash, read_records
from terselm.data.rows import dump_object, read_objects
from terselm.files import atomic_folder, remove_partials
from terselm.models import cache_folder
from terselm.train.choices import LossOn
from terselm.train.examples import EncodedRecords, Encoding, encode_some
from terselm.train.guidance import Target
from terselm.train.saving import clear_disk_errors
from terselm.train.sources import Source
from terselm.train.store import ExampleStore, ExampleWriter

_FORM = 1  # of the files; another number makes all of them anew
_AT_ONCE = 1000  # records
_KEPT_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What decides the content of a folder of the cache, but for the tokenizer and its encoding.

    Attributes:
        sources: of the records; how often they are seen decides nothing here.
        held_out: expected share of the prompts.
        seed: of the split.
        encoding: of the training text, without a target.
        target: what the target is, so that another one makes other texts; empty without one.
        make_target: loads it; only called where the texts have to be made.
    """

    sources: list[Source]
    held_out: float
    seed: int
    encoding: Encoding
    target: str = ""
    make_target: Callable[[], Target | None] = field(default=lambda: None)

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
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class TokenisedTexts:
    """What a folder of the cache holds.

    Attributes:
        records: how many are trained on.
        targets: the models that wrote the responses, as far as the records say.
        sizes: training examples of each source.
        store: of the training examples.
        training: its counts.
        held_out: encoded.
        held_out_records: their records.
    """

    records: int
    targets: list[str]
    sizes: list[int]
    store: ExampleStore
    training: EncodedRecords
    held_out: EncodedRecords
    held_out_records: list[Record]


def tokenised(request: TextRequest) -> TokenisedTexts:
    """From the cache, or made now; of several processes one makes it, while the others wait.

    Raises:
        ConfigError: a source cannot be had.
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
                _remove_unused(kept)
                with atomic_folder(folder) as partial:
                    _write(request, partial)
        os.utime(folder)
    return _read(folder)


def _write(request: TextRequest, folder: Path) -> None:
    held_out: list[Record] = []
    encoding = replace(request.encoding, target=request.make_target())
    counts = {"records": 0, "split": 0, "dropped": 0, "tokens": 0, "counted_tokens": 0, "unguided": 0}
    targets: set[str] = set()
    sizes = []
    (folder / "training").mkdir()
    with ExampleWriter(folder / "training", guided=encoding.target is not None, top_k=encoding.top_k) as writer:
        for source in request.sources:
            examples = 0
            for some in _chunks(_training_records(source, request, held_out)):
                encoded = encode_some(some, encoding, first=counts["records"])
                writer.append(encoded.examples)
                examples += len(encoded.examples)
                counts["records"] += len(some)
                targets.update(record.generation.model for record in some if record.generation is not None)
                for name in ("split", "dropped", "tokens", "counted_tokens", "unguided"):
                    counts[name] += getattr(encoded, name)
            sizes.append(examples)
    about = {**counts, "targets": sorted(targets), "sizes": sizes}
    about["held_out"] = _write_held_out(request, held_out, folder)
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _training_records(source: Source, request: TextRequest, held_out: list[Record]) -> Iterator[Record]:
    """Those that are not held out; the others are appended to ``held_out``."""
    for record in read_records(source.name):
        if is_held_out(prompt_hash(record.messages), request.held_out, request.seed):
            held_out.append(record)
        else:
            yield record


def _write_held_out(request: TextRequest, records: list[Record], folder: Path) -> dict[str, int]:
    encoding = replace(request.encoding, end_id=None, loss_on=LossOn.RESPONSE)
    encoded = encode_some(records, encoding)
    (folder / "held_out").mkdir()
    with ExampleWriter(folder / "held_out", guided=False, top_k=0) as writer:
        writer.append(encoded.examples)
    lines = (dump_object(record_to_object(record)) + "\n" for record in records)
    with (folder / "held_out.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    names = ("split", "dropped", "tokens", "counted_tokens")
    return {name: getattr(encoded, name) for name in names}


def _read(folder: Path) -> TokenisedTexts:
    about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    store = ExampleStore(folder / "training")
    counts = {name: about[name] for name in ("split", "dropped", "tokens", "counted_tokens", "unguided")}
    reader = RecordReader(Format.RECORDS)
    return TokenisedTexts(
        records=about["records"],
        targets=about["targets"],
        sizes=about["sizes"],
        store=store,
        training=EncodedRecords(examples=store, **counts),
        held_out=EncodedRecords(examples=list(ExampleStore(folder / "held_out")), **about["held_out"]),
        held_out_records=[reader.record(value) for _, value in read_objects(folder / "held_out.jsonl")],
    )


def _remove_unused(kept: Path) -> None:
    """What no run has read for a month; a run that still does keeps its files, as they are mapped."""
    for folder in kept.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while some := list(islice(records, _AT_ONCE)):
        yield some

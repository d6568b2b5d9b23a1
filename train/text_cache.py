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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from terselm.data.formats import Format, RecordReader, record_to_object
from terselm.data.records import Record, is_held_out, prompt_hash, read_records
from terselm.data.rows import dump_object, read_objects
from terselm.data.utility import LabelledPrompt
from terselm.files import atomic_folder, remove_partials
from terselm.models import cache_folder
from terselm.train.example_store import ExampleStore, ExampleWriter
from terselm.train.examples import EncodedRecords, Encoding, GuidanceSource, encode_records
from terselm.train.labelled import documents_hash, encode_labelled, read_labelled
from terselm.train.run_folder import clear_disk_errors
from terselm.train.settings import LossOn, Template

_FORM = 1  # of the files; another number makes all of them anew
_LABELS_FORM = 1  # of those with labelled prompts
_AT_ONCE = 1000  # records
_KEPT_SECONDS = 30 * 24 * 3600
_COUNTS = ("split", "dropped", "tokens", "counted_tokens")  # of `EncodedRecords`
_OF_TRAINING = (*_COUNTS, "unguided", "unordered")


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
        held_out_guided: whether the target's opinion on held-out text is asked for, too.
        question_dropped: share of the labelled prompts that are read without their question.
        target: what the target is, so that another one makes other texts; empty without one.
        make_guidance: loads it; only called where the texts have to be made.
    """

    sources: Sequence[RecordSource]
    held_out: float
    seed: int
    encoding: Encoding
    held_out_guided: bool = False
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
        if self.held_out_guided:
            parts["held_out"] = ["guided"]
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
    about |= {"sizes": sizes, "held_out": _write_held_out(request, held_out, folder, encoding.guidance)}
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


def _write_held_out(
    request: TextRequest, records: list[Record], folder: Path, guidance: GuidanceSource | None
) -> dict[str, int]:
    encoding = replace(request.encoding, end_id=None, loss_on=LossOn.RESPONSE, every_turn=False)
    encoding = replace(encoding, guidance=guidance if request.held_out_guided else None)
    encoded = encode_records(records, encoding)
    (folder / "held_out").mkdir()
    guided = encoding.guidance is not None
    with ExampleWriter(folder / "held_out", guided=guided, top_k=0) as writer:
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

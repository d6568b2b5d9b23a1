"""The text of a run: where its records come from, what is trained on, what is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.records import refuse_empty_side
from terselm.data.rows import HUB
from terselm.errors import ConfigError, DataFormatError
from terselm.extras import first_line
from terselm.models import ALIASES, CausalLM, load_causal_lm, resolve
from terselm.train.example_store import StoredRow
from terselm.train.examples import EncodedRecords, Encoding, GuidanceSource
from terselm.train.held_out import HeldOutText
from terselm.train.held_out_labels import HeldOutLabels
from terselm.train.labelled import holds_labels
from terselm.train.packing import Row, pack_lengths
from terselm.train.provenance import file_sha256, folder_sha256
from terselm.train.settings import AlignSettings, DataSettings, Metric, ObjectiveSettings, Template
from terselm.train.text_cache import RecordSource, TextRequest, TokenisedTexts, tokenised


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Training rows and held-out text.

    Attributes:
        records: how many are trained on.
        targets: the models that wrote the responses, as far as the records say.
        training: each example once, however often an epoch sees it.
        rows: of an epoch; each holds at most ``row_length`` tokens.
        tokens: of an epoch.
        counted_tokens: of an epoch.
        labels: held-out labelled prompts.
        label_targets: the models whose answers are labelled.
    """

    records: int
    targets: list[str]
    training: EncodedRecords
    rows: Sequence[Row]
    row_length: int
    tokens: int
    counted_tokens: int
    held_out: HeldOutText
    labels: HeldOutLabels
    label_targets: list[str]

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the metrics; nothing that was cut or left out goes unsaid."""
        return {
            "targets": self.targets,
            "training_records": self.records,
            "training_tokens": self.tokens,
            "counted_tokens": self.counted_tokens,
            "rows": len(self.rows),
            "real_token_share": self.tokens / (len(self.rows) * self.row_length),
            "overlong_split": self.training.split + self.held_out.text.split,
            "overlong_dropped": self.training.dropped + self.held_out.text.dropped,
            "without_opinion": self.training.unguided,
            **({"without_order": self.training.unordered} if self.training.unordered else {}),
        }


def prepare_texts(settings: AlignSettings, lm: CausalLM, sources: list[RecordSource] | None = None) -> Texts:
    """Read, split, tokenise and pack; what has been tokenised before is taken from the cache.

    Args:
        settings: of the run.
        lm: the small LM, for its tokenizer and its window.
        sources: of the records, if they are known already.

    Raises:
        ConfigError: rows longer than the model's window, a side of the split without a token to count, a source that
            cannot be read, or a small LM without the chat template that is asked for.
        DataFormatError: a bad line.
        ModelError: the chat template refuses a record.
    """
    row_length, seed = settings.data.max_length, settings.seed
    if row_length > lm.window:
        raise ConfigError(f"data.max_length is {row_length}; {lm.name!r} reads at most {lm.window} tokens at once")
    sources = sources or read_sources(settings.data)
    request = _request(settings, lm, sources)
    cached = tokenised(request)
    _refuse_labels(settings.objective, cached)
    held_out_records = len(cached.held_out_records) + len(cached.held_out_labels)
    refuse_empty_side(cached.records, held_out_records, settings.evaluation.held_out, seed)
    places = examples_of_epoch(cached.sizes, sources, seed)
    labels = HeldOutLabels.of(cached.held_out_labels, request.encoding)
    held_out = _held_out_text(cached, labels)
    for records, encoded in ((cached.records, places), (held_out_records, held_out.text.examples)):
        if not len(encoded):
            raise ConfigError(
                f"none of {records} records has a token to count in rows of {row_length} tokens; raise "
                "data.max_length or set data.overlong=split"
            )
    if cached.training.unguided == cached.records:
        raise ConfigError(
            f"{settings.objective.log_probabilities} holds no text of the {cached.records} training records; make it "
            "from the same records, with the same template"
        )
    lengths = cached.store.lengths[places]
    rows = pack_lengths(lengths.tolist(), row_length)
    return Texts(
        records=cached.records,
        targets=cached.targets,
        training=cached.training,
        rows=[StoredRow(cached.store, places[row].tolist()) for row in rows],
        row_length=row_length,
        tokens=int(lengths.sum()),
        counted_tokens=int(cached.store.counted[places].sum()),
        held_out=held_out,
        labels=labels,
        label_targets=cached.label_targets,
    )


def _held_out_text(cached: TokenisedTexts, labels: HeldOutLabels) -> HeldOutText:
    """Responses of records; where all that is held out are labelled prompts, their demonstrations."""
    if cached.held_out_records or not len(labels):
        return HeldOutText.of(cached.held_out_records, cached.held_out)
    examples = [replace(example, record=number) for example, number, _ in labels.windows()]
    counted = sum(int(example.counted.sum()) for example in examples)
    tokens = sum(map(len, examples))
    text = EncodedRecords(examples=examples, split=0, dropped=0, tokens=tokens, counted_tokens=counted)
    return HeldOutText.of_labels(labels.labels, text)


def _refuse_labels(objective: ObjectiveSettings, cached: TokenisedTexts) -> None:
    """Refuse a run that would learn utilities without any, or those of another target.

    Raises:
        ConfigError: it would.
    """
    if not objective.utility:
        return
    if not cached.label_targets:
        raise ConfigError(
            "objective.utility learns from labelled prompts, and data.records holds none; make some with terselm "
            "collect --utility, or set objective.utility=0"
        )
    others = [target for target in cached.label_targets if not _is_same_model(target, objective.target)]
    if objective.target and others:
        raise ConfigError(
            f"the labels are of {', '.join(map(repr, others))}, but objective.target is {objective.target!r}; make "
            "labels of that target, or leave objective.target empty"
        )
    if not cached.labelled_examples:
        raise ConfigError(
            f"none of the labelled prompts that are trained on can be used: {cached.training.unordered} have units "
            f"that are all worth the same, {cached.training.dropped} a question longer than half a row or, with "
            "data.overlong=drop, more text than one row; make other labels or raise data.max_length"
        )


def _is_same_model(one: str, other: str) -> bool:
    """By its name; the folder that holds it may have moved."""
    return Path(one).name == Path(other).name


def _request(settings: AlignSettings, lm: CausalLM, sources: list[RecordSource]) -> TextRequest:
    if settings.template is Template.CHAT and not getattr(lm.tokenizer, "chat_template", None):
        raise ConfigError(
            f"template is 'chat', but the tokenizer of {lm.name!r} has no chat template; choose template=raw or "
            "alpaca, or a small LM with a chat template"
        )
    encoding = Encoding(
        tokenizer=lm.tokenizer,
        start_id=lm.start_id,
        end_id=lm.tokenizer.eos_token_id,
        template=settings.template,
        loss_on=settings.loss_on,
        max_length=settings.data.max_length,
        overlong=settings.data.overlong,
        top_k=settings.objective.top_k if settings.objective.divergence else 0,
    )
    return TextRequest(
        sources=sources,
        held_out=settings.evaluation.held_out,
        seed=settings.seed,
        encoding=encoding,
        held_out_guided=settings.metric is Metric.KEPT_OVERLAP,
        question_dropped=settings.objective.question_dropped,
        target=_describe_target(settings.objective, lm),
        make_guidance=lambda: _load_guidance(settings.objective, lm),
    )


def _describe_target(settings: ObjectiveSettings, lm: CausalLM) -> str:
    """Changes with the target's opinion; empty if nobody asks for it."""
    if not settings.compares:
        return ""
    if settings.target:
        return f"{model_fingerprint(settings.target)} {lm.model.dtype}"
    try:
        return file_sha256(Path(settings.log_probabilities))
    except OSError as error:
        raise ConfigError(
            f"objective.log_probabilities: {settings.log_probabilities} cannot be read: {first_line(error)}"
        ) from None


def _load_guidance(settings: ObjectiveSettings, lm: CausalLM) -> GuidanceSource | None:
    """What the objective needs of the target; a model leaves memory when the texts have been read."""
    if not settings.compares:
        return None
    from terselm.train.guidance import TargetOpinions  # here: most runs compare with no target

    source: CausalLM | Path = Path(settings.log_probabilities)
    if settings.target:
        dtype = str(lm.model.dtype).removeprefix("torch.")
        source = load_causal_lm(settings.target, device=str(lm.model.device), dtype=dtype)
    return TargetOpinions(source, settings.top_k if settings.divergence else 0, lm.tokenizer)


def read_sources(settings: DataSettings) -> list[RecordSource]:
    """All sources of a run's records, in the order in which they are read.

    Raises:
        ConfigError: the hub cannot be asked what a data set holds.
        DataFormatError: a file cannot be read.
    """
    mixture = settings.mixture or {settings.records: 1.0}
    return [
        RecordSource(name=name, times=times, fingerprint=_content(name), labelled=holds_labels(name))
        for name, times in mixture.items()
    ]


def combined_fingerprint(sources: list[RecordSource]) -> str:
    """One fingerprint of all: that of the only source, if there is but one."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(json.dumps([source.fingerprint for source in sources]).encode()).hexdigest()


def model_fingerprint(name: str) -> str:
    """Changes with a model's weights, without loading them where that can be avoided."""
    if name in ALIASES:
        return f"{name} {ALIASES[name].sha256}"
    place = resolve(name)
    if isinstance(place, Path):
        return _path_fingerprint(place)
    from huggingface_hub import model_info

    return _hub_fingerprint(name, lambda: model_info(name).sha)


def examples_of_epoch(sizes: list[int], sources: list[RecordSource], seed: int) -> NDArray[np.int64]:
    """The examples of an epoch.

    Args:
        sizes: how many examples each source has; those of the first come first.
        sources: of the same order.
        seed: decides which examples a fraction means.

    Returns:
        ``(n,)`` int64 places, ascending within each time that a source is seen.
    """
    generator = np.random.default_rng(seed)
    drawn, first = [], 0
    for size, source in zip(sizes, sources, strict=True):
        whole, fraction = divmod(source.times, 1)
        places = np.arange(first, first + size)
        drawn += [places] * int(whole)
        if fraction:
            drawn.append(np.sort(generator.permutation(places)[: round(fraction * size)]))
        first += size
    return np.concatenate(drawn).astype(np.int64)


def _content(name: str) -> str:
    if name.startswith(HUB):
        from huggingface_hub import dataset_info

        data_set = name.removeprefix(HUB).split("#")[0].split(":")[0]
        return _hub_fingerprint(name, lambda: dataset_info(data_set).sha, "; a file on this machine needs no hub")
    try:
        return _path_fingerprint(Path(name))
    except OSError as error:
        raise DataFormatError(Path(name), None, f"cannot be read: {first_line(error)}") from None


def _path_fingerprint(path: Path) -> str:
    return json.dumps(folder_sha256(path, leave_out="")) if path.is_dir() else file_sha256(path)


def _hub_fingerprint(name: str, ask: Callable[[], str | None], way_out: str = "") -> str:
    try:
        return f"{name} {ask()}"
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        reason = f"the hub does not say which revision {name!r} is of: {first_line(error)}"
        raise ConfigError(reason + way_out) from None

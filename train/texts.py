"""The text of a run: what is trained on, what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.data.records import refuse_empty_side
from terselm.errors import ConfigError
from terselm.models import CausalLM, load_causal_lm
from terselm.train.config import AlignConfig
from terselm.train.evaluation import HeldOutText
from terselm.train.examples import EncodedRecords, Encoding, nothing_left
from terselm.train.guidance import Target
from terselm.train.packing import Row, pack_lengths
from terselm.train.provenance import file_sha256
from terselm.train.sources import Source, draw, model_fingerprint, read_sources
from terselm.train.store import StoredRow
from terselm.train.text_cache import TextRequest, tokenised


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
    """

    records: int
    targets: list[str]
    training: EncodedRecords
    rows: Sequence[Row]
    row_length: int
    tokens: int
    counted_tokens: int
    held_out: HeldOutText

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
        }


def read_texts(config: AlignConfig, lm: CausalLM, sources: list[Source] | None = None) -> Texts:
    """Read, split, tokenise and pack; what has been tokenised before is taken from the cache.

    Args:
        config: of the run.
        lm: the small LM, for its tokenizer and its window.
        sources: of the records, if they are known already.

    Raises:
        ConfigError: rows longer than the model's window, a side of the split without a token to count, or a source
            that cannot be had.
        DataFormatError: a bad line.
    """
    row_length, seed = config.data.max_length, config.seed
    if row_length > lm.window:
        raise ConfigError(f"data.max_length is {row_length}; {lm.name!r} reads at most {lm.window} tokens at once")
    sources = sources or read_sources(config.data)
    request = _request(config, lm, sources)
    found = tokenised(request)
    refuse_empty_side(found.records, len(found.held_out_records), config.evaluation.held_out, seed)
    places = draw(found.sizes, sources, seed)
    for records, encoded in ((found.records, places), (len(found.held_out_records), found.held_out.examples)):
        if not len(encoded):
            raise nothing_left(records, request.encoding)
    if found.training.unguided == found.records:
        raise ConfigError(
            f"{config.objective.log_probabilities} has an opinion on none of the {found.records} training records; it "
            "has to be made from the same records, with the same template"
        )
    lengths = found.store.lengths[places]
    rows = pack_lengths(lengths.tolist(), row_length)
    return Texts(
        records=found.records,
        targets=found.targets,
        training=found.training,
        rows=[StoredRow(found.store, places[row].tolist()) for row in rows],
        row_length=row_length,
        tokens=int(lengths.sum()),
        counted_tokens=int(found.store.counted[places].sum()),
        held_out=HeldOutText.of(found.held_out_records, found.held_out),
    )


def _request(config: AlignConfig, lm: CausalLM, sources: list[Source]) -> TextRequest:
    encoding = Encoding(
        tokenizer=lm.tokenizer,
        start_id=lm.start_id,
        end_id=lm.tokenizer.eos_token_id,
        template=config.template,
        loss_on=config.loss_on,
        max_length=config.data.max_length,
        overlong=config.data.overlong,
        top_k=config.objective.top_k if config.objective.divergence else 0,
    )
    return TextRequest(
        sources=sources,
        held_out=config.evaluation.held_out,
        seed=config.seed,
        encoding=encoding,
        target=_describe_target(config, lm),
        make_target=lambda: _load_target(config, lm),
    )


def _describe_target(config: AlignConfig, lm: CausalLM) -> str:
    """Changes with the target's opinion; empty if nobody asks for it."""
    settings = config.objective
    if not settings.compares:
        return ""
    if settings.target:
        return f"{model_fingerprint(settings.target)} {lm.model.dtype}"
    try:
        return file_sha256(Path(settings.log_probabilities))
    except OSError as error:
        raise ConfigError(
            f"objective.log_probabilities: {settings.log_probabilities} cannot be read: {error.strerror}"
        ) from None


def _load_target(config: AlignConfig, lm: CausalLM) -> Target | None:
    """Whose opinion the objective needs; a model leaves memory when the texts have been read."""
    settings = config.objective
    if not settings.compares:
        return None
    source: CausalLM | Path = Path(settings.log_probabilities)
    if settings.target:
        dtype = str(lm.model.dtype).removeprefix("torch.")
        source = load_causal_lm(settings.target, device=str(lm.model.device), dtype=dtype)
    return Target(source, settings.top_k if settings.divergence else 0, lm.tokenizer)

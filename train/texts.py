"""The text of a run: what is trained on, what is held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from terselm.data.records import read_records, split_by_instruction
from terselm.errors import ConfigError
from terselm.models import CausalLM, load_causal_lm
from terselm.train.config import AlignConfig, LossOn
from terselm.train.evaluation import HeldOutText
from terselm.train.examples import EncodedRecords, Encoding, encode
from terselm.train.guidance import Target
from terselm.train.packing import Row, pack


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Training rows and held-out text.

    Attributes:
        records: how many are trained on.
        targets: the models that wrote the responses, as far as the records say.
        rows: each holds at most ``row_length`` tokens.
    """

    records: int
    targets: list[str]
    training: EncodedRecords
    rows: list[Row]
    row_length: int
    held_out: HeldOutText

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the metrics; nothing that was cut or left out goes unsaid."""
        return {
            "targets": self.targets,
            "training_records": self.records,
            "training_tokens": self.training.tokens,
            "counted_tokens": self.training.counted_tokens,
            "rows": len(self.rows),
            "real_token_share": self.training.tokens / (len(self.rows) * self.row_length),
            "overlong_split": self.training.split + self.held_out.text.split,
            "overlong_dropped": self.training.dropped + self.held_out.text.dropped,
            "without_opinion": self.training.unguided,
        }


def _target(config: AlignConfig, lm: CausalLM) -> Target | None:
    """Whose opinion the objective needs; a model leaves memory when the texts have been read."""
    settings = config.objective
    if not settings.compares:
        return None
    source: CausalLM | Path = Path(settings.log_probabilities)
    if settings.target:
        dtype = str(lm.model.dtype).removeprefix("torch.")
        source = load_causal_lm(settings.target, device=str(lm.model.device), dtype=dtype)
    return Target(source, settings.top_k if settings.divergence else 0, lm.tokenizer)


def read_texts(config: AlignConfig, lm: CausalLM) -> Texts:
    """Read, split, tokenise and pack.

    Raises:
        ConfigError: rows longer than the model's window, or a side of the split without a token to count.
        DataFormatError: a bad line.
    """
    row_length = config.data.max_length
    if row_length > lm.window:
        raise ConfigError(f"data.max_length is {row_length}; {lm.name!r} reads at most {lm.window} tokens at once")
    records, held_out_records = split_by_instruction(
        read_records(Path(config.data.records)), config.evaluation.held_out, config.seed
    )
    encoding = Encoding(
        tokenizer=lm.tokenizer,
        start_id=lm.start_id,
        end_id=lm.tokenizer.eos_token_id,
        template=config.template,
        loss_on=config.loss_on,
        max_length=row_length,
        overlong=config.data.overlong,
        target=_target(config, lm),
        top_k=config.objective.top_k if config.objective.divergence else 0,
    )
    training = encode(records, encoding)
    if training.unguided == len(records):
        raise ConfigError(
            f"{config.objective.log_probabilities} has an opinion on none of the {len(records)} training records; it "
            "has to be made from the same records, with the same template"
        )
    held_out = encode(held_out_records, replace(encoding, end_id=None, loss_on=LossOn.RESPONSE, target=None))
    return Texts(
        records=len(records),
        targets=sorted({r.generation.model for r in records if r.generation is not None}),
        training=training,
        rows=list(pack(training.examples, row_length)),
        row_length=row_length,
        held_out=HeldOutText.of(held_out_records, held_out),
    )

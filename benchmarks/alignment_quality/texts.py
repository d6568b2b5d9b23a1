"""All text of the comparison, with the target's opinion on every word: made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from alignment_quality import domains
from numpy.typing import NDArray

from terselm.data.records import Record, read_records
from terselm.models import CausalLM
from terselm.train.examples import Encoding, Example, encode_records
from terselm.train.guidance import TargetOpinions
from terselm.train.report.measures import LEAST_WORDS
from terselm.train.settings import LossOn, ObjectiveSettings, Overlong, Template


class Kind(StrEnum):
    """Of text to train on."""

    GIVEN = "given"
    """GPT-4's answers, grade-school maths, the questions of BIG-Bench Hard."""
    GPT4 = "gpt4"
    """GPT-4's answers alone."""
    ANSWERS = "answers"
    """The target's own, to the instructions that GPT-4 answered."""
    FREE = "free"
    """The target's own, after the first words of sentences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The texts of a domain.

    Attributes:
        responses: ``(texts,)``, UTF-8 bytes of each response.
    """

    examples: list[Example]
    responses: NDArray[np.float64]

    def nats(self) -> list[NDArray[np.float64]]:
        """The target's surprisal of every word."""
        return [example.guide.nats.astype(np.float64) for example in self.examples if example.guide is not None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """What is trained on, and what is held out.

    Attributes:
        one_vocabulary: whether small LM and target share it, so that their distributions can be compared.
    """

    one_vocabulary: bool
    training: dict[Kind, list[Example]]
    held_out: dict[str, HeldOut]

    def of(self, kinds: Sequence[str]) -> list[Example]:
        return [example for kind in kinds for example in self.training[Kind(kind)]]

    def describe(self) -> dict[str, dict[str, int]]:
        return {
            "training_tokens": {kind.value: sum(map(len, some)) for kind, some in self.training.items()},
            "held_out_texts": {domain: len(found.examples) for domain, found in self.held_out.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where text comes from.

    Attributes:
        datasets: folder of the public data sets.
        answers: records with the target's answers to the instructions of ``gpt4_instructions``, if there are any.
        free: records with what the target wrote after a few words, if there are any.
        records: of each kind to train on at most, evenly spaced; 0 for all.
    """

    datasets: Path
    answers: Path | None
    free: Path | None
    records: int


def gather(sources: Sources, texts: int, small: CausalLM, target: CausalLM, length: int) -> Texts:
    """Read everything and ask the target about it.

    Args:
        texts: held out, of each domain, at most.
        length: tokens of a row; no held-out text is longer.
    """
    one_vocabulary = small.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    top_k = ObjectiveSettings().top_k if one_vocabulary else 0
    given = _some(domains.training(sources.datasets), sources)
    training = {Kind.GIVEN: given}
    held_out = domains.held_out(sources.datasets, texts)
    if sources.answers is not None:
        found = list(read_records(sources.answers))
        training[Kind.ANSWERS] = _some([record for record in found if not domains.is_held_out(record)], sources)
        own = [
            record for record in found if domains.is_held_out(record) and len(record.response.split()) >= LEAST_WORDS
        ]
        held_out["the target's answers"] = own[:texts]
    if sources.free is not None:
        training[Kind.FREE] = _some(list(read_records(sources.free)), sources)

    def encoding(overlong: Overlong) -> Encoding:
        return Encoding(
            tokenizer=small.tokenizer,
            start_id=small.start_id,
            end_id=None,
            template=Template.RAW,
            loss_on=LossOn.RESPONSE,
            max_length=length,
            overlong=overlong,
            guidance=TargetOpinions(target, top_k, small.tokenizer),
            top_k=top_k,
        )

    encoded = {
        kind: list(encode_records(records, encoding(Overlong.SPLIT)).examples) for kind, records in training.items()
    }
    encoded[Kind.GPT4] = [one for one in encoded[Kind.GIVEN] if given[one.record].id.startswith("gpt4")]
    return Texts(
        one_vocabulary=one_vocabulary,
        training=encoded,
        held_out={domain: _held_out(records, encoding(Overlong.DROP)) for domain, records in held_out.items()},
    )


def _some(records: list[Record], sources: Sources) -> list[Record]:
    return records[:: max(1, len(records) // sources.records)] if sources.records else records


def _held_out(records: Sequence[Record], encoding: Encoding) -> HeldOut:
    found = encode_records(records, encoding).examples
    kept = [one for one in found if one.guide is not None and len(one.guide.nats) >= LEAST_WORDS]
    return HeldOut(
        examples=kept,
        responses=np.asarray([len(records[one.record].response.encode()) for one in kept], dtype=np.float64),
    )

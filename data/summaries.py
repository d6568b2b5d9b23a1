"""What a file of records holds, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from terselm.data.records import Record, prompt_hash


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of numbers, such as lengths: the mean, the median and the 95th percentile."""

    mean: float
    median: float
    p95: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class RecordStatistics:
    """Counts of a file of records.

    Attributes:
        prompts: distinct ones.
        with_origin: records that say where they came from; the counts below are theirs.
        models, finish_reasons: records of each.
        temperatures: records at each; ``none`` where it was not set.
    """

    records: int
    prompts: int
    turns: dict[int, int]
    categories: dict[str, int]
    prompt_characters: Spread
    response_characters: Spread
    with_origin: int
    models: dict[str, int]
    finish_reasons: dict[str, int]
    temperatures: dict[str, int]
    prompt_tokens: int
    completion_tokens: int


def statistics(records: Iterable[Record]) -> RecordStatistics:
    """Count; the file must hold a record."""
    all_ = list(records)
    made = [record.generation for record in all_ if record.generation is not None]
    return RecordStatistics(
        records=len(all_),
        prompts=len({prompt_hash(record.messages) for record in all_}),
        turns=_counts(len(record.messages) for record in all_),
        categories=_counts(record.category for record in all_ if record.category is not None),
        prompt_characters=_spread([sum(len(m.content) for m in record.messages) for record in all_]),
        response_characters=_spread([len(record.response) for record in all_]),
        with_origin=len(made),
        models=_counts(generation.model for generation in made),
        finish_reasons=_counts(generation.finish_reason for generation in made),
        temperatures=_counts(str(generation.parameters.get("temperature", "none")) for generation in made),
        prompt_tokens=sum(generation.usage.prompt_tokens for generation in made),
        completion_tokens=sum(generation.usage.completion_tokens for generation in made),
    )


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(values).most_common())


def _spread(values: list[int]) -> Spread:
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    return Spread(mean=round(fmean(values), 1), median=cuts[9], p95=cuts[18], largest=max(values))

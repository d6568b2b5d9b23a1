"""Compare the compressor with the brute-force reference, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
from reference_pieces import Keep

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.settings import paper_settings
from terselm.errors import BudgetError, PromptError


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the compressor; ``patterns`` is what the reference is to keep, if ``keep`` holds presets."""

    prompt: Prompt
    settings: CompressionSettings = field(default_factory=paper_settings)
    budget: int | None = None
    rate: float | None = None
    keep: Sequence[Any] = ()
    patterns: Sequence[Keep] | None = None
    counter: Callable[[str], int] | None = None


def count_bytes(text: str) -> int:
    return len(text.encode())


def count_words(text: str) -> int:
    return len(text.split())


def count_with_overhead(text: str) -> int:
    return 3 + len(text) // 2


def count_unevenly(text: str) -> int:
    return len(text) // 4 + 30 * text.count("gg")


def run_reference(lm: Any, case: Case) -> reference.Answer:
    return reference.compress(
        lm,
        case.prompt,
        case.settings,
        budget=case.budget,
        rate=case.rate,
        keep=case.keep if case.patterns is None else case.patterns,
        counter=case.counter,
    )


def run_compressor(lm: Any, case: Case) -> Any:
    return PromptCompressor(lm, settings=case.settings).compress_batch(
        [case.prompt], budget=case.budget, rate=case.rate, keep=case.keep, counter=case.counter
    )[0]


def assert_agrees(lm: Any, case: Case, *, tolerance: float = 2e-3) -> Any:
    """Both answer alike, or both refuse with the same smallest budget. Returns the compressor's result, if any.

    Args:
        tolerance: between two surprisals, in nats: a cached pass rounds otherwise than a full one.
    """
    refusal: BudgetError | None = None
    if not any([case.prompt.instruction, *case.prompt.demonstrations, case.prompt.question]):
        with pytest.raises(PromptError):
            run_compressor(lm, case)
        return None
    try:
        answer = run_reference(lm, case)
    except BudgetError as error:
        refusal = error
    if refusal is not None:
        with pytest.raises(BudgetError) as caught:
            run_compressor(lm, case)
        assert caught.value.smallest == refusal.smallest
        return None
    result = run_compressor(lm, case)
    assert_same(result, answer, tolerance=tolerance)
    return result


def assert_same(result: Any, answer: reference.Answer, *, tolerance: float = 2e-3) -> None:
    assert result.selected == answer.selected
    expected = [
        (unit.part, unit.index, unit.start, unit.end, unit.text, unit.cost, unit.segment, kept)
        for unit, kept in zip(answer.units, answer.kept, strict=True)
    ]
    got = [
        (token.part, token.index, token.start, token.end, token.text, token.token_count, token.segment, token.kept)
        for token in result.tokens
    ]
    assert got == expected
    for token, unit in zip(result.tokens, answer.units, strict=True):
        if token.surprisal is None:  # demonstrations are not read where their perplexities decide nothing
            assert unit.segment is None or unit.surprisal is None
        else:
            assert token.surprisal == pytest.approx(unit.surprisal, abs=tolerance, rel=1e-4), (unit.text, unit.segment)
    assert result.text == answer.text
    assert (result.original_tokens, result.compressed_tokens) == (answer.original_tokens, answer.compressed_tokens)

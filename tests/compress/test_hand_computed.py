"""Small prompts worked out by hand on a bigram LM; the reference and the compressor must both give them.

Surprisals are given in bits (a probability of 1/16 is 4 bits) and compared in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from agreement import Case, run_compressor, run_reference
from fakes import bigram_lm

from terselm import CompressionSettings, Prompt
from terselm.errors import BudgetError

# Bits of a word after another.
TABLE = {
    "<s>": {"a": 1, "b": 2, "d": 3},
    "</s>": {"a": 6},
    "a": {"b": 4, "c": 2},
    "b": {"c": 1, "d": 6, "a": 3, "elephant": 5},
    "c": {"d": 2},
    "d": {"e": 3},
    "e": {"f": 5},
    "|": {"c": 3},
}


@dataclass(frozen=True)
class Outcome:
    text: str
    selected: tuple[int, ...]
    bits: list[float | None]  # of each unit in source order


def by_reference(lm: Any, case: Case) -> Outcome:
    answer = run_reference(lm, case)
    return Outcome(answer.text, answer.selected, [_bits(unit.surprisal) for unit in answer.units])


def by_compressor(lm: Any, case: Case) -> Outcome:
    result = run_compressor(lm, case)
    return Outcome(result.text, result.selected, [_bits(token.surprisal) for token in result.tokens])


def _bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)


@pytest.fixture(params=[by_reference, by_compressor])
def compress(request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    return request.param


def make_lm(*, bos: bool = True) -> Any:
    words = ["a", "b", "c", "d", "e", "f", "|", "elephant"]
    table = {before: {word: 2.0**-bits for word, bits in row.items()} for before, row in TABLE.items()}
    return bigram_lm(words, table, bos=bos)


def one(text: str, **options: Any) -> Case:
    return Case(prompt=Prompt(demonstrations=(text,)), **options)


def test_a_token_is_kept_for_its_own_surprisal(compress: Callable[..., Outcome]) -> None:
    outcome = compress(make_lm(), one("a b c d e f", budget=3))
    assert outcome.bits == pytest.approx([1, 4, 1, 2, 3, 5], abs=1e-4)
    assert outcome.text == " b e f"  # a shift by one would keep a, d and e
    assert outcome.selected == (0,)


def test_model_without_bos_starts_with_its_end_of_text_token(compress: Callable[..., Outcome]) -> None:
    outcome = compress(make_lm(bos=False), one("a b c d e f", budget=2))
    assert outcome.bits == pytest.approx([6, 4, 1, 2, 3, 5], abs=1e-4)
    assert outcome.text == "a f"


def test_a_segment_is_read_after_the_kept_tokens_alone(compress: Callable[..., Outcome]) -> None:
    # One of a, b, c is kept: b. Then d follows b (6 bits), not c (2 bits).
    outcome = compress(make_lm(), one("a b c d e f", budget=2, settings=CompressionSettings(segment_size=3)))
    assert outcome.bits == pytest.approx([1, 4, 1, 6, 3, 5], abs=1e-4)
    assert outcome.text == " b d"


def test_fractions_of_the_budget_carry_forward(compress: Callable[..., Outcome]) -> None:
    # 3 tokens of 4 segments: none of the first, then 1 of each. So the second "a" still follows the start token.
    settings = CompressionSettings(segment_size=2)
    outcome = compress(make_lm(), one("a b a b a b a b", budget=3, settings=settings))
    assert outcome.bits == pytest.approx([1, 4, 1, 4, 3, 4, 3, 4], abs=1e-4)
    assert outcome.text == " b b b"


def test_of_three_equal_scores_the_first_two_are_kept(compress: Callable[..., Outcome]) -> None:
    outcome = compress(make_lm(), one("a b a b a b c", budget=2))
    assert outcome.bits == pytest.approx([1, 4, 3, 4, 3, 4, 1], abs=1e-4)
    assert outcome.text == " b b"


def test_ties_at_the_threshold_go_to_the_earlier(compress: Callable[..., Outcome]) -> None:
    # d after e is not in the table: more than 5 bits, twice. The first d and every e are 3 bits: two of four stay.
    outcome = compress(make_lm(), one("d e d e d e", budget=4))
    assert outcome.text == "d e d d"


def test_separators_are_context_and_are_charged(compress: Callable[..., Outcome]) -> None:
    # 4 tokens less one for the separator leave 3 for ins and que: round(3 * 1.7 / 3.5) = 1 and 2.
    case = Case(
        prompt=Prompt(instruction="a b", question="c d"), budget=4, settings=CompressionSettings(separator=" | ")
    )
    outcome = compress(make_lm(), case)
    assert outcome.bits == pytest.approx([1, 4, 3, 2], abs=1e-4)  # c after "|"
    assert outcome.text == " b | c d"


def test_the_most_perplexing_demonstrations_are_selected(compress: Callable[..., Outcome]) -> None:
    # Bits: a b = 1 + 4, a c = 1 + 2, d e = 3 + 3. The limit is 4 tokens, so a third demonstration crosses it; but two
    # tokens cannot serve three demonstrations, and the one selected last leaves.
    outcome = compress(make_lm(), Case(prompt=Prompt(demonstrations=("a b", "a c", "d e")), budget=2))
    assert outcome.selected == (0, 2)
    assert outcome.bits == pytest.approx([1, 4, 1, 2, 6, 3], abs=1e-4)  # a c as it was read alone; d after b
    assert outcome.text == " b\n\nd"


def test_selection_goes_on_while_the_limit_is_not_exceeded(compress: Callable[..., Outcome]) -> None:
    # The limit is 2 * 4 tokens. Two demonstrations reach it exactly, so the third is selected too.
    outcome = compress(make_lm(), Case(prompt=Prompt(demonstrations=("a b c d", "a c d e", "b c d e")), budget=4))
    assert outcome.selected == (0, 1, 2)


def test_a_candidate_that_does_not_fit_is_passed_over(compress: Callable[..., Outcome]) -> None:
    # 5 characters of 11 are 2 tokens: " b f". One character is left: e, then d do not fit, a does.
    outcome = compress(make_lm(), one("a b c d e f", budget=5, counter=len))
    assert outcome.text == "a b f"


def test_what_exceeds_the_budget_leaves(compress: Callable[..., Outcome]) -> None:
    # 6 characters of 12 are 1 token, elephant: 9 characters. It leaves; b, then a come instead.
    outcome = compress(make_lm(), one("a b elephant", budget=6, counter=len))
    assert outcome.bits == pytest.approx([1, 4, 5], abs=1e-4)
    assert outcome.text == "a b"


def test_the_empty_text_is_no_answer(compress: Callable[..., Outcome]) -> None:
    # Counting adds 300. Of b and elephant both leave; 300 is within 2% of 302, but b fits.
    outcome = compress(make_lm(), one("a b elephant", budget=302, counter=lambda text: 300 + len(text)))
    assert outcome.text == " b"


def test_protected_words_are_charged_first(compress: Callable[..., Outcome]) -> None:
    outcome = compress(make_lm(), one("a b c d e f", budget=3, keep=["c", "a"]))
    assert outcome.text == "a c f"


def test_nothing_fits(compress: Callable[..., Outcome]) -> None:
    with pytest.raises(BudgetError) as caught:
        compress(make_lm(), one("elephant b elephant", budget=1, counter=len))
    assert caught.value.smallest == 2  # " b"


def test_unchanged_prompt_is_not_read(compress: Callable[..., Outcome]) -> None:
    outcome = compress(make_lm(), one("a  b c ", budget=3))
    assert outcome == Outcome("a  b c ", (0,), [None, None, None])

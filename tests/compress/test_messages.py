"""Chat messages through the compressor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from fakes import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm import PromptCompressor
from terselm.errors import BudgetError, PromptError

CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"what": "apples"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a shop's assistant. Answer in one sentence, and say the price in euros."},
    {"role": "user", "content": "How many apples do you have left today, and what does one of them cost?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {
        "role": "tool",
        "tool_call_id": "c1",
        "content": '{"apples": 12, "price": 0.4, "currency": "EUR"}',
    },
    {"role": "assistant", "content": "We have 12 apples left, and each of them costs 0.40 euros.", "name": "shop"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Here is a picture of the pears that I bought from you the other day."},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "Are they the same as those in the window, and what do they cost now?"},
        ],
    },
]


def compressor() -> PromptCompressor:
    return PromptCompressor(random_lm())


def texts(messages: list[dict[str, Any]]) -> list[str]:
    found = []
    for message in messages:
        content = message.get("content") or []
        found += [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return found


def is_cut_from(text: str, source: str) -> bool:
    rest = iter(source)
    return all(character in rest for character in text)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("counter", [None, lambda text: len(text.encode())])
def test_everything_but_text_stays(rate: float, counter: Any) -> None:
    before = copy.deepcopy(MESSAGES)
    found = compressor().compress_messages(MESSAGES, rate=rate, counter=counter)
    assert before == MESSAGES
    assert found.compressed_tokens <= found.budget == int(rate * found.original_tokens)
    count = counter or (lambda text: len(random_lm().tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert sum(map(count, texts(found.messages))) == found.compressed_tokens
    by_role = [message["role"] for message in found.messages]
    assert [role for role in [m["role"] for m in MESSAGES] if role in by_role] == by_role or len(by_role) < 6
    (call,) = [message for message in found.messages if "tool_calls" in message]
    assert call == MESSAGES[2]
    (answer,) = [message for message in found.messages if message["role"] == "tool"]
    assert answer["tool_call_id"] == "c1"
    assert is_cut_from(answer["content"], MESSAGES[3]["content"])
    last = found.messages[-1]
    assert MESSAGES[5]["content"][1] in last["content"]
    assert is_cut_from(last["content"][-1]["text"], MESSAGES[5]["content"][2]["text"])
    for message in found.messages:
        if message.get("name") == "shop":
            assert is_cut_from(message["content"], MESSAGES[4]["content"])


def test_parts() -> None:
    result = compressor().compress_messages(MESSAGES, rate=0.5).result
    rebuilt: dict[tuple[str, int], str] = {}
    for token in result.tokens:
        rebuilt[token.part, token.index] = rebuilt.get((token.part, token.index), "") + token.text
    assert rebuilt["instruction", 0] == MESSAGES[0]["content"]
    assert rebuilt["question", 0] == MESSAGES[5]["content"][2]["text"]
    assert rebuilt["demonstration", 0].startswith(MESSAGES[1]["content"])
    assert rebuilt["demonstration", 0].endswith(MESSAGES[4]["content"])
    assert rebuilt["demonstration", 1] == MESSAGES[5]["content"][0]["text"]


def test_what_fits_is_unchanged() -> None:
    found = compressor().compress_messages(MESSAGES, rate=1.0)
    assert found.messages == MESSAGES
    assert found.compressed_tokens == found.original_tokens == found.budget


def test_protected_text_stays() -> None:
    found = compressor().compress_messages(MESSAGES, rate=0.4, keep=["0.40 euros", "pears"])
    assert any("0.40 euros" in text for text in texts(found.messages))
    assert any("pears" in text for text in texts(found.messages))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"content": "no role"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["text"]}],
        [{"role": "user", "content": ""}],
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    ],
)
def test_messages_of_another_form(messages: Any) -> None:
    with pytest.raises(PromptError):
        compressor().compress_messages(messages, rate=0.5)


@pytest.mark.parametrize("arguments", [{}, {"budget": 5, "rate": 0.5}, {"budget": 0}, {"rate": 2.0}])
def test_budgets_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        compressor().compress_messages(MESSAGES, **arguments)


@pytest.mark.parametrize("options", [{}, {"keep": ["euros", "pears"]}, {"counter": lambda text: len(text.encode())}])
def test_a_budget_that_is_too_small_names_one_that_works(options: dict[str, Any]) -> None:
    """As `compress` does."""
    with pytest.raises(BudgetError) as by_rate:
        compressor().compress_messages(MESSAGES, rate=0.0001, **options)
    smallest = by_rate.value.smallest
    assert smallest is not None
    assert smallest == 1 or options
    assert str(smallest) in str(by_rate.value)
    if smallest > 1:
        with pytest.raises(BudgetError) as by_budget:
            compressor().compress_messages(MESSAGES, budget=1, **options)
        assert by_budget.value.smallest is not None
        smallest = max(smallest, by_budget.value.smallest)
    assert compressor().compress_messages(MESSAGES, budget=smallest, **options).compressed_tokens <= smallest


def test_budgets_of_words_are_named_too() -> None:
    words = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "word"}]
    with pytest.raises(BudgetError) as caught:
        compressor().compress_messages(words, budget=3, counter=lambda text: 5 * len(text.split()))
    assert caught.value.smallest is not None
    assert caught.value.smallest > 3


TEXT = st.text(st.sampled_from("ab 12\n.,é中👍"), min_size=1, max_size=40)
CHATS = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXT),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(CHATS, st.integers(1, 120))
def test_budget_is_hard(messages: list[dict[str, Any]], budget: int) -> None:
    try:
        found = compressor().compress_messages(messages, budget=budget)
    except BudgetError:
        return
    count = lambda text: len(random_lm().tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    assert sum(map(count, texts(found.messages))) == found.compressed_tokens <= budget
    sources = iter(messages)
    for message in found.messages:  # in order, each cut from one of the originals
        assert any(
            source["role"] == message["role"] and is_cut_from(message["content"], source["content"])
            for source in sources
        )

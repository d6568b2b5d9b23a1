"""Messages through chat templates: what is rendered, what the assistant says, and templates that do not work."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from fakes import bytes_tokenizer, fallback_tokenizer
from tokenizers import normalizers

from terselm.errors import ConfigError, ModelError
from terselm.models import chat
from terselm.models.chat import ChatMode, chat_pieces, chat_prompt, chat_text, encode_pieces, uses_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_START = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %} {{ m.content }}</s>"
    "{% endgeneration %}{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
)
FORGETS = (  # as some reasoning models do: thoughts of earlier turns are left out
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "\n12"},
    {"role": "user", "content": "And cats?"},
    {"role": "assistant", "content": "The cat sat."},
]


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them the assistant says, as training puts them together."""
    pieces = chat_pieces(tokenizer, messages)
    encoded = encode_pieces(tokenizer, [text for text, _ in pieces])
    ids = [token for tokens, _ in encoded for token in tokens]
    mask = [own for (_, own), (tokens, _) in zip(pieces, encoded, strict=True) for _ in tokens]
    return ids, mask


def tokenizer(template: str | None) -> Any:
    made = bytes_tokenizer(bos=True, trim=False)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "mode", "expected"),
    [
        (CHATML, "auto", True),
        (CHATML, "always", True),
        (CHATML, "never", False),
        (None, "auto", False),
        (None, ChatMode.NEVER, False),
    ],
)
def test_when_the_template_is_used(template: str | None, mode: str, expected: bool) -> None:
    assert uses_chat(tokenizer(template), mode) is expected


def test_modes_that_do_not_work() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer of gemma has no chat template; choose 'auto'"):
        uses_chat(tokenizer(None), "always", "gemma")
    with pytest.raises(ConfigError, match=r"unknown chat mode 'perhaps'; expected one of auto, always, never"):
        uses_chat(tokenizer(None), "perhaps")


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    made = tokenizer(CHATML)
    assert chat_text(made, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert made.decode(chat_prompt(made, TURNS[:2])).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_there_is_one_start_token() -> None:
    made = tokenizer(WITH_START)
    ids = chat_prompt(made, "Hi")
    assert ids.count(made.bos_token_id) == 1
    assert ids[0] == made.bos_token_id
    assert made.bos_token_id not in chat_prompt(tokenizer(CHATML), "Hi")


def spoken(made: Any, ids: list[int], mask: list[bool]) -> str:
    return str(made.decode([token for token, own in zip(ids, mask, strict=True) if own]))


def test_only_what_the_assistant_says_is_marked() -> None:
    made = tokenizer(CHATML)
    ids, mask = chat_ids(made, TURNS)
    assert made.decode(ids) == chat_text(made, TURNS, add_generation_prompt=False)
    assert spoken(made, ids, mask) == "\n12<|im_end|>The cat sat.<|im_end|>"
    # Up to the first answer the ids are those of the prompt that it answers, though the answer begins with a line end.
    prompt = chat_prompt(made, TURNS[:2])
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_a_conversation_without_the_assistant() -> None:
    ids, mask = chat_ids(tokenizer(CHATML), TURNS[:2])
    assert ids
    assert not any(mask)


def test_a_template_that_marks_the_assistant_is_believed() -> None:
    made = tokenizer(MARKED)
    ids, mask = chat_ids(made, TURNS)
    assert made.decode(ids) == chat_text(made, TURNS, add_generation_prompt=False)
    assert spoken(made, ids, mask).replace(" ", "") == "\n12</s>Thecatsat.</s>"


def test_the_pieces_are_the_whole_text() -> None:
    for template in (CHATML, MARKED, WITH_START):
        made = tokenizer(template)
        pieces = chat_pieces(made, TURNS[:3])
        assert "".join(text for text, _ in pieces) == chat_text(made, TURNS[:3], add_generation_prompt=False)


def test_no_space_is_put_before_every_piece() -> None:
    """As Llama 2's tokenizer would, which begins every text with a space."""
    made = fallback_tokenizer(bos=True)
    made.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), made.backend_tokenizer.normalizer]
    )
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}"
        "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat on the mat"}] * 2
    ids, mask = chat_ids(made, turns)
    whole = chat_text(made, turns, add_generation_prompt=False)
    assert ids == made(whole, add_special_tokens=False).input_ids
    pieces = [text for text, _ in chat_pieces(made, turns)]
    for text, (tokens, spans) in zip(pieces, encode_pieces(made, pieces), strict=True):
        assert len(tokens) == len(spans)
        assert sorted({place for start, end in spans for place in range(start, end)}) == list(range(len(text)))
    said = made.convert_ids_to_tokens([token for token, own in zip(ids, mask, strict=True) if own])
    assert "".join(said).replace("▁", " ") == "sat on the mat</s>sat on the mat</s>"
    # Where a token stands across two pieces, each is tokenised by itself.
    assert [len(tokens) for tokens, _ in encode_pieces(made, ["th", "e cat"])] == [
        len(made(text, add_special_tokens=False).input_ids) for text in ("th", "e cat")
    ]


def test_a_template_that_forgets() -> None:
    made = tokenizer(FORGETS)
    ids, mask = chat_ids(made, TURNS[:3])
    assert spoken(made, ids, mask) == "<think>\n12</s>"
    with pytest.raises(ModelError, match=r"renders turn 3 of 5 in another way once others follow it"):
        chat_ids(made, TURNS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; choose a chat model"),
        ("{{ raise_exception('roles must alternate') }}", r"2 messages \(roles: system, user\): roles must alternate"),
        ("{{ messages[7].content }}", "refuses these 2 messages"),
        ("{% for m in messages %}", "refuses these 2 messages"),
        ("{{ 1 / 0 }}", "refuses these 2 messages .*division by zero"),
        ("{{ ''.__class__.__mro__ }}", "refuses these 2 messages"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "refuses these 2 messages .*recursion"),
    ],
)
def test_templates_that_do_not_work(template: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        chat_text(tokenizer(template), TURNS[:2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["", "{{ a }}", "{% set x = a %}"])
def test_a_template_that_never_ends(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.5)
    many = f"{{% for a in range(90000) %}}{{% for b in range(90000) %}}{body}{{% endfor %}}{{% endfor %}}"
    before = sys.gettrace()
    with pytest.raises(ModelError, match=r"did not end within 0\.5 s"):
        chat_text(tokenizer(many), "Hi")
    assert sys.gettrace() is before

"""Messages as a chat model reads them: the one door to a tokenizer's chat template.

A template is a program that comes with a model. transformers runs it in a sandbox; here it is bounded in time, too,
and whatever it does wrong becomes one sentence. Text that a template has rendered holds its own start token, so it is
tokenised without another.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import accumulate
from types import FrameType
from typing import Any

from terselm.errors import ConfigError, ModelError
from terselm.extras import first_line

Messages = str | Sequence[Mapping[str, Any]]
"""Turns as OpenAI writes them, ``{"role": …, "content": …}``; a text is one turn of the user."""

_SECONDS = 10.0  # a real template takes less than a thousandth
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class ChatMode(StrEnum):
    """Whether a model's chat template is used: where it has one, always, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def uses_chat(tokenizer: Any, mode: ChatMode | str, name: str = "the model") -> bool:
    """Whether prompts go through the chat template.

    Raises:
        ConfigError: an unknown mode; or ``always`` for a tokenizer that has no template.
    """
    try:
        mode = ChatMode(mode)
    except ValueError:
        raise ConfigError(f"unknown chat mode {mode!r}; expected one of {', '.join(ChatMode)}") from None
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if mode is ChatMode.ALWAYS and not has_template:
        raise ConfigError(
            f"chat is 'always', but the tokenizer of {name} has no chat template; choose 'auto' or 'never', or a chat "
            "model"
        )
    return has_template and mode is not ChatMode.NEVER


def chat_text(
    tokenizer: Any, messages: Messages, *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = True
) -> str:
    """Messages as the template renders them, start token included.

    Args:
        add_generation_prompt: end with what opens the assistant's turn.

    Raises:
        ModelError: there is no template; it refuses the messages; or it does not end.
    """
    return str(_apply(tokenizer, messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))


def chat_prompt(tokenizer: Any, messages: Messages, *, tools: Sequence[Any] | None = None) -> list[int]:
    """Token ids of messages that the model is to answer.

    Raises:
        ModelError: as `chat_text`.
    """
    return _encode(tokenizer, chat_text(tokenizer, messages, tools=tools))


def chat_pieces(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> list[tuple[str, bool]]:
    """The text of a whole conversation in pieces, each with whether the assistant says it.

    A template that marks what the assistant says (``{% generation %}``) is believed. Else an assistant's turn is what
    the template adds to the prompt that it answers, up to the token that ends it.

    Raises:
        ModelError: as `chat_text`; or the template marks nothing and renders a turn in another way once others follow.
    """
    if _GENERATION.search(str(getattr(tokenizer, "chat_template", None))):
        return list(_marked_pieces(tokenizer, messages, tools))
    return list(_added_pieces(tokenizer, messages, tools))


def encode_pieces(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of consecutive pieces of a text, and the characters of its piece that each token stands for.

    Pieces are tokenised one by one, as prompt and answer are when a model answers, so that no token belongs to two. But
    a tokenizer that begins every text with a space, as SentencePiece's do, would begin every piece with one, which no
    model ever reads: there the whole is tokenised, and cut where the pieces meet, unless a token stands across.
    """
    if _begins_with_space(tokenizer):
        whole = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        cut = _cut(texts, zip(whole["input_ids"], whole["offset_mapping"], strict=True))
        if cut is not None:
            return cut
    apart = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(apart["input_ids"], apart["offset_mapping"], strict=True))


def _begins_with_space(tokenizer: Any) -> bool:
    first = tokenizer("x", add_special_tokens=False).input_ids[:1]
    return str(tokenizer.convert_ids_to_tokens(first)[0]).startswith(("▁", "Ġ"))


def _cut(
    texts: Sequence[str], tokens: Iterable[tuple[int, tuple[int, int]]]
) -> list[tuple[list[int], list[tuple[int, int]]]] | None:
    """Tokens of the whole by piece; None where one stands across two pieces."""
    pieces: list[tuple[list[int], list[tuple[int, int]]]] = [([], []) for _ in texts]
    ends = list(accumulate(map(len, texts)))
    piece = 0
    for token, (start, end) in tokens:
        while piece < len(texts) - 1 and start >= ends[piece]:
            piece += 1
        if end > ends[piece]:
            return None
        first = ends[piece] - len(texts[piece])
        pieces[piece][0].append(token)
        pieces[piece][1].append((max(0, start - first), end - first))
    return pieces


def _apply(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    """What ``apply_chat_template`` gives, within bounds."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(turn) for turn in messages]
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template; choose a chat model, or render the messages yourself")
    with _clear_errors(turns):
        return tokenizer.apply_chat_template(turns, **options)


@contextmanager
def _clear_errors(turns: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Bounds what a template does with these turns, and makes one sentence of its errors."""
    try:
        with _bounded(_SECONDS):
            yield
    except _EndlessError:
        raise ModelError(
            f"the chat template did not end within {_SECONDS:g} s; the model's template is faulty, choose another model"
        ) from None
    except Exception as error:  # a template can raise whatever Python can
        raise ModelError(
            f"the chat template refuses these {len(turns)} messages (roles: "
            f"{', '.join(str(turn.get('role')) for turn in turns)}): {first_line(error)}"
        ) from None


def _marked_pieces(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> Iterator[tuple[str, bool]]:
    """As the template marks them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [dict(turn) for turn in messages]
    with _clear_errors(turns):
        (whole,), (spans,) = render_jinja_template(
            conversations=[turns],
            tools=None if tools is None else list(tools),
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    done = 0
    for start, end in spans:
        yield whole[done:start], False
        yield whole[start:end], True
        done = end
    yield whole[done:], False


def _added_pieces(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> Iterator[tuple[str, bool]]:
    """An assistant's turn is what is added to the prompt that it answers."""
    whole = chat_text(tokenizer, messages, tools=tools, add_generation_prompt=False)
    done = 0
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = chat_text(tokenizer, messages[:index], tools=tools)
        is_last = index == len(messages) - 1
        through = messages[: index + 1]
        after = whole if is_last else chat_text(tokenizer, through, tools=tools, add_generation_prompt=False)
        if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
            raise ModelError(
                f"the chat template renders turn {index + 1} of {len(messages)} in another way once others follow it, "
                "so what the assistant says cannot be told apart; train on single turns, or with another template"
            )
        said = after[len(before) :]
        said = said[: _end_of_turn(tokenizer, said)[1]]
        yield whole[done : len(before)], False
        yield said, True
        done = len(before) + len(said)
    yield whole[done:], False


def without_end(tokenizer: Any, turn: str) -> str:
    """What the assistant says in a piece of `chat_pieces`, without the special token that ends its turn."""
    return turn[: _end_of_turn(tokenizer, turn)[0]]


def _end_of_turn(tokenizer: Any, turn: str) -> tuple[int, int]:
    """Where the special token stands that ends a turn, if one does; a line end behind it is the template's."""
    end = turn.rstrip()
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    endings = [token for token in (named | set(tokenizer.all_special_tokens)) if token and end.endswith(token)]
    return (len(end) - max(map(len, endings)), len(end)) if endings else (len(turn), len(turn))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class _EndlessError(Exception):
    """A template runs for too long."""


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Ends what runs in a template of jinja, in this thread, after so long: its loops are loops of Python."""
    end = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _EndlessError
        return watch if frame.f_code.co_filename.startswith("<") else None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)

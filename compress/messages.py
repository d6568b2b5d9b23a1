"""Chat messages: roles, tool calls and attachments stay, texts are compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from terselm.compress.layout import Layout
from terselm.compress.length import Count, Length
from terselm.compress.prompt import Part, Prompt
from terselm.compress.result import CompressionResult
from terselm.errors import BudgetError, PromptError

Message = Mapping[str, Any]
Place = tuple[int, int]  # message, text within the message
Span = tuple[Part, int, int, int]  # part, number of the demonstration, first character, last character + 1

_SYSTEM = ("system", "developer")
_GLUE = "\n\n"


@dataclass(frozen=True, kw_only=True)
class ChatResult:
    """Compressed chat messages.

    Attributes:
        messages: new dictionaries; a message with nothing left (no text, tool call, or attachment) is not among them.
        original_tokens, compressed_tokens: of all texts, each counted by itself; roles and tool calls are not counted.
        budget: compressed_tokens never exceeds it.
        result: the decisions; a demonstration is a turn: what the user said and all that follows until the next time.
    """

    messages: list[dict[str, Any]]
    original_tokens: int
    compressed_tokens: int
    budget: int
    result: CompressionResult


class Chat:
    """Messages as the parts of a prompt.

    The first message is the instruction if it is the system's, the last text of the user's last message is the
    question, and every turn is a demonstration: its texts with blank lines between.

    Raises:
        PromptError: messages that are not of OpenAI's form, or hold no text.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._texts = {
            (number, index): text for number, message in enumerate(messages) for index, text in _texts(number, message)
        }
        if not any(self._texts.values()):
            raise PromptError("the messages hold no text; nothing can be compressed")
        question = max((place for place in self._texts if messages[place[0]]["role"] == "user"), default=None)
        turns: list[list[Place]] = []
        instruction: list[Place] = []
        before = None
        for place in self._texts:
            role = messages[place[0]]["role"]
            if role in _SYSTEM and place[0] == 0:
                instruction.append(place)
            elif place != question:
                if not turns or (role == "user" and place[0] != before):
                    turns.append([])
                turns[-1].append(place)
                before = place[0]
        self._places = {(Part.DEMONSTRATION, number): turn for number, turn in enumerate(turns)}
        self._places |= {(Part.INSTRUCTION, 0): instruction, (Part.QUESTION, 0): [question] if question else []}

    def prompt(self) -> Prompt:
        texts = {piece: _GLUE.join(self._texts[place] for place in places) for piece, places in self._places.items()}
        question, instruction = texts.pop((Part.QUESTION, 0)), texts.pop((Part.INSTRUCTION, 0))
        return Prompt(instruction=instruction, demonstrations=list(texts.values()), question=question)

    def texts(self) -> list[str]:
        return list(self._texts.values())

    def kept(self, spans: Iterable[Span]) -> dict[Place, str]:
        """What is left of every text where these spans of the prompt are kept."""
        kept = dict.fromkeys(self._texts, "")
        begins: dict[Place, int] = {}  # where each text begins in the piece that it is a part of
        for places in self._places.values():
            lengths = (len(self._texts[place]) + len(_GLUE) for place in places)
            begins |= zip(places, accumulate(lengths, initial=0), strict=False)
        for part, index, start, end in spans:
            for place in self._places[part, index]:
                kept[place] += self._texts[place][max(0, start - begins[place]) : max(0, end - begins[place])]
        return kept

    def rebuilt(self, kept: Mapping[Place, str]) -> list[dict[str, Any]]:
        """The messages with these texts, without those of which nothing is left."""
        rebuilt = []
        for number, message in enumerate(self._messages):
            content = message.get("content")
            if isinstance(content, str):
                left: Any = kept[number, 0]
            else:
                left = content and [
                    {**part, "text": kept[number, index]} if (number, index) in kept else part
                    for index, part in enumerate(content)
                    if (number, index) not in kept or kept[number, index]
                ]
            if left or message["role"] == "tool" or message.get("tool_calls") or message.get("function_call"):
                rebuilt.append({**message, "content": left} if "content" in message else dict(message))
        return rebuilt


def compress_chat(
    messages: Sequence[Message],
    length: Length,
    *,
    count: Count,
    compress: Callable[[Prompt, int], CompressionResult],
    layout_of: Callable[[Prompt], Layout],
) -> ChatResult:
    """Compress messages to a length for all their texts together.

    Args:
        compress: a prompt to a budget, in tokens of ``count``.
        layout_of: a prompt with what must survive.

    Raises:
        BudgetError: a budget that holds nothing of the messages, or less than what must survive.
        PromptError: see `Chat`.
    """
    chat = Chat(messages)
    prompt = chat.prompt()
    original = sum(map(count, chat.texts()))
    budget = length.tokens(original, lambda: _smallest(chat, layout_of(prompt), count))
    asked = budget if original > budget else 2 * budget + count(_GLUE.join(chat.texts()))  # then nothing is dropped
    while True:
        try:
            result = compress(prompt, max(1, asked))
        except BudgetError as error:
            raise _too_small(budget, error.smallest or 1, _smallest(chat, layout_of(prompt), count)) from None
        kept = chat.kept((token.part, token.index, token.start, token.end) for token in result.tokens if token.kept)
        size = sum(count(text) for text in kept.values() if text)
        if size <= budget:
            break
        if asked <= 1:
            raise _too_small(budget, size)
        asked -= size - budget  # texts that are counted one by one can have more tokens than all in one
    return ChatResult(
        messages=chat.rebuilt(kept), original_tokens=original, compressed_tokens=size, budget=budget, result=result
    )


def _smallest(chat: Chat, layout: Layout, count: Count) -> int:
    """As `smallest_budget`, but each text is counted by itself."""
    units = np.flatnonzero(layout.protected)
    choices = [units] if len(units) else [np.array([unit]) for unit in range(len(layout))]
    sizes = []
    for choice in choices:
        pieces = [layout.pieces[number] for number in layout.piece_of[choice]]
        spans = zip(pieces, layout.starts[choice].tolist(), layout.ends[choice].tolist(), strict=True)
        kept = chat.kept((piece.part, piece.index, start, end) for piece, start, end in spans)
        sizes.append(sum(count(text) for text in kept.values() if text))
    return min(sizes)


def _too_small(budget: int, *sizes: int) -> BudgetError:
    """The error of a budget that failed, although what must survive might have ``sizes``."""
    smallest = max(budget + 1, *sizes)
    return BudgetError(
        f"a budget of {budget} tokens is too small for these messages; the smallest that could work is {smallest}",
        smallest=smallest,
    )


def _texts(number: int, message: Message) -> list[tuple[int, str]]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"messages[{number}] is {message!r:.60}; expected an object with role and content")
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [(0, content)]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise PromptError(f"messages[{number}].content is a {type(content).__name__}; expected a string or parts")
    return [(i, part["text"]) for i, part in enumerate(content) if part.get("type") == "text" and part.get("text")]

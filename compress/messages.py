"""Chat messages: roles, tool calls and attachments stay, texts are compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from terselm.compress.prompt import Part, Prompt
from terselm.compress.result import CompressionResult
from terselm.errors import BudgetError, PromptError

Message = Mapping[str, Any]
Place = tuple[int, int]  # message, text within the message

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
        self._question = max((place for place in self._texts if messages[place[0]]["role"] == "user"), default=None)
        self._turns: list[list[Place]] = []
        self._instruction: list[Place] = []
        before = None
        for place in self._texts:
            role = messages[place[0]]["role"]
            if role in _SYSTEM and place[0] == 0:
                self._instruction.append(place)
            elif place != self._question:
                if not self._turns or (role == "user" and place[0] != before):
                    self._turns.append([])
                self._turns[-1].append(place)
                before = place[0]

    def prompt(self) -> Prompt:
        return Prompt(
            instruction=self._join(self._instruction),
            demonstrations=[self._join(turn) for turn in self._turns],
            question=self._texts[self._question] if self._question else "",
        )

    def texts(self) -> list[str]:
        return list(self._texts.values())

    def kept(self, result: CompressionResult) -> dict[Place, str]:
        """What is left of every text."""
        kept = dict.fromkeys(self._texts, "")
        spans = {(Part.INSTRUCTION, 0): self._spans(self._instruction)}
        spans |= {(Part.DEMONSTRATION, number): self._spans(turn) for number, turn in enumerate(self._turns)}
        spans[Part.QUESTION, 0] = self._spans([self._question] if self._question else [])
        for token in result.tokens:
            if token.kept:
                for place, begin in spans[token.part, token.index]:
                    low, high = token.start - begin, token.end - begin
                    kept[place] += self._texts[place][max(0, low) : max(0, high)]
        return kept

    def rebuilt(self, kept: Mapping[Place, str]) -> list[dict[str, Any]]:
        """The messages with these texts, without those of which nothing is left."""
        rebuilt = []
        for number, message in enumerate(self._messages):
            content = message.get("content")
            if isinstance(content, str):
                left: Any = kept[number, 0]
            elif content is not None:
                left = [
                    {**part, "text": kept[number, index]} if (number, index) in kept else part
                    for index, part in enumerate(content)
                    if (number, index) not in kept or kept[number, index]
                ]
            else:
                left = None
            if left or message["role"] == "tool" or message.get("tool_calls") or message.get("function_call"):
                rebuilt.append({**message, "content": left} if "content" in message else dict(message))
        return rebuilt

    def _join(self, places: Sequence[Place]) -> str:
        return _GLUE.join(self._texts[place] for place in places)

    def _spans(self, places: Sequence[Place]) -> list[tuple[Place, int]]:
        """Where each text begins in the joined one."""
        spans, begin = [], 0
        for place in places:
            spans.append((place, begin))
            begin += len(self._texts[place]) + len(_GLUE)
        return spans


def compress_chat(
    messages: Sequence[Message],
    compress: Callable[[Prompt, int], CompressionResult],
    count: Callable[[str], int],
    *,
    budget: int | None,
    rate: float | None,
) -> ChatResult:
    """Compress messages to a budget for all their texts together.

    Args:
        compress: a prompt to a budget, in tokens of ``count``.

    Raises:
        BudgetError: a budget that holds nothing of the messages, or less than what must survive.
        PromptError: see `Chat`.
    """
    chat = Chat(messages)
    original = sum(map(count, chat.texts()))
    if budget is None:
        assert rate is not None
        budget = int(rate * original)
    prompt = chat.prompt()
    asked = budget if original > budget else 2 * budget + count(_GLUE.join(chat.texts()))  # then nothing is dropped
    while True:
        if asked < 1:
            raise BudgetError(f"a budget of {budget} tokens holds nothing of these messages")
        result = compress(prompt, asked)
        kept = chat.kept(result)
        size = sum(count(text) for text in kept.values() if text)
        if size <= budget:
            break
        asked -= size - budget  # texts that are counted one by one can have more tokens than all in one
    return ChatResult(
        messages=chat.rebuilt(kept), original_tokens=original, compressed_tokens=size, budget=budget, result=result
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

"""How many tokens a prompt may have, without its endpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from terselm.data.schema import Message

_OF_A_MESSAGE = 8
_OF_A_PROMPT = 16
_ENOUGH = 20
_MARGIN = 1.25


class PromptSizes:
    """An upper bound that tightens as answers say how long their prompts were.

    A token is at least a byte of the text; what a chat template adds is allowed for. Once enough prompts are known, a
    byte counts for the most tokens that one had in any of them, with a margin.
    """

    def __init__(self) -> None:
        self._densest = 0.0
        self._known = 0

    def bound(self, messages: Sequence[Message]) -> int:
        """Tokens that the prompt has at most."""
        density = 1.0 if self._known < _ENOUGH else min(1.0, _MARGIN * self._densest)
        return _frame(messages) + round(density * _bytes(messages)) + 1

    def learn(self, messages: Sequence[Message], tokens: int) -> None:
        """Say how long a prompt really was."""
        if tokens > 0:
            self._known += 1
            self._densest = max(self._densest, (tokens - _frame(messages)) / _bytes(messages))


def _frame(messages: Sequence[Message]) -> int:
    return _OF_A_PROMPT + _OF_A_MESSAGE * len(messages)


def _bytes(messages: Sequence[Message]) -> int:
    return sum(len(message.content.encode()) for message in messages)

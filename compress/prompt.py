"""The three parts of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from terselm.errors import PromptError


class Part(StrEnum):
    """What a piece of a prompt is for."""

    INSTRUCTION = "instruction"
    DEMONSTRATION = "demonstration"
    QUESTION = "question"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The instruction, one demonstration, or the question.

    Attributes:
        index: the number of the demonstration, from 0; 0 for the other parts.
    """

    part: Part
    index: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An instruction, demonstrations (or retrieved documents), and a question; each may be absent.

    Attributes:
        pinned: numbers, from 0, of demonstrations that take part ahead of all others, whatever their perplexity.

    Raises:
        PromptError: a text is not a string, or not valid Unicode; a pinned demonstration that there is not.
    """

    instruction: str = ""
    demonstrations: Sequence[str] = ()
    question: str = ""
    pinned: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.demonstrations, str):
            raise PromptError("demonstrations is one string; expected a list of strings")
        if not isinstance(self.demonstrations, Iterable):
            raise PromptError(f"demonstrations is a {type(self.demonstrations).__name__}; expected a list of strings")
        object.__setattr__(self, "demonstrations", tuple(self.demonstrations))
        for name, text in self._named():
            if not isinstance(text, str):
                raise PromptError(f"{name} is a {type(text).__name__}; expected a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(f"{name} holds half a surrogate pair at character {error.start}") from None
        self._check_pinned()

    def pieces(self) -> list[Piece]:
        """What is not empty, in the order instruction, demonstrations, question."""
        pieces = [Piece(part=Part.INSTRUCTION, index=0, text=self.instruction)]
        pieces += [Piece(part=Part.DEMONSTRATION, index=i, text=text) for i, text in enumerate(self.demonstrations)]
        pieces.append(Piece(part=Part.QUESTION, index=0, text=self.question))
        return [piece for piece in pieces if piece.text]

    def _check_pinned(self) -> None:
        pinned: object = self.pinned  # from a caller without types, or a row
        if isinstance(pinned, str) or not isinstance(pinned, Iterable):
            raise PromptError(f"pinned is {pinned!r}; expected a list of numbers of demonstrations")
        object.__setattr__(self, "pinned", tuple(pinned))
        count = len(self.demonstrations)
        for number in self.pinned:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
                raise PromptError(
                    f"pinned holds {number!r}, but the prompt has {count} demonstrations; they are numbered from 0"
                )

    def _named(self) -> list[tuple[str, str]]:
        named = [(f"demonstrations[{i}]", text) for i, text in enumerate(self.demonstrations)]
        return [("instruction", self.instruction), *named, ("question", self.question)]

"""One question with its prompt and its right answer, and the suite that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from terselm.compress.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt whose right answer is known.

    Attributes:
        id: unique in its suite.
        prompt: in its parts; demonstrations are examples or documents.
        gold: what should follow the prompt: the worked answer, beginning with the white space that comes first.
        answers: what a right answer says; any of them will do.
        group: items of one group share demonstrations or a task and are not independent of each other.
    """

    id: str
    prompt: Prompt
    gold: str
    answers: Sequence[str]
    group: str

    @property
    def bare(self) -> Prompt:
        """The prompt without its demonstrations."""
        return Prompt(instruction=self.prompt.instruction, question=self.prompt.question)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Items, and how an answer to them is read.

    Attributes:
        name: of the suite.
        items: at least one.
        right: whether an answer's text agrees with the item's answers; None where texts are compared instead.
        kept: whether a compressed prompt still holds the answer; None where it is not in the prompt by nature.
        short: whether right answers are a few words, so that the exact match and F1 of SQuAD say something.
        max_new_tokens: of an answer.
        stop: an answer ends before the first of these.
    """

    name: str
    items: Sequence[Item]
    right: Callable[[str, Item], bool] | None
    kept: Callable[[str, Item], bool] | None = None
    short: bool = False
    max_new_tokens: int = 400
    stop: tuple[str, ...] = ()


def full_text(prompt: Prompt, separator: str = "\n\n") -> str:
    """The prompt before compression."""
    return separator.join(piece.text for piece in prompt.pieces())

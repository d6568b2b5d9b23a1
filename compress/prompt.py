"""What a caller hands over: the three parts of a prompt, with worked examples recognised, and what must survive."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from terselm.errors import ConfigError, PromptError


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
        pinned: numbers, from 0, of demonstrations that take part ahead of all others, whatever their rank.
        ranked_for: what the demonstrations are ranked for where that is not the question; it is no part of the text.

    Raises:
        PromptError: a text is not a string, or not valid Unicode; a pinned demonstration that there is not.
    """

    instruction: str = ""
    demonstrations: Sequence[str] = ()
    question: str = ""
    pinned: Sequence[int] = ()
    ranked_for: str = ""

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

    @property
    def asks(self) -> str:
        """What the demonstrations are ranked for."""
        return self.ranked_for or self.question

    @property
    def holds_worked_examples(self) -> bool:
        """Whether two or more demonstrations, and all of them, begin as the question does.

        With a word such as "Question:" or "###": one that is not all letters.
        """
        texts = [self.question, *filter(str.strip, self.demonstrations)]
        opening, *others = (text.split(maxsplit=1)[:1] for text in texts)
        labelled = bool(opening) and not opening[0].isalpha()
        return labelled and len(others) > 1 and all(other == opening for other in others)

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
        return [("instruction", self.instruction), *named, ("question", self.question), ("ranked_for", self.ranked_for)]


PROMPT_KEYS = tuple(field.name for field in fields(Prompt) if field.name != "ranked_for")
"""The keys of a prompt that is written as a JSON object."""


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
_BEFORE_LABEL = re.compile(r".*(?:[:=>→|](?:\s|$)|：|\bis(?:\s|$))")
_LONGEST_LABEL = 3  # words


def labels_of(examples: Sequence[str]) -> list[str] | None:
    """What each of some worked examples answers, where these are classes: short, and some of them the same.

    Returns:
        None where they are not: an example without a label, one label for all, or as many as examples.
    """
    labels = [_label(text) for text in examples]
    return labels if all(labels) and 1 < len(set(labels)) < len(labels) else None


def most_similar(question: str, examples: Sequence[str]) -> int | None:
    """The number of the worked example whose words are most like the question's, the later of equals.

    The cosine of the sets of words, each weighted by the logarithm of how rare it is among the examples: words of the
    template count nothing, and the rules need no model.

    Returns:
        None where no example shares a word with the question that the others do not share.
    """
    words = [set(_WORD.findall(text.casefold())) for text in examples]
    holders = Counter(word for mine in words for word in mine)
    square = {word: math.log(len(examples) / count) ** 2 for word, count in holders.items()}
    asked = set(_WORD.findall(question.casefold()))
    best, place = 0.0, None
    for number, mine in enumerate(words):  # sums that are exact, whatever the order of a set
        if (shared := math.fsum(square[word] for word in mine & asked)) > 0:
            similarity = shared / math.sqrt(math.fsum(square[word] for word in mine))
            if similarity >= best:
                best, place = similarity, number
    return place


def _label(example: str) -> str:
    """What the last line says, after what announces it; empty if that is long."""
    line = example.strip().rsplit("\n", 1)[-1]
    announced = _BEFORE_LABEL.match(line)
    label = line[announced.end() if announced else 0 :].strip(" \t\r.!").casefold()
    return label if len(label.split()) <= _LONGEST_LABEL else ""


class Preset(StrEnum):
    """Kinds of span that callers often want to keep."""

    NUMBERS = "numbers"
    URLS = "urls"
    CODE_FENCES = "code_fences"


Keep = str | re.Pattern[str] | Preset

_PATTERNS = {
    Preset.NUMBERS: re.compile(r"[+-]?\d+(?:[.,:/]\d+)*%?"),
    Preset.URLS: re.compile(r"(?:https?|ftp)://[^\s<>\"')\]]+|www\.[^\s<>\"')\]]+"),
    Preset.CODE_FENCES: re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE),
}


def compile_keep(keep: Sequence[Keep]) -> list[re.Pattern[str]]:
    """Patterns for literal strings, compiled regular expressions and presets.

    Raises:
        ConfigError: an empty literal, or something of another type.
    """
    if isinstance(keep, str | re.Pattern):
        keep = [keep]
    patterns = []
    for item in keep:
        if isinstance(item, Preset):
            patterns.append(_PATTERNS[item])
        elif isinstance(item, re.Pattern) and isinstance(item.pattern, str):
            patterns.append(item)
        elif isinstance(item, str) and item:
            patterns.append(re.compile(re.escape(item)))
        else:
            raise ConfigError(f"keep holds {item!r}; expected a non-empty string, a compiled str pattern or a Preset")
    return patterns

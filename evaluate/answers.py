"""Reading the final answer out of what a target wrote, and comparing it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_CLAIM = re.compile(r"answer is:?", re.IGNORECASE)
_MARK = re.compile(r"^\s*####\s*(.+)$", re.MULTILINE)
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def maths_answer(text: str) -> str | None:
    """The final number: that after ``####``, else the last up to the end of the first line that says "answer is".

    Source: the evaluation of LLMLingua's GSM8K example.
    """
    if mark := _MARK.search(text):
        found = _NUMBER.findall(mark[1])
    else:
        lines = text.split("\n")
        last = next((i for i, line in enumerate(lines) if _CLAIM.search(line)), len(lines))
        found = _NUMBER.findall("\n".join(lines[: last + 1]))
    return found[-1] if found else None


def same_number(a: str, b: str) -> bool:
    """``1,080.00`` and ``1080`` are the same."""
    try:
        return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))
    except InvalidOperation:
        return False


def maths_right(text: str, answers: Sequence[str]) -> bool:
    found = maths_answer(text)
    return found is not None and any(same_number(found, answer) for answer in answers)


def claimed(text: str) -> str:
    """What stands after the first "answer is", to the end of its line and without the full stop; else the last line.

    Source: the prompts of arXiv:2210.09261, whose worked answers end with "So the answer is …."
    """
    if claim := _CLAIM.search(text):
        line = text[claim.end() :].split("\n")[0]
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        line = lines[-1] if lines else ""
    return line.strip().strip("*").strip().removesuffix(".").strip("\"'`* ")


def bbh_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer to a BIG-Bench Hard question is right: an option's letter, a word, a number or a list."""
    found = claimed(text)
    return any(_bbh_same(found, answer) for answer in answers)


def _bbh_same(found: str, answer: str) -> bool:
    if option := re.fullmatch(r"\(([A-Z])\)", answer):
        letters = _OPTION.findall(found) or _BARE_OPTION.findall(found)
        return bool(letters) and letters[0] == option[1]
    if re.fullmatch(r"-?\d+", answer):
        numbers = _NUMBER.findall(found)
        return bool(numbers) and same_number(numbers[-1], answer)
    if answer.lower() in ("yes", "no", "true", "false", "valid", "invalid"):
        first = re.search(r"[a-z]+", found.lower())
        return first is not None and first[0] == answer.lower()
    return _words(found) == _words(answer)


def _words(text: str) -> list[str]:
    """The members of a list, whatever stands between them: spaces, commas, or nothing between brackets."""
    if not re.search(r"\w", text):
        return [character for character in text if not character.isspace() and character != ","]
    return re.sub(r"[,;\"'`]", " ", text.lower()).split()


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces.

    Source: the evaluation script of SQuAD 1.1, which open-domain question answering uses.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def short_answer_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer stands in the answer's first line, both normalised.

    Source: the accuracy of arXiv:2307.03172 (Lost in the Middle), by whole words.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    return bool(lines) and holds_answer(lines[0], answers)


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer stands in a text as whole words, both normalised."""
    padded = f" {normalised(text)} "
    return any(f" {normalised(answer)} " in padded for answer in answers if normalised(answer))

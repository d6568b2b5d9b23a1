"""Simple ways of shortening, on prompts that can be checked by eye. Tokens are words here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from terselm import Prompt
from terselm.evaluate.baselines import BASELINES, Tools, phrases, sentences, words
from terselm.evaluate.items import full_text

PROMPT = Prompt(
    instruction="Do it.",
    demonstrations=["one two three. four five.", "six seven", "eight nine ten. eleven apples twelve"],
    question="How many apples?",
)


def surprisals(text: str, spans: Sequence[tuple[int, int]]) -> list[float]:
    """Longer is more surprising."""
    return [float(end - start) for start, end in spans]


TOOLS = Tools(count=lambda text: len(text.split()), surprisals=surprisals, seed=0)


def shorten(name: str, budget: int) -> list[str]:
    return list(BASELINES[name](PROMPT, budget, TOOLS).demonstrations)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("budget", range(1, 20))
def test_budget_is_kept_and_instruction_and_question_stay(name: str, budget: int) -> None:
    shortened = BASELINES[name](PROMPT, budget, TOOLS)
    assert (shortened.instruction, shortened.question) == (PROMPT.instruction, PROMPT.question)
    assert TOOLS.count(full_text(shortened)) <= max(budget, 5)
    if budget >= TOOLS.count(full_text(PROMPT)):
        assert "".join(full_text(shortened).split()) == "".join(full_text(PROMPT).split())
    elif "demonstrations" not in name and "sentence" not in name and "context" not in name:
        assert TOOLS.count(full_text(shortened)) == max(budget, 5)


def test_truncation() -> None:
    assert shorten("truncate", 9) == ["ten. eleven apples twelve"]
    assert shorten("truncate", 12) == ["seven", "eight nine ten. eleven apples twelve"]
    assert shorten("truncate-end", 9) == ["one two three. four"]
    assert shorten("truncate-end", 11) == ["one two three. four five.", "six"]


def test_whole_demonstrations() -> None:
    assert shorten("demonstrations-last", 13) == ["six seven", PROMPT.demonstrations[2]]
    assert shorten("demonstrations-last", 10) == ["six seven"]  # the last does not fit
    assert shorten("demonstrations-perplexity", 11) == [PROMPT.demonstrations[2]]
    assert shorten("demonstrations-similar", 11) == [PROMPT.demonstrations[2]]  # it names apples


def test_sentences_by_surprisal() -> None:
    assert shorten("selective-sentences", 9) == ["eleven apples twelve"]
    assert shorten("selective-sentences", 14) == ["one two three.", PROMPT.demonstrations[2]]


def test_random_choices_stay_the_same() -> None:
    for name in ("random-words", "demonstrations-random", "sentences-random"):
        assert shorten(name, 12) == shorten(name, 12)
    other = Tools(count=TOOLS.count, surprisals=surprisals, seed=1)
    assert [BASELINES["random-words"](PROMPT, 12, other)] != [BASELINES["random-words"](PROMPT, 12, TOOLS)]


@pytest.mark.parametrize(
    ("cut", "text", "expected"),
    [
        (words, " a  b\nc", [" a", "  b", "\nc"]),
        (sentences, 'He ran. "Why?" 3.5 km.\n\nEnd', ["He ran.", ' "Why?"', " 3.5 km.\n\n", "End"]),
        (phrases, "The big dog of the man ran, fast", ["The big dog", " of", " the man ran,", " fast"]),
    ],
)
def test_spans(cut: object, text: str, expected: list[str]) -> None:
    found = [text[start:end] for start, end in cut(text)]  # type: ignore[operator]
    assert found == expected

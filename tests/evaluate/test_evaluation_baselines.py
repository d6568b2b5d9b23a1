"""Simple ways of shortening, on prompts that can be checked by eye. Tokens are words here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import random_lm

from terselm import Prompt
from terselm.compress.ranking import Ranking
from terselm.compress.settings import RankBy
from terselm.evaluate.baselines import BASELINES, Rankers, Tools, phrases, sentences, words
from terselm.evaluate.items import full_text

PROMPT = Prompt(
    instruction="Do it.",
    demonstrations=["one two three. four five.", "six seven", "eight nine ten. eleven apples twelve"],
    question="How many apples?",
)


def surprisals(text: str, spans: Sequence[tuple[int, int]]) -> list[float]:
    """Longer is more surprising."""
    return [float(end - start) for start, end in spans]


class ByApples:
    """Texts that name apples first, the shorter before the longer."""

    def rank(self, asked: Sequence[tuple[str, Sequence[str]]], *, whole: bool) -> list[Ranking]:
        return [Ranking(scores=np.array([10.0 * ("apples" in t) - len(t) / 100 for t in texts])) for _, texts in asked]


TOOLS = Tools(count=lambda text: len(text.split()), surprisals=surprisals, seed=0, ranker=lambda rank_by: ByApples())


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
    elif not {"demonstrations", "documents", "sentences", "context"} & set(name.split("-")):
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


@pytest.mark.parametrize("name", ["bm25-sentences", "minilm-sentences", "question-sentences"])
def test_whole_sentences_by_rank_in_their_order(name: str) -> None:
    assert shorten(name, 8) == ["eleven apples twelve"]
    assert shorten(name, 11) == ["six seven", "eleven apples twelve"]
    assert shorten(name, 14) == ["four five.", "six seven", "eleven apples twelve"]
    assert shorten(name, 15) == ["one two three. four five.", "six seven", "eleven apples twelve"]


@pytest.mark.parametrize("name", ["documents-ranked", "documents-bm25"])
def test_whole_documents_by_rank(name: str) -> None:
    assert shorten(name, 11) == [PROMPT.demonstrations[2]]
    assert shorten(name, 13) == ["six seven", PROMPT.demonstrations[2]]


def test_without_a_question_the_first_sentences_stay() -> None:
    prompt = replace(PROMPT, question="")
    assert list(BASELINES["bm25-sentences"](prompt, 6, TOOLS).demonstrations) == ["one two three."]


def test_the_small_lm_ranks_as_the_compressor_does() -> None:
    lm = random_lm()
    texts = ["one two three", "Sam had 12 apples", "the cat sat"]
    question = "Question: How many apples?"
    (ranking,) = Rankers(lambda: lm, "cpu")(RankBy.QUESTION).rank([(question, texts)], whole=False)
    tail = lm.tokenizer("\n\nQuestion: How many apples?", add_special_tokens=False).input_ids
    for text, score in zip(texts, ranking.scores, strict=True):
        before = [lm.start_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]
        with torch.inference_mode():
            log_p = lm.model(torch.tensor([before + tail])).logits[0].log_softmax(-1)
        expected = np.mean([log_p[len(before) - 1 + i, token].item() for i, token in enumerate(tail)])
        assert score == pytest.approx(expected, abs=1e-4)


def test_bm25_finds_the_words_of_the_question() -> None:
    pytest.importorskip("bm25s")
    tools = replace(TOOLS, ranker=Rankers(random_lm, "cpu"))
    assert list(BASELINES["bm25-sentences"](PROMPT, 8, tools).demonstrations) == ["eleven apples twelve"]
    assert list(BASELINES["documents-bm25"](PROMPT, 11, tools).demonstrations) == [PROMPT.demonstrations[2]]


def test_random_choices_stay_the_same() -> None:
    for name in ("random-words", "demonstrations-random", "sentences-random"):
        assert shorten(name, 12) == shorten(name, 12)
    other = replace(TOOLS, seed=1)
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

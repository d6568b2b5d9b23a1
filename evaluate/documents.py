"""Suites of long texts: open-domain questions over several documents, dialogues, scientific articles."""

from __future__ import annotations

import random
from collections.abc import Sequence

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError
from terselm.evaluate.answers import holds_answer, short_answer_right
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import SuiteSettings
from terselm.evaluate.sources import Row, rows, text_of

SHAREGPT_ID = "anon8231489123/ShareGPT_Vicuna_unfiltered"
ARXIV_ID = "liyucheng/arxiv-march-2023"
_NQ_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)
_PASSAGE_WORDS = 300


def load_nq(settings: SuiteSettings) -> Suite:
    """Questions whose passage stands among passages of other questions, at a place drawn by the seed.

    Rows have ``question``, ``answers`` and ``ctxs`` (``title``, ``text``, the first of them gold or marked ``isgold``).

    Source: the prompts of arXiv:2307.03172, whose data (github.com/nelson-liu/lost-in-the-middle) is not on the hub.

    Raises:
        ConfigError: no file, or rows of another form.
    """
    if settings.data is None:
        raise ConfigError("the nq suite reads a local file; give suite.data=FILE (JSON Lines: question, answers, ctxs)")
    found = rows(settings.data, "", None, "")
    passages = [_passage(where, row) for where, row in found]
    _enough(found, max(settings.questions, settings.documents), "nq")
    items = []
    for number in random.Random(settings.seed).sample(range(len(found)), settings.questions):
        where, row = found[number]
        answers = row.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ConfigError(f"{where}: expected a list of texts under 'answers', got {answers!r}")
        items.append(_question(number, text_of(where, row, "question"), answers, passages, settings))
    return Suite(
        name="nq",
        items=items,
        right=lambda text, item: short_answer_right(text, item.answers),
        kept=lambda text, item: holds_answer(text, item.answers),
        max_new_tokens=100,
        stop=("\n",),
    )


def _question(
    number: int, question: str, answers: Sequence[str], passages: Sequence[tuple[str, str]], settings: SuiteSettings
) -> Item:
    chance = random.Random(f"{settings.seed}/{number}")
    others = [
        i for i, (_, text) in enumerate(passages) if i != number and not holds_answer(text, answers)
    ]  # a distractor that answers the question is none
    chosen = chance.sample(others, min(settings.documents - 1, len(others)))
    chosen.insert(chance.randrange(len(chosen) + 1), number)
    documents = [f"Document [{i}](Title: {passages[n][0]}) {passages[n][1]}" for i, n in enumerate(chosen, start=1)]
    return Item(
        id=f"{number}",
        prompt=Prompt(
            instruction=_NQ_INSTRUCTION, demonstrations=documents, question=f"Question: {question.strip()}\nAnswer:"
        ),
        gold=f" {answers[0]}",
        answers=answers,
        group=f"{number}",
    )


def _passage(where: str, row: Row) -> tuple[str, str]:
    passages = row.get("ctxs")
    if not isinstance(passages, list) or not passages:
        raise ConfigError(f"{where}: expected passages under 'ctxs'")
    gold = next((passage for passage in passages if passage.get("isgold")), passages[0])
    return text_of(where, gold, "title"), text_of(where, gold, "text")


def load_sharegpt(settings: SuiteSettings) -> Suite:
    """Dialogues: all turns but the last two are to be compressed, the last question asked, the last answer compared.

    Rows have ``conversations``: a list of ``from`` (``human`` or ``gpt``) and ``value``.
    """
    found = rows(settings.data, SHAREGPT_ID, None, "train")
    usable = [(where, turns) for where, row in found if (turns := _turns(row)) is not None]
    _enough(usable, settings.questions, "sharegpt")
    items = []
    for where, turns in random.Random(settings.seed).sample(usable, settings.questions):
        question, reference = turns[-2][1], turns[-1][1]
        items.append(
            Item(
                id=where.rpartition(" ")[2].rpartition(":")[2],
                prompt=Prompt(
                    demonstrations=[f"{speaker}: {text}" for speaker, text in turns[:-2]],
                    question=f"User: {question}\nAssistant:",
                ),
                gold=f" {reference}",
                answers=(reference,),
                group=where,
            )
        )
    return Suite(name="sharegpt", items=items, right=None, stop=("\nUser:",))


def _turns(row: Row) -> list[tuple[str, str]] | None:
    """Speaker and text of each turn up to the last answer; None for a dialogue that is too short."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return None
    speakers = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}
    told = [
        (speakers[turn["from"]], turn["value"].strip())
        for turn in turns
        if isinstance(turn, dict) and turn.get("from") in speakers and str(turn.get("value", "")).strip()
    ]
    while told and told[-1][0] != "Assistant":
        told.pop()
    return told if len(told) >= 4 and told[-2][0] == "User" else None


def load_arxiv(settings: SuiteSettings) -> Suite:
    """Articles to summarise. There is no gold summary: answers are compared with that to the uncompressed article.

    Rows have ``text``. Paragraphs are the demonstrations.
    """
    found = rows(settings.data, ARXIV_ID, None, "train")
    _enough(found, settings.questions, "arxiv")
    items = [
        Item(
            id=where.rpartition(" ")[2].rpartition(":")[2],
            prompt=Prompt(
                demonstrations=_paragraphs(text_of(where, row, "text")),
                question="Summarize the article above in a few sentences.\nSummary:",
            ),
            gold="",
            answers=(),
            group=where,
        )
        for where, row in random.Random(settings.seed).sample(found, settings.questions)
    ]
    return Suite(name="arxiv", items=items, right=None, stop=("\n\n",))


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, the small ones joined up to a few hundred words."""
    joined: list[str] = []
    for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
        if joined and len(joined[-1].split()) + len(paragraph.split()) <= _PASSAGE_WORDS:
            joined[-1] += f"\n{paragraph}"
        else:
            joined.append(paragraph)
    return joined


def _enough(found: Sequence[object], wanted: int, name: str) -> None:
    if len(found) < wanted:
        raise ConfigError(f"the {name} data has {len(found)} usable rows; {wanted} are asked for")

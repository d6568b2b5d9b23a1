"""The suite ``nq``: open-domain questions whose passage stands among passages of other questions.

The prompts are those of arXiv:2307.03172, whose data (github.com/nelson-liu/lost-in-the-middle) is not on the hub: rows
with ``question``, ``answers`` and ``ctxs`` (``title``, ``text``, the first of them gold or marked ``isgold``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from terselm.compress.prompt import Prompt
from terselm.compress.ranking import Bm25Index
from terselm.errors import ConfigError
from terselm.evaluate.answers import holds_answer
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import Distractors, SuiteSettings
from terselm.evaluate.suite_rows import SuiteRow, check_enough, data_rows

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)

Passage = tuple[str, str]
"""Title and text."""


def nq_suite(settings: SuiteSettings) -> Suite:
    """Questions with ``settings.documents`` passages each, the gold one at a place drawn by the seed.

    Raises:
        ConfigError: no data, or rows of another form; for the hardest distractors, bm25s is not installed.
    """
    if settings.data is None:
        raise ConfigError("the nq suite reads a local file; give suite.data=FILE (JSON Lines: question, answers, ctxs)")
    rows = data_rows(settings)
    check_enough(rows, max(settings.questions, settings.documents), "nq")
    chosen = random.Random(settings.seed).sample(range(len(rows)), settings.questions)
    prompts = nq_prompts(rows, chosen, settings.documents, settings.seed, settings.distractors)
    items = []
    for number, prompt in zip(chosen, prompts, strict=True):
        answers = rows[number].texts("answers")
        items.append(Item(id=f"{number}", prompt=prompt, gold=f" {answers[0]}", answers=answers, group=f"{number}"))
    return Suite(
        name="nq",
        items=items,
        right=lambda text, item: holds_answer(text, item.answers),
        kept=lambda text, item: holds_answer(text, item.answers),
        short=True,
        max_new_tokens=100,
        stop=("\n",),
    )


def nq_prompts(
    rows: Sequence[SuiteRow], chosen: Sequence[int], documents: int, seed: int, distractors: Distractors
) -> list[Prompt]:
    """One prompt for each chosen row; no other passage in it holds an accepted answer."""
    passages = [_gold_passage(row) for row in rows]
    hardest = distractors is Distractors.HARDEST
    index = Bm25Index([f"{title} {text}" for title, text in passages]) if hardest else None
    prompts = []
    for number in chosen:
        question, answers = rows[number].text("question").strip(), rows[number].texts("answers")
        chance = random.Random(f"{seed}/{number}")
        order = range(len(rows)) if index is None else np.argsort(-index.scores(question), kind="stable").tolist()
        others = [i for i in order if i != number and not holds_answer(passages[i][1], answers)]
        if index is None:
            others = chance.sample(others, min(documents - 1, len(others)))
        else:
            others = others[: documents - 1]
            chance.shuffle(others)
        others.insert(chance.randrange(len(others) + 1), number)
        texts = [f"Document [{i}](Title: {passages[n][0]}) {passages[n][1]}" for i, n in enumerate(others, start=1)]
        question = f"Question: {question}\nAnswer:"
        prompts.append(Prompt(instruction=_INSTRUCTION, demonstrations=texts, question=question))
    return prompts


def _gold_passage(row: SuiteRow) -> Passage:
    passages = row.values.get("ctxs")
    if not isinstance(passages, list) or not passages:
        raise ConfigError(f"{row.where}: expected passages under 'ctxs'")
    gold = next((passage for passage in passages if passage.get("isgold")), passages[0])
    passage = SuiteRow(where=row.where, number=row.number, values=gold)
    return passage.text("title"), passage.text("text")

"""GSM8K: grade-school maths with worked answers, several examples a prompt.

Source: arXiv:2110.14168; the form of the prompt is that of arXiv:2210.00720, which arXiv:2310.05736 compresses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError, DataFormatError
from terselm.evaluate.answers import maths_right
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import SuiteSettings
from terselm.evaluate.sources import Row, rows, text_of

HUB_ID = "openai/gsm8k"
INSTRUCTION = "Please reference the following examples to answer the math question,"
_ASK = "Let's think step by step"
_CALCULATOR = re.compile(r"<<.*?>>")


def load(settings: SuiteSettings) -> Suite:
    """Questions of the test rows, shared out among demonstration sets that are drawn from the training rows.

    Raises:
        ConfigError: too few rows, or rows without question and answer.
    """
    test = rows(settings.data, HUB_ID, "main", "test")
    if len(test) < settings.questions:
        raise ConfigError(f"GSM8K has {len(test)} test rows here; {settings.questions} questions are asked for")
    questions = random.Random(settings.seed).sample(test, settings.questions)
    sets = _sets(settings)
    items = []
    for number, (where, row) in enumerate(questions):
        worked, final = _worked(where, row)
        chosen = number % len(sets)
        items.append(
            Item(
                id=f"{number}",
                prompt=Prompt(
                    instruction=INSTRUCTION,
                    demonstrations=sets[chosen],
                    question=_question(text_of(where, row, "question")),
                ),
                gold=f"\n{worked}",
                answers=(final,),
                group=f"set {chosen}",
            )
        )
    return Suite(
        name="gsm8k", items=items, right=lambda text, item: maths_right(text, item.answers), stop=("\n\n", "Question:")
    )


def _sets(settings: SuiteSettings) -> list[tuple[str, ...]]:
    if settings.prompt is not None:
        return [read_demonstrations(settings.prompt)]
    train = rows(settings.train, HUB_ID, "main", "train")
    if len(train) < settings.shots:
        raise ConfigError(f"GSM8K has {len(train)} training rows here; {settings.shots} demonstrations are asked for")
    return [
        tuple(_demonstration(where, row) for where, row in _draw(train, settings.seed, number, settings.shots))
        for number in range(settings.sets)
    ]


def _draw(train: Sequence[tuple[str, Row]], seed: int, number: int, shots: int) -> list[tuple[str, Row]]:
    return random.Random(f"{seed}/{number}").sample(train, shots)


def _demonstration(where: str, row: Row) -> str:
    return f"{_question(text_of(where, row, 'question'))}\n{_worked(where, row)[0]}"


def _question(text: str) -> str:
    return f"Question: {text.strip()}\n{_ASK}"


def _worked(where: str, row: Row) -> tuple[str, str]:
    """The steps with "The answer is …" as their end, and the final number."""
    steps, mark, final = text_of(where, row, "answer").partition("\n####")
    if not mark or not final.strip():
        raise ConfigError(f"{where}: expected an answer that ends with '#### NUMBER'")
    return f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is {final.strip()}", final.strip()


def read_demonstrations(path: Path) -> tuple[str, ...]:
    """Demonstrations that stand in a text file with blank lines between them.

    Raises:
        DataFormatError: the file cannot be read, or is blank.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(path, None, f"cannot be read: {error}") from None
    found = tuple(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
    if not found:
        raise DataFormatError(path, None, "holds no demonstrations; separate them by blank lines")
    return found

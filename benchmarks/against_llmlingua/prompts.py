"""Few-shot chain-of-thought prompts of about one length, in which no text occurs twice.

Every instruction, example and question bears a number of its own, so nothing that a compressor remembers of earlier
prompts can help it with a new one, unless it is handed the same demonstrations again on purpose.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from terselm.data.rows import read_objects
from terselm.errors import DataFormatError

BUNDLED = Path(__file__).parents[2] / "data" / "sample" / "prompts" / "few_shot_maths.json"
_INSTRUCTION = "Solve the last question step by step, in the way of the examples before it."
_ASK = "Let's think step by step."
_FEWEST_STEPS = 6  # of a demonstration: complex examples make better prompts (arXiv:2210.00720)


class Prompt(TypedDict):
    instruction: str
    demonstrations: list[str]
    question: str


@dataclass(frozen=True, kw_only=True)
class Material:
    """Texts to make prompts of. Examples and questions begin with "Question: "."""

    source: str
    instruction: str
    examples: Sequence[str]
    questions: Sequence[str]


def bundled() -> Material:
    prompt = json.loads(BUNDLED.read_text(encoding="utf-8"))
    return Material(
        source=f"bundled {BUNDLED.name}",
        instruction=prompt["instruction"],
        examples=prompt["demonstrations"],
        questions=[prompt["question"]],
    )


def gsm8k(path: Path) -> Material:
    """Examples with many steps, and questions with fewer.

    Args:
        path: JSON Lines with ``question`` and ``answer``, as published (https://github.com/openai/grade-school-math).

    Raises:
        DataFormatError: the file is not what it should be.
    """
    examples, questions = [], []
    for line, row in read_objects(path):
        steps, mark, final = str(row.get("answer", "")).partition("\n#### ")
        if not mark or not row.get("question"):
            raise DataFormatError(path, line, "expected 'question' and 'answer', the answer ending with '#### NUMBER'")
        steps = re.sub("<<.*?>>", "", steps)  # a calculator's annotations
        asked = f"Question: {row['question']}\n{_ASK}"
        if len(steps.splitlines()) >= _FEWEST_STEPS:
            examples.append(f"{asked} {steps}\nThe answer is {final}.")
        else:
            questions.append(asked)
    if not examples or not questions:
        raise DataFormatError(path, None, f"no answers of at least {_FEWEST_STEPS} steps, or none of fewer")
    return Material(source=f"GSM8K, {path.name}", instruction=_INSTRUCTION, examples=examples, questions=questions)


class PromptMaker:
    """Makes prompts of about ``tokens`` tokens, always the same ones in the same order."""

    def __init__(self, material: Material, tokens: int, count: Callable[[str], int]) -> None:
        self._material = material
        self._tokens = tokens
        self._count = count
        self._random = random.Random(0)
        self._pile: list[str] = []
        self._number = 0

    def prompt(self) -> Prompt:
        """A new instruction, new demonstrations and a new question."""
        instruction = f"Sheet {self._next_number()}. {self._material.instruction}"
        question = self.question()
        room = self._tokens - self._count(instruction) - self._count(question)
        demonstrations: list[str] = []
        while len(demonstrations) < len(self._material.examples):
            if not self._pile:
                self._pile = self._random.sample(self._material.examples, len(self._material.examples))
            text = self._numbered(self._pile[-1])
            size = self._count(f"\n\n{text}")
            if demonstrations and size / 2 > room:
                break
            demonstrations.append(text)
            self._pile.pop()
            room -= size
        return Prompt(instruction=instruction, demonstrations=demonstrations, question=question)

    def question(self) -> str:
        """A new question."""
        return self._numbered(self._random.choice(self._material.questions))

    def _numbered(self, text: str) -> str:
        return text.replace("Question:", f"Question {self._next_number()}:", 1)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def whole_text(prompt: Prompt) -> str:
    """The prompt before compression."""
    return "\n\n".join([prompt["instruction"], *prompt["demonstrations"], prompt["question"]])

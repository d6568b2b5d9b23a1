"""BIG-Bench Hard: reasoning tasks with three worked examples each.

The chain-of-thought prompts come from the authors' repository (suzgunmirac/BIG-Bench-Hard, folder cot-prompts), the
questions from there too, or from the hub. The tests have no worked answers, so the gold text is the sentence with
which the examples end: "So the answer is …."

Source: arXiv:2210.09261.
"""

from __future__ import annotations

import random
from pathlib import Path

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError
from terselm.evaluate.answers import bbh_right
from terselm.evaluate.gsm8k import read_demonstrations
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import SuiteSettings
from terselm.evaluate.sources import rows, text_of

HUB_ID = "lukaemon/bbh"
_CANARY = "-----\n"


def load(settings: SuiteSettings) -> Suite:
    """``settings.questions`` questions of every task.

    Raises:
        ConfigError: no folder of prompts, or an unknown task.
    """
    if settings.prompt is None or not settings.prompt.is_dir():
        raise ConfigError(
            f"suite.prompt is {settings.prompt}; expected the folder with BBH's chain-of-thought prompts "
            "(cot-prompts of github.com/suzgunmirac/BIG-Bench-Hard), one TASK.txt each"
        )
    there = sorted(path.stem for path in settings.prompt.glob("*.txt"))
    if missing := sorted(set(settings.tasks) - set(there)):
        raise ConfigError(f"{settings.prompt} holds no prompt for {', '.join(missing)}; there are {', '.join(there)}")
    items = [item for task in settings.tasks or there for item in _task(task, settings)]
    if not items:
        raise ConfigError(f"{settings.prompt} holds no prompts; expected one TASK.txt a task")
    return Suite(name="bbh", items=items, right=lambda text, item: bbh_right(text, item.answers), stop=("\n\nQ:",))


def _task(task: str, settings: SuiteSettings) -> list[Item]:
    assert settings.prompt is not None
    instruction, demonstrations = read_prompt(settings.prompt / f"{task}.txt")
    file = settings.data / f"{task}.json" if settings.data is not None else None
    found = rows(file, HUB_ID, task, "test")
    chosen = random.Random(f"{settings.seed}/{task}").sample(found, min(settings.questions, len(found)))
    return [
        Item(
            id=f"{task}/{number}",
            prompt=Prompt(
                instruction=instruction,
                demonstrations=demonstrations,
                question=f"Q: {text_of(where, row, 'input').strip()}\nA: Let's think step by step.",
            ),
            gold=f"\nSo the answer is {text_of(where, row, 'target').strip()}.",
            answers=(text_of(where, row, "target").strip(),),
            group=task,
        )
        for number, (where, row) in enumerate(chosen)
    ]


def read_prompt(path: Path) -> tuple[str, tuple[str, ...]]:
    """The instruction and the worked examples of a chain-of-thought prompt."""
    parts = list(read_demonstrations(path))
    parts = [part.split(_CANARY, 1)[-1] for part in parts if "canary" not in part.lower() or _CANARY in part]
    first = next((i for i, part in enumerate(parts) if part.startswith("Q:")), len(parts))
    examples: list[str] = []
    for part in parts[first:]:
        if part.startswith("Q:"):
            examples.append(part)
        else:
            examples[-1] += f"\n\n{part}"
    return "\n\n".join(parts[:first]), tuple(examples)

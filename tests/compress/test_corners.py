"""Equality with the reference on hundreds of tiny prompts, where rounding, ties and refusals decide.

``FOUND`` are seeds picked by hand: each tells the specification from one that is wrong in a single place (``<`` for
``<=`` in the selection, a chunk cut to what is left of the queue, a lost excess …).
"""

from __future__ import annotations

import random

import pytest
from agreement import Case, assert_agrees, count_bytes, count_unevenly, count_with_overhead, count_words
from fakes import random_lm

from terselm import CompressionSettings, Prompt

WORDS = ["egg", " the 12", "\n", "中", "a", "Question: Sam had", " 5 apples.", " x y z", "é 👍"]
FOUND = [
    366,
    368,
    400,
    420,
    479,
    502,
    586,
    651,
    687,
    699,
    710,
    751,
    788,
    815,
    872,
    875,
    905,
    911,
    951,
    978,
    1006,
    1072,
    1164,
    1271,
    1312,
    1337,
    1405,
    1798,
    1840,
    1866,
    1905,
    2277,
    2696,
    3223,
    3551,
]
COUNTERS = [None, None, count_bytes, count_words, count_with_overhead, count_unevenly, count_unevenly]


def small_case(seed: int) -> Case:
    chance = random.Random(seed)

    def text() -> str:
        return "".join(chance.choice(WORDS) for _ in range(chance.choice([0, 1, 1, 2, 3, 6, 12])))

    demonstrations = tuple(text() for _ in range(chance.choice([0, 1, 3, 6])))
    prompt = Prompt(instruction=text(), demonstrations=demonstrations, question=text())
    if not any([prompt.instruction, *prompt.demonstrations, prompt.question]):
        prompt = Prompt(question="a b c")
    settings = CompressionSettings(
        k=chance.choice([0.5, 1.0, 2.0, 2.0, 4.0]),
        instruction_rate=chance.choice([0.1, 0.85, None, 1.0]),
        question_rate=chance.choice([0.2, 0.9, None, 1.0]),
        segment_size=chance.choice([3, 10, 100]),
        separator=chance.choice(["\n\n", "\n\n", " ", ""]),
        unit=chance.choice(["token", "word"]),
    )
    budget, keep = chance.randrange(1, 90), chance.choice([(), (), ("12",)])
    return Case(prompt=prompt, settings=settings, budget=budget, keep=keep, counter=chance.choice(COUNTERS))


@pytest.mark.parametrize("block", range(12))
def test_small_prompts(block: int) -> None:
    for seed in range(25 * block, 25 * block + 25):
        assert_agrees(random_lm(), small_case(seed))


@pytest.mark.parametrize("seed", FOUND)
def test_found_prompts(seed: int) -> None:
    assert_agrees(random_lm(), small_case(seed))

"""Labelled prompts that can be learnt: the unit that names what the question asks for is worth the most."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tiny_training import WORDS

from terselm.data.utility import LabelledPrompt, write_labels


def label(index: int, *, documents: int = 2, units: int = 3, target: str = "teacher") -> LabelledPrompt:
    draw = random.Random(index)
    wanted = draw.choice(WORDS[:3])
    texts, spans, utility = [], [], []
    answer = draw.randrange(documents * units)
    for number in range(documents):
        text = ""
        for unit in range(units):
            words = draw.choices(WORDS[3:], k=draw.randint(2, 4))
            if number * units + unit == answer:
                words[-1] = wanted
            start = len(text)
            text += " ".join(words) + ("\n" if unit < units - 1 else "")
            spans.append((number, start, len(text)))
            utility.append(8.0 if number * units + unit == answer else draw.uniform(-0.5, 0.5))
        texts.append(text)
    return LabelledPrompt(
        id=f"p{index}",
        demonstrations=tuple(texts),
        question=wanted,
        units=tuple(spans),
        parents=(-1,) * len(spans),
        utility=tuple(utility),
        answer=wanted,
        target=target,
        masks=16,
        nats_whole=1.0,
        nats_none=9.0,
    )


def write_tiny_labels(path: Path, count: int = 60, extra: Sequence[LabelledPrompt] = ()) -> Path:
    write_labels(path, [*(label(index) for index in range(count)), *extra])
    return path

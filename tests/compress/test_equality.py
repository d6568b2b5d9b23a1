"""The compressor keeps exactly what the brute-force reference keeps, on tiny random models."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from agreement import Case, assert_agrees, count_bytes, count_unevenly, count_with_overhead, count_words
from fakes import random_lm

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.compress.prompt import Preset
from terselm.compress.settings import Order, paper_settings

INSTRUCTION = "Answer the question below. Use the examples, think step by step, and end with one number."
APPLES = "Question: Sam had 12 apples and gave 5 away.\nLet's think step by step. 12 - 5 = 7. The answer is 7."
BOOKS = "Question: A shelf holds 8 books; 3 shelves are full.\nLet's think. 3 * 8 = 24 books.\nThe answer is 24."
TRAIN = "Question: A train leaves at 9:15 and runs for 50 minutes.\nIt arrives at 10:05. The answer is 10:05."
QUESTION = "Question: Ann has 4 boxes of 6 eggs and breaks 2 eggs. How many are left?"
CHINESE = "我们今天去公园散步，天气很好，孩子们在湖边喂鸭子，老人们在树下下棋。"
JAPANESE = "日本語の文章を短くする道具です。長い説明から、大切な言葉だけを残します。"
EMOJI = "Party 👩‍👩‍👧‍👦 tonight 🎉🎉 bring 🇯🇵 flags 👍🏽 and ☕️!"
MARKS = "Ame\u0301lie e\u0323\u0301 n\u0303, Z\u0351\u036b\u0343a\u030al\u0308go\u0303; ﬁn ½ Å"
LINES = "one\r\ntwo\r\n\r\n\tthree\t\tfour  \n\n   five\u00a0six\u2003seven\n"
SPECIALS = "He wrote <|im_end|> and <s>then</s> twice: <|im_end|><|im_end|> <unk> <0x0A> ▁ Ġthe"
CODE = "```python\ndef add(a, b):\n    return a + b\n```\nSee https://example.org/a?b=1 and 1234 more."

TEXTS = [INSTRUCTION, APPLES, BOOKS, TRAIN, QUESTION, CHINESE, JAPANESE, EMOJI, MARKS, LINES, SPECIALS, CODE]
ODD_TEXTS = [" ", "\n\n", "\t", "a", "é", "👍", "x y", " \r\n ", "7"]
KINDS = ["llama", "gpt2", "gemma"]
SMALL, PAPER = CompressionSettings(segment_size=20), paper_settings(segment_size=20)


def ids_of(lm: Any, text: str) -> Any:
    return np.array(lm.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.8, 0.95])
def test_three_parts(kind: str, rate: float) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, BOOKS, TRAIN, CODE), question=QUESTION)
    result = assert_agrees(random_lm(kind), Case(prompt=prompt, settings=SMALL, rate=rate))
    assert result.compressed_tokens < result.original_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(instruction=INSTRUCTION),
        Prompt(question=QUESTION),
        Prompt(demonstrations=(APPLES,)),
        Prompt(demonstrations=(APPLES, BOOKS, TRAIN)),
        Prompt(instruction=INSTRUCTION, question=QUESTION),
        Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, BOOKS)),
        Prompt(demonstrations=(APPLES, BOOKS), question=QUESTION),
        Prompt(demonstrations=("", APPLES, "", "", BOOKS, ""), question=QUESTION),
        Prompt(instruction=" ", demonstrations=("\n", APPLES, "  \t", "\r\n\r\n"), question="\n"),
        Prompt(demonstrations=(APPLES, BOOKS, APPLES, APPLES, BOOKS)),
        Prompt(instruction=QUESTION, demonstrations=(QUESTION, QUESTION), question=QUESTION),
        Prompt(demonstrations=tuple("abcdefghij")),
        Prompt(instruction="x", demonstrations=(APPLES,) + ("y",) * 12, question="z"),
        Prompt(demonstrations=(APPLES * 6, "short", BOOKS)),
    ],
)
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("settings", [SMALL, PAPER])
def test_shapes(prompt: Prompt, rate: float, settings: CompressionSettings) -> None:
    assert_agrees(random_lm(), Case(prompt=prompt, settings=settings, rate=rate))


@pytest.mark.parametrize("pinned", [(), (2,), (3, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("order", ["original", "ranked"])
@pytest.mark.parametrize("rate", [0.2, 0.35, 0.5, 0.8])
def test_pinned_and_ranked(pinned: tuple[int, ...], order: str, rate: float) -> None:
    prompt = Prompt(
        instruction=INSTRUCTION, demonstrations=(APPLES, BOOKS, TRAIN, CODE), question=QUESTION, pinned=pinned
    )
    settings = CompressionSettings(segment_size=20, order=order)  # type: ignore[arg-type]
    assert_agrees(random_lm(), Case(prompt=prompt, settings=settings, rate=rate, keep=["eggs", "sh"]))


def test_a_pinned_demonstration_takes_the_place_of_another() -> None:
    prompt = Prompt(instruction="Answer.", demonstrations=(APPLES, BOOKS, TRAIN, CODE), question=QUESTION)
    compressor = PromptCompressor(random_lm(), settings=PAPER)
    free = compressor.compress_batch([prompt], budget=60)[0].selected
    missing = next(i for i in range(4) if i not in free)
    assert compressor.compress_batch([replace(prompt, pinned=[missing])], budget=60)[0].selected != free
    assert missing in compressor.compress_batch([replace(prompt, pinned=[missing])], budget=60)[0].selected


def test_ranked_demonstrations_stand_in_descending_order_of_perplexity() -> None:
    prompt = Prompt(instruction="Answer.", demonstrations=(APPLES, BOOKS, TRAIN, CODE), question=QUESTION)
    settings = CompressionSettings(segment_size=20, order=Order.RANKED)
    lm = random_lm()
    result = PromptCompressor(lm, settings=settings).compress_batch([prompt], rate=0.7)[0]
    alone = [np.mean(SurprisalEngine(lm).score_texts([ids_of(lm, text)])[0]) for text in prompt.demonstrations]
    assert result.selected == tuple(i for i in np.argsort(alone)[::-1] if i in result.selected)
    assert len(result.selected) > 1
    rebuilt = {
        i: "".join(t.text for t in result.tokens if t.part == "demonstration" and t.index == i) for i in range(4)
    }
    assert tuple(rebuilt.values()) == prompt.demonstrations


@pytest.mark.parametrize("text", TEXTS + ODD_TEXTS)
@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("kind", KINDS)
def test_units(text: str, unit: str, kind: str) -> None:
    prompt = Prompt(instruction=text, demonstrations=(text + INSTRUCTION, text), question=text)
    assert_agrees(random_lm(kind), Case(prompt=prompt, settings=CompressionSettings(unit=unit), rate=0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [24, 40, 64, 101])
@pytest.mark.parametrize("rate", [0.3, 0.7, 0.95])
def test_prompt_longer_than_the_window(kind: str, window: int, rate: float) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, BOOKS, CHINESE, TRAIN), question=QUESTION)
    assert_agrees(
        random_lm(kind, window=window), Case(prompt=prompt, settings=CompressionSettings(segment_size=16), rate=rate)
    )


@pytest.mark.parametrize("counter", [count_bytes, count_words, count_with_overhead, len])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_counters(counter: Callable[[str], int], rate: float, unit: str) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, JAPANESE, EMOJI, BOOKS), question=QUESTION)
    settings = CompressionSettings(segment_size=20, unit=unit)
    assert_agrees(random_lm(), Case(prompt=prompt, settings=settings, rate=rate, counter=counter))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": ["answer is", "eggs"]},
        {"keep": [re.compile(r"\d+"), "not there"]},
        {"keep": [re.compile(r"(?i)question:"), re.compile(r"x*")]},
        {"keep": [Preset.NUMBERS], "patterns": [re.compile(r"\d+(?::\d+)?")]},
        {"keep": [Preset.URLS], "patterns": [re.compile(r"https://\S+")]},
        {"keep": [Preset.CODE_FENCES], "patterns": [re.compile(r"```.*?```", re.DOTALL)]},
        {"keep": [APPLES]},
        {"settings": CompressionSettings(question_rate=1.0)},
        {"settings": CompressionSettings(instruction_rate=1.0, question_rate=1.0, unit="word"), "keep": ["train"]},
    ],
)
def test_keep(rate: float, options: dict[str, Any]) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, BOOKS, TRAIN, CODE), question=QUESTION)
    assert_agrees(random_lm(), Case(prompt=prompt, rate=rate, **options))


@pytest.mark.parametrize("unit", ["sentence", "line", "demonstration"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.1, 0.35, 0.6, 0.9])
def test_wide_units(unit: str, kind: str, rate: float) -> None:
    prompt = Prompt(
        instruction=INSTRUCTION, demonstrations=(APPLES, LINES, BOOKS, CHINESE, TRAIN, CODE), question=QUESTION
    )
    assert_agrees(random_lm(kind), Case(prompt=prompt, settings=CompressionSettings(unit=unit), rate=rate))


@pytest.mark.parametrize("anchor", [0.4, 1.0])
@pytest.mark.parametrize("anchor_by", ["last", "shortest"])
@pytest.mark.parametrize("unit", ["token", "word", "line", "demonstration"])
@pytest.mark.parametrize("options", [{}, {"keep": ["eggs", "apples"]}, {"counter": count_unevenly}, {"separator": ""}])
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.8])
def test_anchor(anchor: float, anchor_by: str, unit: str, options: dict[str, Any], rate: float) -> None:
    options = dict(options)
    settings = CompressionSettings(
        anchor=anchor,
        anchor_by=anchor_by,
        unit=unit,
        segment_size=30,
        question_rate=1.0,
        separator=options.pop("separator", "\n\n"),
    )
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(CODE, APPLES, TRAIN, "ok", BOOKS), question=QUESTION)
    assert_agrees(random_lm(), Case(prompt=prompt, settings=settings, rate=rate, **options))


@pytest.mark.parametrize("separator", ["", " ", "\n\n###\n\n", "<s>"])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
def test_separators(separator: str, rate: float) -> None:
    prompt = Prompt(instruction=INSTRUCTION, demonstrations=(APPLES, "ok", BOOKS, "yes", TRAIN), question=QUESTION)
    settings = CompressionSettings(separator=separator, segment_size=30)
    assert_agrees(random_lm(), Case(prompt=prompt, settings=settings, rate=rate))


@pytest.mark.parametrize("bos", [True, False])
def test_start_token(bos: bool) -> None:
    lm = random_lm(bos=bos)
    assert lm.start_id == (0 if bos else 1)
    assert_agrees(lm, Case(prompt=Prompt(demonstrations=(APPLES, BOOKS)), settings=SMALL, rate=0.4))


@pytest.mark.parametrize("budget", range(0, 120, 7))
def test_every_budget(budget: int) -> None:
    prompt = Prompt(instruction="Add the eggs.", demonstrations=(APPLES, "12 + 1 = 13", "x"), question=QUESTION)
    if budget:
        assert_agrees(random_lm(), Case(prompt=prompt, settings=SMALL, budget=budget, keep=["12"]))


@pytest.mark.parametrize("seed", range(120))
def test_random_calls(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([1, 7, 16, 30, 100])
    window = chance.choice([4096, 4096, 3 * size + 40])
    lm = random_lm(chance.choice(KINDS), window=window, bos=chance.random() < 0.8)
    settings = CompressionSettings(
        k=chance.choice([1.0, 1.5, 2.0, 2.0, 5.0]),
        instruction_rate=chance.choice([0.3, 0.85, None, 1.0]),
        question_rate=chance.choice([0.5, 0.9, None, 1.0]),
        segment_size=size,
        separator=chance.choice(["\n\n", "\n\n", " ", ""]),
        unit=chance.choice(["token", "token", "word"]) if window == 4096 else "token",
        order=Order.RANKED if seed % 3 == 0 else Order.ORIGINAL,
    )
    more = random.Random(-1 - seed)
    if seed % 2:
        settings = replace(
            settings,
            unit=more.choice(["sentence", "line", "demonstration"]) if window == 4096 else settings.unit,
            anchor=more.choice([None, 0.3, 0.8, 1.0]),
            anchor_by=more.choice(["last", "shortest"]),
        )
    case = Case(
        prompt=random_prompt(chance),
        settings=settings,
        rate=round(chance.uniform(0.03, 1.0), 3),
        keep=chance.choice([(), (), ["12"], [re.compile(r"\d+")], [re.compile(r"[A-Z]\w*"), "的"]]),
        counter=chance.choice([None, None, None, count_bytes, count_words, count_with_overhead]),
    )
    assert_agrees(lm, case)


def random_prompt(chance: random.Random) -> Prompt:
    def text() -> str:
        kind = chance.random()
        if kind < 0.15:
            return chance.choice(ODD_TEXTS)
        chosen = chance.choice(TEXTS)
        start = chance.randrange(len(chosen))
        return chosen[start:] + chance.choice(TEXTS) if kind < 0.5 else chosen[: start + 1]

    demonstrations = [
        chance.choice(["", text()]) if chance.random() < 0.2 else text() for _ in range(chance.choice([0, 1, 2, 4, 9]))
    ]
    if len(demonstrations) > 2 and chance.random() < 0.3:
        demonstrations.append(demonstrations[0])
    instruction = text() if chance.random() < 0.6 or not demonstrations else ""
    return Prompt(
        instruction=instruction,
        demonstrations=tuple(demonstrations),
        question=text() if chance.random() < 0.6 else "",
        pinned=[i for i in range(len(demonstrations)) if chance.random() < 0.1],
    )

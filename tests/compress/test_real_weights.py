"""The compressor keeps exactly what the brute-force reference keeps, on SmolLM2-135M's weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import real_prompts as p
from agreement import Case, assert_agrees

from terselm import CompressionSettings, Prompt
from terselm.compress.prompt import Preset
from terselm.models import load_causal_lm

pytestmark = pytest.mark.model

WORDS = CompressionSettings(unit="word")
CASES = {
    "few-shot, 1,500 tokens, 5x": Case(
        prompt=Prompt(instruction=p.INSTRUCTION, demonstrations=p.WORKED, question=p.QUESTION), rate=0.2
    ),
    "few-shot, the defaults": Case(
        prompt=Prompt(instruction=p.INSTRUCTION, demonstrations=p.WORKED, question=p.QUESTION),
        budget=500,
        settings=CompressionSettings(),
    ),
    "documents, the defaults": Case(
        prompt=Prompt(instruction="Answer.", demonstrations=p.DOCUMENTS, question="Who asked for a key?"),
        rate=0.3,
        settings=CompressionSettings(),
    ),
    "few-shot, 400 tokens": Case(prompt=Prompt(demonstrations=p.WORKED[:4], question=p.QUESTION), budget=400),
    "long text, half": Case(prompt=Prompt(demonstrations=("\n\n".join(p.WORKED[:6]),)), rate=0.5),
    "documents": Case(
        prompt=Prompt(
            instruction="Answer from the documents.", demonstrations=p.DOCUMENTS, question="Who asked for a key?"
        ),
        rate=0.6,
    ),
    "documents without a question": Case(prompt=Prompt(instruction="Sum up.", demonstrations=p.DOCUMENTS), rate=0.3),
    "instruction and question, squeezed": Case(prompt=Prompt(instruction=p.INSTRUCTION, question=p.QUESTION), rate=0.4),
    "instruction alone": Case(prompt=Prompt(instruction=p.INSTRUCTION), rate=0.5),
    "question alone": Case(prompt=Prompt(question=p.QUESTION), rate=0.7),
    "20 tokens": Case(prompt=Prompt(demonstrations=(p.SHORT,)), rate=0.5),
    "Chinese": Case(prompt=Prompt(instruction="总结下面的文字。", demonstrations=(p.CHINESE,)), rate=0.4),
    "Chinese by words": Case(
        prompt=Prompt(demonstrations=(p.CHINESE, p.SHORT), question="几名学生？"), rate=0.6, settings=WORDS
    ),
    "Japanese": Case(prompt=Prompt(demonstrations=(p.JAPANESE,), question="何時に出発しますか。"), rate=0.5),
    "emoji": Case(prompt=Prompt(demonstrations=(p.EMOJI, p.SHORT)), rate=0.5),
    "combining marks, CRLF, right to left": Case(
        prompt=Prompt(instruction=p.MARKS, demonstrations=(p.MARKS, "")), rate=0.6
    ),
    "code": Case(prompt=Prompt(demonstrations=(p.CODE,)), rate=0.5),
    "code, presets kept": Case(
        prompt=Prompt(instruction="Review.", demonstrations=(p.CODE, p.DOCUMENTS[0]), question="What fails?"),
        rate=0.8,
        keep=[Preset.CODE_FENCES, Preset.URLS],
        patterns=[re.compile(r"```.*?```", re.DOTALL), re.compile(r"https://\S+")],
    ),
    "numbers and a word kept": Case(
        prompt=Prompt(instruction=p.INSTRUCTION, demonstrations=p.WORKED[4:8], question=p.QUESTION),
        rate=0.35,
        keep=[re.compile(r"\d+"), "The answer is"],
    ),
    "special tokens as text": Case(
        prompt=Prompt(instruction=p.SPECIALS, question="Which token ends a turn, <|im_end|> or <s>?"), rate=0.6
    ),
    "words": Case(
        prompt=Prompt(instruction=p.INSTRUCTION, demonstrations=p.DOCUMENTS, question=p.QUESTION),
        rate=0.5,
        settings=WORDS,
    ),
    "question untouched": Case(
        prompt=Prompt(demonstrations=p.WORKED[:3], question=p.QUESTION),
        rate=0.5,
        settings=CompressionSettings(question_rate=1.0, segment_size=60),
    ),
    "bytes": Case(
        prompt=Prompt(instruction=p.INSTRUCTION, demonstrations=(p.CHINESE, p.DOCUMENTS[1]), question=p.EMOJI),
        budget=700,
        counter=lambda text: len(text.encode()),
    ),
}


@pytest.fixture(scope="module")
def lm() -> Any:
    return load_causal_lm("smollm2-135m", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_references_tokens(lm: Any, name: str) -> None:
    result = assert_agrees(lm, CASES[name])
    assert result.compressed_tokens < result.original_tokens
    if name.startswith("few-shot, 1,500"):
        assert result.original_tokens >= 1500
    if name == "20 tokens":
        assert result.original_tokens <= 22

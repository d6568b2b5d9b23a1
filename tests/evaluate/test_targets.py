"""A local target that is a chat model: what it reads, how it scores gold answers, and answers that are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import bytes_tokenizer, random_lm

from terselm.data.generate import Limits, Query, generate
from terselm.errors import ConfigError, ContextLengthError
from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.run import evaluate
from terselm.evaluate.settings import EvaluateSettings, SuiteName, SuiteSettings, TargetSettings
from terselm.evaluate.targets import LocalTarget
from terselm.models import CausalLM
from terselm.models.chat import chat_prompt

CHATML = (
    "{% for m in messages %}<|im_end|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>assistant\n{% endif %}"
)
WITH_START = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
PROMPTS = ["Sam had 12 apples.", "He", "How many apples does he have left?"]


def chat_lm(template: str | None) -> CausalLM:
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    tokenizer.chat_template = template
    return replace(random_lm(), tokenizer=tokenizer, name="chatty")


@pytest.mark.parametrize("template", [CHATML, WITH_START])
def test_gold_follows_what_opens_the_assistants_turn(template: str) -> None:
    lm = chat_lm(template)
    golds = ["\nHe ate 5.", " 7", "It is 9"]
    scores = LocalTarget(lm).score(PROMPTS, golds)
    for prompt, gold, score in zip(PROMPTS, golds, scores, strict=True):
        before = chat_prompt(lm.tokenizer, prompt)
        wanted = lm.tokenizer(gold.lstrip(), add_special_tokens=False).input_ids
        with torch.inference_mode():
            log_p = lm.model(torch.tensor([before + wanted])).logits[0].log_softmax(-1)
        expected = -sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(wanted))
        assert score.nats == pytest.approx(expected, abs=1e-3)
        assert score.tokens == len(wanted)


def test_answers_of_a_chat_are_whole() -> None:
    lm = chat_lm(CHATML)
    stop = ("a", "e", "i", " ", "\n")
    answers = LocalTarget(lm).generate(PROMPTS, max_new_tokens=12, stop=stop)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        query = Query(prompt=tuple(chat_prompt(lm.tokenizer, prompt)), temperature=0.0, seed=0)
        (expected,) = generate(lm, [query], Limits(max_new_tokens=12))
        assert answer == expected.text
    plain = LocalTarget(lm, "never")
    cut = plain.generate(PROMPTS, max_new_tokens=12, stop=stop)
    assert not any(end in answer for answer in cut for end in stop)
    assert plain.generate(PROMPTS, max_new_tokens=12, stop=()) != answers


def test_more_prompts_than_are_decoded_together() -> None:
    target = LocalTarget(chat_lm(CHATML))
    prompts = [f"{'very ' * (i % 5)}{i}" for i in range(19)]
    single = [target.generate([prompt], max_new_tokens=3, stop=())[0] for prompt in prompts]
    assert target.generate(prompts, max_new_tokens=3, stop=()) == single
    assert target.generate([], max_new_tokens=3, stop=()) == []


def test_when_the_template_is_used() -> None:
    assert LocalTarget(chat_lm(CHATML)).chat
    assert not LocalTarget(chat_lm(CHATML), "never").chat
    assert not LocalTarget(chat_lm(None)).chat
    with pytest.raises(ConfigError, match="chat is 'always', but the tokenizer of chatty has no chat template"):
        LocalTarget(chat_lm(None), "always")
    with pytest.raises(ContextLengthError, match="do not fit into the window of 16 tokens"):
        LocalTarget(replace(chat_lm(CHATML), model=random_lm(window=16).model)).score(["word " * 20], ["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat": "perhaps"}, "target.chat is 'perhaps'; expected one of auto, always, never"),
        ({"chat": "always", "api": "completions", "base_url": "http://x/v1"}, "is always, but .* choose api chat"),
        ({"chat": "never", "base_url": "http://x/v1"}, "is never, but .* choose api completions"),
    ],
)
def test_settings_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TargetSettings(model="m", **options)


def passages(path: Path) -> Path:
    rows = [
        {"question": f"who is {i}", "answers": [f"P{i}"], "ctxs": [{"title": "T", "text": f"P{i} did it. So what?"}]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_for(data: Path, **options: Any) -> EvaluateSettings:
    return EvaluateSettings(
        suite=SuiteSettings(name=SuiteName.NQ, questions=3, documents=3, data=data),
        target=TargetSettings(model="chatty", device="cpu"),
        methods=["truncate"],
        generate=True,
        **options,
    )


def test_a_row_says_all_that_was_measured(tmp_path: Path) -> None:
    settings = settings_for(passages(tmp_path / "nq.jsonl"), budgets=["0.5"])
    figures, table = evaluate(settings, tmp_path / "out", LocalTarget(chat_lm(CHATML)))
    row = json.loads((tmp_path / "out" / JOURNAL).read_text().splitlines()[-1])
    assert row["chat"] is True
    assert {"answer_kept", "right", "exact", "f1", "nats", "gold_tokens", "tokens", "compressor_seconds"} <= row.keys()
    assert {"gain_retained", "exact_match", "answer_kept", "squad_exact", "f1", "gold_nats"} <= figures[
        2
    ].quality.keys()
    assert figures[2].against == {}
    assert "| F1 |" in table


def test_an_evaluation_in_plain_text_is_not_continued_as_a_chat(tmp_path: Path) -> None:
    data, out = passages(tmp_path / "nq.jsonl"), tmp_path / "out"
    evaluate(settings_for(data, budgets=["0.5"]), out, LocalTarget(chat_lm(CHATML), "never"))
    lines = (out / JOURNAL).read_text().splitlines()
    newer = ("exact", "f1")  # which older journals do not have
    older = [json.dumps({key: value for key, value in json.loads(line).items() if key not in newer}) for line in lines]
    (out / JOURNAL).write_text("\n".join(older) + "\n")
    more = settings_for(data, budgets=["0.5", "0.25"])
    with pytest.raises(ConfigError, match=r"read prompts as plain text; set target\.chat=never to go on with it"):
        evaluate(more, out, LocalTarget(chat_lm(CHATML)))
    figures, _ = evaluate(more, out, LocalTarget(chat_lm(CHATML), "never"))
    assert [(one.budget, one.items, "f1" in one.quality) for one in figures if one.method == "truncate"] == [
        ("0.5", 3, False),
        ("0.25", 3, True),
    ]

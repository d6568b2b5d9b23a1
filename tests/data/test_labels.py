"""Labels of utility from a target in this process, against one forward at a time, by hand."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import bigram_lm, random_lm

from terselm.compress.label_units import label_units
from terselm.compress.prompt import Prompt
from terselm.data.collection.label_plan import PromptToLabel
from terselm.data.collection.labels import LabelSummary, collect_labels
from terselm.data.collection.ledger import Ledger, ledger_of, status
from terselm.data.collection.settings import CollectSettings, LabelSettings, LogProbSettings, Options, PromptTemplate
from terselm.data.utility import LabelledPrompt, read_labels
from terselm.errors import ConfigError, ContextLengthError, DataFormatError, TargetLLMError
from terselm.models import CausalLM, scoring

DOCUMENTS = ("The cat sat on the mat. It was red.", "The dog slept. It had 12 apples.")
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)


def to_label(name: str = "a", answer: str | None = "red", documents: tuple[str, ...] = DOCUMENTS) -> PromptToLabel:
    prompt = Prompt(instruction="Read.", demonstrations=documents, question="Which colour?")
    return PromptToLabel(id=name, prompt=label_units(prompt), answer=answer)


def settings(**changes: Any) -> CollectSettings:
    plain: dict[str, Any] = {"endpoint": "local:tiny", "labels": LabelSettings(masks=16), "max_new_tokens": 12}
    return CollectSettings(**plain | changes)


def gather(
    prompts: list[PromptToLabel], out: Path, lm: CausalLM, given: CollectSettings | None = None, **options: Any
) -> tuple[LabelSummary, list[LabelledPrompt]]:
    summary = collect_labels(prompts, out, given or settings(), Options(**options), lm)
    return summary, read_labels(out)


def chat_lm() -> CausalLM:
    lm = random_lm("llama")
    tokenizer = type(lm.tokenizer)(tokenizer_object=lm.tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return dataclasses.replace(lm, tokenizer=tokenizer)


def nats_by_hand(lm: CausalLM, before: list[int], answer: str) -> float:
    """−log p of the answer, from one pass over all that is read."""
    after = lm.tokenizer(answer, add_special_tokens=False).input_ids
    logits = lm.model(input_ids=torch.tensor([[*before, *after]])).logits[0].detach().double().log_softmax(-1)
    return -sum(float(logits[len(before) - 1 + place, token]) for place, token in enumerate(after))


def ridge_by_hand(masks: list[tuple[int, ...]], nats: list[float], ridge: float) -> np.ndarray[Any, Any]:
    design = np.column_stack([np.ones(len(masks)), np.array(masks, float)])
    penalty = ridge * np.diag([0.0] + [1.0] * (design.shape[1] - 1))
    return np.linalg.solve(design.T @ design + penalty, design.T @ -np.array(nats))[1:]


@pytest.mark.parametrize("chat", [False, True])
def test_four_units_and_all_sixteen_masks(tmp_path: Path, chat: bool) -> None:
    lm = chat_lm() if chat else random_lm("llama")
    summary, (label,) = gather([to_label()], tmp_path / "labels.jsonl", lm)
    sentences = ("The cat sat on the mat.", " It was red.", "The dog slept.", " It had 12 apples.")
    assert label.unit_texts() == list(sentences)
    nats = {}
    for kept in product([0, 1], repeat=4):
        one, two, three, four = (sentence * keep for sentence, keep in zip(sentences, kept, strict=True))
        text = "\n\n".join(filter(None, ["Read.", one + two, three + four, "Which colour?"]))
        shown = f"<s>user: {text}\nbot:" if chat else text
        ids = lm.tokenizer(shown, add_special_tokens=False).input_ids
        nats[kept] = nats_by_hand(lm, ids if chat else [lm.start_id, *ids], "red" if chat else "\nred")
    expected = ridge_by_hand(list(nats), list(nats.values()), 1.0)
    np.testing.assert_allclose(label.utility, expected, atol=1e-3)
    assert label.nats_whole == pytest.approx(nats[1, 1, 1, 1], abs=1e-3)
    assert label.nats_none == pytest.approx(nats[0, 0, 0, 0], abs=1e-3)
    assert (label.masks, label.answer, label.target, label.id) == (16, "red", "tiny", "a")
    assert summary.labels == 1
    assert status(ledger_of(tmp_path / "labels.jsonl"))["requests"]["done"] == 16  # whole and none are among these


def test_known_probabilities(tmp_path: Path) -> None:
    """The answer hangs on the last word alone: p is 0.9 after "gold", which the last unit ends with, else 0.1."""
    words = ["x", "gold", "tin", "yes"]
    lm = bigram_lm(words, {"gold": {"yes": 0.9}, "tin": {"yes": 0.1}, "x": {"yes": 0.1}})
    prompt = label_units(Prompt(instruction="x", demonstrations=["x tin", "x x", "x tin", "x gold"]))
    one = PromptToLabel(id="a", prompt=prompt, answer="yes")
    _, (label,) = gather([one], tmp_path / "labels.jsonl", lm)
    np.testing.assert_allclose(label.utility[3], np.log(9) * 4 / (4 + 1), atol=1e-4)
    np.testing.assert_allclose(label.utility[:3], 0, atol=1e-4)
    assert label.nats_whole == pytest.approx(-np.log(0.9), abs=1e-4)
    assert label.nats_none == pytest.approx(-np.log(0.1), abs=1e-4)


def test_the_targets_own_answer(tmp_path: Path) -> None:
    lm, out = chat_lm(), tmp_path / "labels.jsonl"
    _, labels = gather([to_label(answer=None), to_label("b"), to_label("c", None)], out, lm)
    own = labels[0].answer
    assert (labels[1].answer, labels[2].answer) == ("red", own)
    ids = lm.tokenizer(f"<s>user: {labels[0].text()}\nbot:", add_special_tokens=False).input_ids
    with torch.no_grad():
        made = lm.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert lm.tokenizer.decode(made, skip_special_tokens=True).strip().rstrip("\ufffd") == own
    assert labels[0].nats_whole == pytest.approx(nats_by_hand(lm, ids, own), abs=1e-3)


def test_more_masks_ask_for_no_score_again(tmp_path: Path) -> None:
    lm, out = random_lm("llama"), tmp_path / "labels.jsonl"
    documents = tuple(f"One {n}. Two {n}. Three {n}." for n in range(4))
    few, many = settings(labels=LabelSettings(masks=6)), settings(labels=LabelSettings(masks=9))
    gather([to_label(documents=documents)], out, lm, few)
    summary, _ = gather([to_label(documents=documents)], out, lm, few)
    assert summary.reused == 1
    assert attempts(out) == {1: 8}
    summary, (label,) = gather([to_label(documents=documents)], out, lm, many)
    assert (summary.reused, label.masks) == (0, 9)
    assert attempts(out) == {1: 11}


def attempts(out: Path) -> dict[int, int]:
    """How many questions were asked how often."""
    with Ledger(ledger_of(out), read_only=True) as ledger:
        counts = list(ledger.attempts().values())
    return {count: counts.count(count) for count in set(counts)}


def test_a_run_that_breaks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, out = random_lm("llama"), tmp_path / "labels.jsonl"
    prompts = [to_label(str(number), answer=f"red {number}") for number in range(6)]
    _, expected = gather(prompts, tmp_path / "whole.jsonl", lm)
    finish = Ledger.finish
    breaks, seen = [0], []

    def broken(self: Ledger, outcomes: Any) -> None:
        outcomes = list(outcomes)
        breaks[0] += 1
        if breaks[0] % 4 == 0:
            raise KeyboardInterrupt
        finish(self, outcomes)
        seen.extend(outcome.request for outcome in outcomes)

    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 100)  # many passes
    monkeypatch.setattr(Ledger, "finish", broken)
    times = 0
    while True:
        try:
            _, labels = gather(prompts, out, lm)
            break
        except KeyboardInterrupt:
            times += 1
    assert times > 5
    assert labels == expected
    assert len(set(seen)) == len(seen) == 96


def test_the_form_of_plain_prompts(tmp_path: Path) -> None:
    """A template stands around the prompt, and the white space at its end is that before the answer."""
    lm = random_lm("llama")
    given = settings(templates={"default": PromptTemplate(text="In: {prompt}\nOut: ")})
    _, (label,) = gather([to_label(answer=" red")], tmp_path / "labels.jsonl", lm, given)
    ids = lm.tokenizer(f"In: {label.text()}\nOut: ", add_special_tokens=False).input_ids
    assert label.nats_whole == pytest.approx(nats_by_hand(lm, [lm.start_id, *ids], "red"), abs=1e-3)


def test_what_cannot_be_labelled(tmp_path: Path) -> None:
    lm, out = random_lm("llama", window=40), tmp_path / "labels.jsonl"
    with pytest.raises(ContextLengthError, match=r"prompt 'a' of \d+ tokens with an answer of \d+ does not fit"):
        gather([to_label()], out, lm)
    with pytest.raises(ContextLengthError, match=r"'b' of \d+ tokens .* and 1 others do not fit into .* of 40"):
        gather([to_label(), to_label("b", documents=(*DOCUMENTS, "And more."))], out, lm)
    assert not attempts(out)
    lm = random_lm("llama")
    with pytest.raises(DataFormatError, match="id 'a' comes twice"):
        gather([to_label(), to_label()], out, lm)
    with pytest.raises(ValueError, match="answer is empty"):
        to_label(answer=" ")
    with pytest.raises(ConfigError, match="m is not known to give log-probabilities of given texts"):
        collect_labels([to_label()], out, CollectSettings(endpoint="https://x/v1", model="m"))
    with pytest.raises(ConfigError, match="batch interfaces do not score given texts"):
        gather([to_label()], out, lm, batch=True)
    with pytest.raises(ConfigError, match=r"labels.masks is 1; expected at least 2; labels.ridge is 0"):
        LabelSettings(masks=1, ridge=0)


def test_labels_that_would_be_lost_are_not_written_over(tmp_path: Path) -> None:
    lm, out = random_lm("llama"), tmp_path / "labels.jsonl"
    gather([to_label()], out, lm)
    with pytest.raises(ConfigError, match=r"labels\.jsonl holds labels of 'tiny', and the target is 'other'; name ano"):
        gather([to_label()], out, lm, settings(model="other"))
    ledger_of(out).unlink()
    with pytest.raises(ConfigError, match=r"labels\.jsonl is there without its ledger labels\.jsonl\.ledger"):
        gather([to_label()], out, lm)


def test_an_own_answer_that_is_not_fit_is_listed(tmp_path: Path) -> None:
    """The end of text is all that this target says."""
    lm, out = bigram_lm(["Read."], {"<unk>": {"</s>": 0.9}}, window=200), tmp_path / "labels.jsonl"
    with pytest.raises(TargetLLMError, match=r"none of the 1 prompts could be labelled by tiny \(1 empty"):
        gather([to_label(answer=None)], out, lm)
    summary, labels = gather([to_label("b", "Read."), to_label(answer=None)], out, lm)
    assert (summary.labels, summary.without_label, summary.waiting) == (1, {"empty": 1}, 0)
    failures = [json.loads(line) for line in out.with_name("labels.failures.jsonl").read_text().splitlines()]
    assert [(one["id"], one["state"], one["reason"]) for one in failures] == [("a", "dropped", "empty")]
    assert [label.id for label in labels] == ["b"]


def test_logprobs_settings_are_not_for_labels(tmp_path: Path) -> None:
    given = settings(logprobs=LogProbSettings(keep=True, top_k=3), temperatures=[0.7, 1.0])
    _, labels = gather([to_label(answer=None)], tmp_path / "labels.jsonl", chat_lm(), given)
    assert len(labels) == 1

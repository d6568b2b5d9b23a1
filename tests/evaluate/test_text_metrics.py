"""BLEU and ROUGE as they are reported, against values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from terselm.errors import ConfigError
from terselm.evaluate.answers import bert_score, likeness
from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.run import evaluate
from terselm.evaluate.settings import EvaluateSettings, SuiteName, SuiteSettings, TargetSettings


def test_by_hand() -> None:
    # reference: 7 words; answer: 6 words, of which 5 (the cat sat on mat -> "the" "cat" "on" "the" "mat") agree
    answer, reference = "the cat lay on the mat", "the cat sat on the mat today"
    values = likeness([answer], [reference])
    # ROUGE-1: 5 of 6 and 5 of 7; ROUGE-2: "the cat", "on the", "the mat" of 5 and of 6; ROUGE-L: the 5 words in order
    assert values["rouge1"] == pytest.approx([100 * 2 * 5 / (6 + 7)])
    assert values["rouge2"] == pytest.approx([100 * 2 * 3 / (5 + 6)])
    assert values["rougeL"] == pytest.approx([100 * 2 * 5 / (6 + 7)])
    # BLEU: precisions 5/6, 3/5, 1/4 ("on the mat"), 0/3, which sacrebleu smooths to half a match; brevity exp(1 - 7/6)
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / (2 * 3)]
    expected = 100 * math.exp(1 - 7 / 6) * math.prod(precisions) ** (1 / 4)
    assert values["bleu"] == pytest.approx([expected])


def test_equal_and_unlike_texts() -> None:
    values = likeness(["a quick brown fox jumps", ""], ["a quick brown fox jumps", "something else"])
    assert values["bleu"][0] == pytest.approx(100)
    assert [values[name][0] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([100, 100, 100])
    assert [values[name][1] for name in ("bleu", "rouge1", "rouge2", "rougeL")] == [0, 0, 0, 0]


def test_bert_score_by_hand(encoder: Path) -> None:
    """Each word's best cosine, averaged over the answer's words (precision) and the reference's (recall)."""
    from transformers import AutoTokenizer, BertModel

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), BertModel.from_pretrained(encoder).eval()
    answers = ["the cat sat", "dog ran", "", "the dog ran far away from the mat ."]
    references = ["the cat sat on the mat", "a dog ran far away .", "the cat", "the cat sat ."]

    def states(text: str) -> torch.Tensor:
        with torch.inference_mode():
            last = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return torch.nn.functional.normalize(last, dim=-1)

    expected = []
    for answer, reference in zip(answers, references, strict=True):
        if not answer:
            expected.append(0.0)
            continue
        cosines = states(answer) @ states(reference).T
        precision, recall = cosines.amax(1).mean().item(), cosines.amax(0).mean().item()
        expected.append(100 * 2 * precision * recall / (precision + recall))
    assert bert_score(answers, references, str(encoder)) == pytest.approx(expected, abs=1e-3)
    assert bert_score(answers[:1], references[:1], str(encoder)) == pytest.approx(expected[:1], abs=1e-3)


def test_bert_score_without_its_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BERTScore could not get its model .*nowhere"):
        bert_score(["a"], ["b"], str(tmp_path / "nowhere"))


def test_an_evaluation_with_bert_score(encoder: Path, tiny: Path, tmp_path: Path) -> None:
    turns = [("human", "Where is the cat?"), ("gpt", "On the mat."), ("human", "And the dog?"), ("gpt", "far away")]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in turns]}]
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(
        suite=SuiteSettings(name=SuiteName.SHAREGPT, questions=1, data=data),
        target=TargetSettings(model=str(tiny), device="cpu"),
        methods=["truncate"],
        budgets=["0.5"],
        model=str(tiny),
        device="cpu",
        score=False,
        generate=True,
        bert_score=str(encoder),
    )
    figures, table = evaluate(settings, tmp_path / "out")
    entries = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    (answer,) = [entry["answer"] for entry in entries if entry.get("method") == "truncate"]
    (found,) = [one for one in figures if one.method == "truncate"]
    (expected,) = bert_score([answer], ["far away"], str(encoder))
    assert found.quality["bert_score"].value == pytest.approx(expected)
    assert "BERTScore" in table

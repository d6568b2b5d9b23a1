"""BLEU and ROUGE as they are reported, against values computed by hand."""

from __future__ import annotations

import math

import pytest

from terselm.compress.evaluation.text_metrics import likeness


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

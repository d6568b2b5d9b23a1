"""Whole evaluations with a tiny local target: figures computed by another road, kills, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import random_lm

from terselm import Prompt
from terselm.errors import ConfigError, ContextLengthError
from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.methods import Compressed, kept_words, overlap
from terselm.evaluate.opening import parse_method
from terselm.evaluate.run import evaluate
from terselm.evaluate.settings import EvaluateSettings, SuiteSettings, TargetSettings
from terselm.evaluate.targets import LocalTarget

WHOLE = "terselm:question_rate=1,instruction_rate=1"


def settings_for(data: Path, tiny: Path, **options: Any) -> EvaluateSettings:
    suite = SuiteSettings(questions=6, sets=3, shots=3, data=data / "test.jsonl", train=data / "train.jsonl")
    options = {"methods": [WHOLE, "truncate"], "budgets": ["1-shot", "half-shot"]} | options
    return EvaluateSettings(
        suite=suite,
        target=TargetSettings(model=str(tiny), device="cpu"),
        model=str(tiny),
        device="cpu",
        batch=4,
        **options,
    )


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]


def test_score_is_minus_log_p_of_the_gold_answer() -> None:
    lm = random_lm()
    prompts, golds = (
        ["Sam had 12 apples.", "He", "Question: how many apples does he have left?"],
        [" He", " ate 5.", "7"],
    )
    scores = LocalTarget(lm).score(prompts, golds)
    for prompt, gold, score in zip(prompts, golds, scores, strict=True):
        before = [lm.start_id, *lm.tokenizer(prompt, add_special_tokens=False).input_ids]
        wanted = lm.tokenizer(gold, add_special_tokens=False).input_ids
        with torch.inference_mode():
            log_p = lm.model(torch.tensor([before + wanted])).logits[0].log_softmax(-1)
        expected = -sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(wanted))
        assert score.nats == pytest.approx(expected, abs=1e-3)
        assert score.tokens == len(wanted)


def test_score_refuses_what_does_not_fit() -> None:
    with pytest.raises(ContextLengthError, match="do not fit into the window of 16 tokens"):
        LocalTarget(random_lm(window=16)).score(["word " * 20], ["x"])


def test_figures(gsm8k: Path, tiny: Path, tmp_path: Path) -> None:
    settings = settings_for(gsm8k, tiny, generate=True, oracle=True)
    figures, table = evaluate(settings, tmp_path / "out")
    found = {(one.method, one.budget): one for one in figures}
    entries = {(e["method"], e["budget"], e["id"]): e for e in entries_of(tmp_path / "out")}
    ids = [str(i) for i in range(6)]

    def mean(method: str, budget: str) -> float:
        chosen = [entries[method, budget, i] for i in ids]
        return float(np.mean([e["nats"] / e["gold_tokens"] for e in chosen]))

    zero, whole, ours = mean("zero-shot", "-"), mean("full", "-"), mean(WHOLE, "1-shot")
    gain = found[WHOLE, "1-shot"].quality["gain_retained"]
    assert gain.value == pytest.approx((zero - ours) / (zero - whole))
    assert found["zero-shot", "-"].quality["gain_retained"].value == 0
    assert found["full", "-"].quality["gain_retained"].value == pytest.approx(1)
    other = mean("truncate", "1-shot")
    difference = found["truncate", "1-shot"].against["gain_retained"]
    assert difference.value == pytest.approx((ours - other) / (zero - whole))
    assert difference.low <= difference.value <= difference.high
    assert found[WHOLE, "1-shot"].quality["oracle_overlap"].value == pytest.approx(1)  # the target compresses here
    assert found[WHOLE, "1-shot"].tokens <= np.mean([entries[WHOLE, "1-shot", i]["allowed"] for i in ids])
    assert found["full", "-"].quality["exact_match"].value == np.mean([entries["full", "-", i]["right"] for i in ids])
    assert table.count("\n| `") == 6
    assert json.loads((tmp_path / "out" / "results.json").read_text())["items"] == 6
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_of_ones_own_and_resuming_with_more(gsm8k: Path, tiny: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    class Nothing:
        def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
            calls.append(len(prompts))
            return [Compressed(text=prompt.question) for prompt in prompts]

    settings = settings_for(gsm8k, tiny, methods=["mine"], budgets=["half-shot"])
    evaluate(settings, tmp_path / "out", methods={"mine": Nothing()})
    assert sum(calls) == 6
    before = entries_of(tmp_path / "out")
    more = settings_for(gsm8k, tiny, methods=["mine", "truncate"], budgets=["half-shot"])
    evaluate(more, tmp_path / "out", methods={"mine": Nothing()})
    assert sum(calls) == 6  # nothing is done twice
    assert entries_of(tmp_path / "out")[: len(before)] == before
    with pytest.raises(ConfigError, match="holds another evaluation"):
        evaluate(settings_for(gsm8k, tiny, seed=1), tmp_path / "out")


def test_killed_runs_go_on(gsm8k: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "terselm", "evaluate", "--out", out, "--suite", "gsm8k", "--target", tiny,
        "--methods", f"{WHOLE} truncate random-words", "--budgets", "1-shot half-shot",
        f"suite.data={gsm8k / 'test.jsonl'}", f"suite.train={gsm8k / 'train.jsonl'}", "suite.questions=12",
        "suite.sets=3", "suite.shots=3", f"model={tiny}", "batch=1", "device=cpu", "target.device=cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_lines(out / JOURNAL, 12, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / JOURNAL).read_bytes().count(b"\n") < 1 + 12 * 8
    with (out / JOURNAL).open("ab") as file:
        file.write(b'{"method": "trunc')  # a torn line
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = [(e["method"], e["budget"], e["id"]) for e in entries_of(out)]
    assert len(keys) == len(set(keys)) == 12 * 8
    assert done.stdout == (out / "table.md").read_text()


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    pytest.fail("the run did not get so far")


def test_mistakes_end_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "terselm", "evaluate", "--out", tmp_path / "out", "--methods", "shortest"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: unknown method 'shortest'; expected one of terselm, llmlingua, longllmlingua" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truncate:k=2", "'k=2' is no option of truncate"),
        ("terselm:no-such", "'no-such' is no option of terselm"),
        ("terselm:k=-1", "k is -1.0; expected a number above 0"),
        ("terselm:unit=letter", "unit is 'letter'; expected one of auto, token, word"),
    ],
)
def test_unknown_options_of_methods(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


def test_method_names() -> None:
    name = parse_method("terselm:next-token,k=1.5,model=runs/mine")
    assert (name.kind, name.model, name.settings.k, name.settings.ablations.next_token) == (
        "terselm",
        "runs/mine",
        1.5,
        True,
    )


def test_methods_that_rank_for_the_question() -> None:
    settings = parse_method("terselm:rank_by=embedding,ranker=minilm-l6,unit=line,order=ranked,rank_delta=0.3").settings
    assert (settings.rank_by, settings.ranker, settings.unit) == ("embedding", "minilm-l6", "line")
    assert (settings.order, settings.rank_delta) == ("ranked", 0.3)
    assert parse_method("terselm:rank_by=question,contrast=true,unit=token").settings.contrast
    assert parse_method("longllmlingua:model=runs/mine").model == "runs/mine"


def test_overlap_of_kept_words() -> None:
    from terselm import PromptCompressor

    prompt = Prompt(demonstrations=["one two three four five six"], question="which?")
    (result,) = PromptCompressor(random_lm()).compress_batch([prompt], rate=1.0)
    words = kept_words(Compressed(text=result.text, result=result))
    assert words == {("demonstration", 0, i) for i in range(6)} | {("question", 0, 0)}
    assert overlap({("a", 0, 0), ("a", 0, 1)}, {("a", 0, 1), ("a", 0, 2)}) == 0.5
    assert overlap(set(), set()) == 1

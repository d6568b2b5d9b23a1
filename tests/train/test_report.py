"""The report of a real run: what it measures, and that it measures what the compressor would do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import Script
from typer.testing import CliRunner

from terselm.cli import app
from terselm.errors import CheckpointError, ModelError
from terselm.models import load_causal_lm
from terselm.statistics import word_spans
from terselm.train.publish import publish
from terselm.train.report.metrics import LEAST_WORDS
from terselm.train.report.reading import read_texts, read_words
from terselm.train.report.report import Measurement, read_report, write_report
from terselm.train.report.text import sentence, summary


@pytest.fixture
def run(finished: Script, tmp_path: Path) -> Path:
    shutil.copytree(finished.run, tmp_path / "run")
    return tmp_path / "run"


def test_every_run_ends_with_a_report(finished: Script) -> None:
    report = read_report(finished.run)
    assert report is not None
    held_out = finished.metrics()["held_out"]
    assert report["bits_per_byte"]["after"] == held_out["after"]["bits_per_byte"]
    assert report["bits_per_byte"]["verdict"] == "better"
    assert report["words"] is None
    assert (finished.run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_words_are_read_as_the_model_itself_would(tiny_model: Path) -> None:
    """Against a plain forward pass of transformers, each text after the start token."""
    texts = ["red green  blue\n\none 🙂 two", "count to three"]
    (found,) = read_words([str(tiny_model)], texts, device="cpu", dtype="float32")
    lm = load_causal_lm(tiny_model, device="cpu")
    for text, words in zip(texts, found, strict=True):
        encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([[lm.start_id, *encoded["input_ids"]]])
        with torch.inference_mode():
            logprobs = torch.log_softmax(lm.model(ids).logits[0, :-1].double(), -1)
        surprisals = -logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
        expected = np.zeros(len(text.split()))
        for (start, end), value in zip(encoded["offset_mapping"], surprisals, strict=True):
            first = start + len(text[start:end]) - len(text[start:end].lstrip())
            word = next(i for i, (_, stop) in enumerate(word_spans(text)) if stop > first)
            expected[word] += value
        np.testing.assert_allclose(words, expected, rtol=1e-4)


def test_a_target_that_is_the_aligned_model_itself_is_reached(run: Path, finished: Script) -> None:
    report = write_report(run, Measurement(target=str(finished.run), device="cpu"))
    words = report["words"]
    texts = read_texts(run)
    long = [text for text in texts if len(text.text.split()) >= LEAST_WORDS]
    assert (words["texts"], words["too_short"]) == (len(long), len(texts) - len(long))
    for measure in words["measures"].values():
        assert measure["after"] == pytest.approx(1.0)
        assert measure["before"] <= 1.0
    assert words["measures"]["spearman"]["before"] < 0.99
    assert words["measures"]["spearman"]["gap_closed"] == pytest.approx(1.0)
    assert json.loads((run / "report.json").read_text()) == report


def test_a_null_result_is_called_one(run: Path, tiny_model: Path) -> None:
    """The base as the target: the aligned model can only have moved away from it."""
    measure = {"difference": 0.01, "interval": [-0.02, 0.03], "verdict": "no difference shown"}
    assert sentence("spearman", measure).startswith("rank correlation of word surprisals: no difference was shown, ")
    report = write_report(run, Measurement(target=str(tiny_model), device="cpu"))
    assert report["words"]["measures"]["spearman"]["verdict"] == "worse"
    assert "gap_closed" not in report["words"]["measures"]["spearman"]
    assert "**worse**" in summary(report)


def test_the_command_prints_a_table(run: Path, finished: Script) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--target", str(finished.run), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "| kept words in common at 10× |" in done.stdout
    card = (publish(run, run.parent / "published").path / "README.md").read_text(encoding="utf-8")
    assert "## How much it agrees with the target" in card
    assert "| kept words in common at 10× |" in card


def test_a_run_that_is_not_finished_has_no_report(run: Path) -> None:
    shutil.rmtree(run / "adapter")
    with pytest.raises(CheckpointError, match="holds no finished run"):
        write_report(run, Measurement())


def test_a_target_that_is_not_there_changes_nothing(run: Path) -> None:
    before = (run / "report.json").read_bytes()
    with pytest.raises(ModelError, match=r"no model at \./nowhere"):
        write_report(run, Measurement(target="./nowhere"))
    assert (run / "report.json").read_bytes() == before


def test_a_missing_target_is_found_before_the_training(
    finished: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from terselm.train.align import main

    run = tmp_path / "run"
    assert main([*finished.command()[1:], f"run_dir={run}", "report.target=./nowhere"]) == 2
    assert "no model at ./nowhere" in capsys.readouterr().err
    assert not run.exists()

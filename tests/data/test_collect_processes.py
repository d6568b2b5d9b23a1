"""A local target spread over the processes of one launch: each its share, one ledger, one set of files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import random_lm
from test_collect import ASK, PLAIN, RUN, answers, settings, slow_settings, undated

from terselm.compress.label_units import label_units
from terselm.compress.prompt import Prompt
from terselm.data.collection.collect import collect
from terselm.data.collection.label_plan import PromptToLabel
from terselm.data.collection.labels import collect_labels
from terselm.data.collection.ledger import ledger_of, status
from terselm.data.collection.settings import LabelSettings, LogProbSettings
from terselm.data.logprobs import LogProbFile
from terselm.data.utility import read_labels
from terselm.errors import ConfigError

pytestmark = pytest.mark.slow
SCORING = RUN.replace("slow_settings", "scoring_settings").replace("test_collect", "test_collect_processes")


def scoring_settings(model: str) -> Any:
    """Each answer alone: one process has other batches than three, whose sums may be rounded otherwise."""
    return settings(
        endpoint=f"local:{model}", batch_size=1, max_new_tokens=12, logprobs=LogProbSettings(keep=True), templates=PLAIN
    )


def launch(rank: int, count: int, code: str, *arguments: Path) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments), *paths], env=environment)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    lm = random_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_three_processes_write_what_one_writes(tmp_path: Path, model: Path) -> None:
    out, alone = tmp_path / "many" / "r.jsonl", tmp_path / "one" / "r.jsonl"
    processes = [launch(rank, 3, SCORING, model, out) for rank in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    collect(ASK, alone, scoring_settings(str(model)))
    assert undated(out) == undated(alone)
    for many, one in zip(*(LogProbFile(p.with_name("r.logprobs.parquet")) for p in (out, alone)), strict=True):
        assert (many.id, many.text) == (one.id, one.text)
        assert abs(many.logprobs - one.logprobs).max() < 1e-4
    assert {path.name for path in out.parent.iterdir()} == {path.name for path in alone.parent.iterdir()}
    found = status(ledger_of(out))
    assert found["attempts"] == {"answered": status(ledger_of(alone))["attempts"]["answered"]}


LABELLING = (
    "import sys; from pathlib import Path; sys.path[:0] = sys.argv[3:]; from test_collect_processes import label; "
    "label(Path(sys.argv[1]), Path(sys.argv[2]))"
)


def label(model: Path, out: Path) -> None:
    """Some prompts with answers, others without."""
    given = settings(endpoint=f"local:{model}", max_new_tokens=12, labels=LabelSettings(masks=6))
    prompts = [Prompt(demonstrations=[f"One {n}. Two {n}. Three {n}.", "Four. Five."]) for n in range(8)]
    collect_labels(
        [
            PromptToLabel(id=f"{n}", prompt=label_units(prompt), answer=None if n % 2 else f"Two {n}")
            for n, prompt in enumerate(prompts)
        ],
        out,
        given,
    )


def test_two_processes_label_what_one_labels(tmp_path: Path, model: Path) -> None:
    out, alone = tmp_path / "many" / "labels.jsonl", tmp_path / "one" / "labels.jsonl"
    processes = [launch(rank, 2, LABELLING, model, out) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    label(model, alone)
    for many, one in zip(read_labels(out), read_labels(alone), strict=True):
        assert (many.id, many.units, many.answer, many.masks) == (one.id, one.units, one.answer, one.masks)
        assert abs(np.subtract(many.utility, one.utility)).max() < 1e-3
    assert status(ledger_of(out))["attempts"] == status(ledger_of(alone))["attempts"]


def test_a_process_that_was_killed_leaves_the_rest_to_the_next_run(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out" / "r.jsonl"
    first, second = (launch(rank, 2, RUN, model, out) for rank in range(2))
    second.kill()
    second.wait()
    while not answers(out):
        assert first.poll() is None
        time.sleep(0.05)
    with pytest.raises(ConfigError, match="another process is writing"):
        collect(ASK, out, slow_settings(str(model)))
    assert first.wait() == 0
    assert not out.exists()
    done = status(ledger_of(out))["requests"]["done"]
    summary = collect(ASK, out, slow_settings(str(model)))
    assert summary.reused == done > 0
    assert summary.waiting == 0

"""A local target spread over the processes of one launch: each its share, one ledger, one set of files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import random_lm
from test_collect import ASK, PLAIN, RUN, answers, settings, slow_settings, undated

from terselm.data.collection.collect import collect
from terselm.data.collection.ledger import ledger_of, status
from terselm.data.collection.settings import LogProbSettings
from terselm.data.logprobs import LogProbFile
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

"""Bulk runs of several processes, and what they tell of their progress."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from bulk_runs import (
    broken_off,
    bulk,
    compressor,
    names,
    never,
    read_rows,
    rows_of,
    settings,
    write_rows,
)

from terselm import progress
from terselm.compress import bulk as bulk_module
from terselm.compress.bulk import compress_file
from terselm.errors import ConfigError
from terselm.models.process import Process, current_process


def test_lines_tell_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    done = broken_off(source, out)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="terselm"):
        bulk(source, out)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == -(-(40 - done) // 7)
    assert said[-1].startswith("40 of 40 prompts, ")
    assert said[-1].endswith(" prompts/s, 0 s left")
    assert capfd.readouterr() == ("", "")
    assert [progress.duration(s) for s in (9.4, 728, 3905)] == ["9 s", "12 min 08 s", "1 h 05 min"]


def test_a_bar_tells_it_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = write_rows(tmp_path / "in.jsonl", rows_of(40))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bulk(source, tmp_path / "out.jsonl")
    assert "40/40" in terminal.getvalue()
    assert "prompt/s" in terminal.getvalue()


def test_processes_share_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other here; the first comes last and joins the shares."""
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert compress_file(source, out, compressor, settings()) is None
        lines = [entry["line"] for entry in read_rows(tmp_path / f"out.jsonl.journal-{rank}")[1:]]
        assert lines == [n + 1 for n in range(40) if n // 7 % 3 == rank]
        assert not out.exists()
    monkeypatch.setenv("RANK", "0")
    assert bulk(source, out).reused == 7 * 2 + 7 + 5
    monkeypatch.setenv("RANK", "1")  # late, when all is done
    assert compress_file(source, out, never, settings()) is None
    monkeypatch.delenv("RANK")
    bulk(source, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_another_number_of_processes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (3, 1):
        monkeypatch.setenv("RANK", str(rank))
        compress_file(source, out, compressor, settings())
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert bulk(source, out, batch_size=5).reused == 7 + (7 + 5)
    assert [row["id"] for row in read_rows(out)] == [f"r{n}" for n in range(40)]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_a_process_that_never_comes_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(bulk_module, "_POLL", 0.01)
    monkeypatch.setattr(bulk_module, "_PATIENCE", 0.1)
    with pytest.raises(ConfigError, match="19 rows are left to other processes, which have written nothing for"):
        compress_file(source, out, compressor, settings())
    monkeypatch.delenv("RANK")
    assert bulk(source, out).reused == 21


def test_the_environment_says_which_process_this_is() -> None:
    assert current_process({}) == current_process({"WORLD_SIZE": "4"}) == Process(index=0, count=1, local_index=0)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert current_process(launched) == Process(index=5, count=8, local_index=1)
    for wrong in ({"RANK": "8"}, {"RANK": "-1"}, {"RANK": "first"}, {"LOCAL_RANK": "-1"}):
        with pytest.raises(ConfigError, match="expected whole numbers with 0 <= RANK < WORLD_SIZE"):
            current_process(launched | wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_cpu_is_shared() -> None:
    for asked in ("auto", "cpu", "cuda:1"):
        assert Process(index=1, count=2, local_index=1).claim_device(asked) == asked


@pytest.mark.gpu
def test_each_process_has_its_own_gpu() -> None:
    gpus = torch.cuda.device_count()
    for local in range(2 * gpus):
        process = Process(index=local, count=2 * gpus, local_index=local)
        assert process.claim_device("auto") == process.claim_device("cuda") == f"cuda:{local % gpus}"
        assert torch.zeros(1, device="cuda").device.index == local % gpus
    assert Process().claim_device("auto") == "auto"
    assert Process(index=1, count=2, local_index=1).claim_device("cuda:0") == "cuda:0"

"""Bulk runs that go on where another stopped, and those that must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bulk_runs import (
    Died,
    breaking,
    broken_off,
    bulk,
    compressor,
    journal_of,
    names,
    never,
    rows_of,
    settings,
    write_rows,
)
from filelock import FileLock

from terselm.compress.bulk import compress_file
from terselm.compress.compressor import PromptCompressor
from terselm.compress.prompt import Preset
from terselm.compress.settings import CompressionSettings
from terselm.errors import ConfigError, DataFormatError


def test_a_machine_that_fails_is_not_the_fault_of_the_rows(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(60)), tmp_path / "out.jsonl"
    done = broken_off(source, out)
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.journal"]
    with journal_of(out).open("ab") as file:  # a write that was cut off
        file.write(b'{"line": 60, "result": {"compressed": "to')
    summary = bulk(source, out)
    assert (summary.reused, summary.rejected) == (done, 0)
    bulk(source, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 0.3}, "rate 0.4, not 0.3"),
        ({"rate": None, "budget": 9}, "budget None, not 9; rate 0.4, not None"),
        ({"model": "other"}, "model 'random', not 'other'"),
        ({"keep": [Preset.NUMBERS]}, "keep"),
        ({"counter": "smollm2-135m"}, "counter None, not 'smollm2-135m'"),
        ({"compression": CompressionSettings(k=3)}, "k 2.0, not 3"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    broken_off(source, out)
    before = journal_of(out).read_bytes()
    with pytest.raises(ConfigError, match=rf"unfinished run with other settings \({said}.*; give those to finish it"):
        compress_file(source, out, never, settings(**changes))
    assert journal_of(out).read_bytes() == before
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.journal"]


def test_a_run_over_another_input_is_refused(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    broken_off(source, out)
    write_rows(source, rows_of(40, seed=1))
    with pytest.raises(ConfigError, match=r"other settings \(another input\)"):
        compress_file(source, out, never, settings())


def test_a_run_that_got_nothing_done_binds_nobody(tmp_path: Path) -> None:
    rows = rows_of(40)
    source, out = write_rows(tmp_path / "in.jsonl", rows[20:]), tmp_path / "out.jsonl"  # the first row breaks it
    with pytest.raises(Died):
        compress_file(source, out, lambda: breaking(for_ever=True), settings())
    assert names(tmp_path) == ["in.jsonl", "out.jsonl.journal"]
    assert bulk(source, out, rate=0.3).reused == 0


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
    """Another batch size, another cache, the same input under another name."""
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    done = broken_off(source, out)
    source = source.rename(tmp_path / "moved.jsonl")
    summary = bulk(source, out, batch_size=3, compression=CompressionSettings(cache_bytes=0))
    assert summary.reused == done
    bulk(source, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_output_is_not_touched(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(3)), tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(ConfigError, match=r"out\.jsonl exists already; remove it, or name another output"):
        compress_file(source, out, never, settings())
    write_rows(source, [])
    with pytest.raises(ConfigError, match="exists already"):
        compress_file(source, out, never, settings())
    assert out.read_text() == "precious"
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_a_source_that_changes_meanwhile_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(20)), tmp_path / "out.jsonl"
    before = source.read_bytes()

    def change() -> PromptCompressor:
        source.write_bytes(before.replace(b"r19", b"r20"))
        return compressor()

    with pytest.raises(DataFormatError, match=r"in\.jsonl: has changed since the run began"):
        compress_file(source, out, change, settings())
    source.write_bytes(before)
    journal = journal_of(out).read_bytes()
    assert bulk(source, out, never).reused == 20
    # As if that run had been killed between its last two steps.
    written = out.read_bytes()
    journal_of(out).write_bytes(journal)
    assert bulk(source, out, never).reused == 20
    assert out.read_bytes() == written
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(3)), tmp_path / "out.jsonl"
    with (
        FileLock(tmp_path / ".out.jsonl.journal.lock"),
        pytest.raises(ConfigError, match=r"another process is writing .*out\.jsonl"),
    ):
        compress_file(source, out, never, settings())
    assert bulk(source, out).rows == 3


@pytest.mark.parametrize("line", ["{", '{"line": 2}', '{"line": "2", "reason": ""}', '{"result": {}}'])
def test_a_damaged_journal_is_named(tmp_path: Path, line: str) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    broken_off(source, out)
    head = journal_of(out).read_text().splitlines()[0]
    journal_of(out).write_text(f"{head}\n{line}\n")
    with pytest.raises(DataFormatError, match=r"out\.jsonl\.journal:.*(broken JSON|not an entry)"):
        compress_file(source, out, never, settings())
    journal_of(out).write_text("{}\n")
    with pytest.raises(DataFormatError, match=r"out\.jsonl\.journal:1: not the head of a journal"):
        compress_file(source, out, never, settings())

"""Bulk files: every row in its place, bad rows set aside, and nothing mixed up."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bulk_runs import (
    as_parts,
    bulk,
    compressor,
    expected,
    names,
    never,
    prompts,
    read_rows,
    rows_of,
    settings,
    write_rows,
)
from fakes import random_lm
from filelock import FileLock

from terselm.compress import bulk as bulk_module
from terselm.compress import bulk_progress
from terselm.compress.bulk import BulkSettings, compress_file
from terselm.compress.bulk_process import Process, current_process
from terselm.compress.compressor import PromptCompressor
from terselm.compress.prompt import Prompt
from terselm.compress.protect import Preset
from terselm.compress.settings import CompressionSettings
from terselm.errors import BudgetError, ConfigError, DataFormatError
from terselm.models import CausalLM

OTHERS = {
    "id": 7,
    "nested": {"a": [1, None, 2.5]},
    "big": 2**70,
    "line\u2028end": "\u2028 👍",
    "half": "\ud83d",
    "none": None,
}


class Died(RuntimeError):
    """What the model of a test raises when it breaks."""


def breaking(calls: int) -> PromptCompressor:
    """A compressor whose model fails for ever after so many passes, as a GPU does."""
    lm = random_lm()
    model = type(lm.model)(lm.model.config)
    model.load_state_dict(lm.model.state_dict())
    left = calls

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Died("the GPU has fallen off the bus")

    model.register_forward_pre_hook(fail)
    model.model.register_forward_pre_hook(fail)
    return PromptCompressor(CausalLM(model=model.eval(), tokenizer=lm.tokenizer, name="random"))


def broken_off(source: Path, out: Path, calls: int = 12, **changes: Any) -> int:
    """Begin a run that dies on the way; how many rows it got done."""
    with pytest.raises(Died):
        compress_file(source, out, lambda: breaking(calls), settings(**changes))
    done = len(journal_of(out).read_bytes().split(b"\n")) - 2
    assert 0 < done < len(read_rows(source))
    assert not out.exists()
    return done


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def test_every_row_gets_its_result_in_order(tmp_path: Path) -> None:
    made = prompts(60)
    texts = {
        n: Prompt(demonstrations=["\n".join(prompt.demonstrations) or "so it is"]) for n, prompt in enumerate(made)
    }
    rows, asked = [], []
    for n, prompt in enumerate(made):
        own = [{}, {"budget": 3 + n}, {"rate": 0.7}, {"rate": 1}, {"budget": 9.0}][n % 5]
        form = [as_parts(prompt), {"prompt": as_parts(prompt)}, {"text": texts[n].demonstrations[0]}][n % 3]
        rows.append(OTHERS | {"id": n} | form | own | ({"budget": None} if not own else {}))
        asked.append((texts[n] if n % 3 == 2 else prompt, {k: int(v) if k == "budget" else v for k, v in own.items()}))
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out" / "done.jsonl"
    summary = bulk(source, out, rate=0.5)
    results = expected(asked, rate=0.5)
    assert read_rows(out) == [OTHERS | {"id": n} | result for n, result in enumerate(results)]
    assert list(read_rows(out)[0]) == [
        *OTHERS,
        "compressed",
        "original_tokens",
        "compressed_tokens",
        "ratio",
        "selected",
    ]
    assert names(out.parent) == ["done.jsonl"]
    assert (summary.rows, summary.rejected, summary.reused, summary.rejected_path) == (60, 0, 0, None)
    assert summary.original_tokens == sum(result["original_tokens"] for result in results)
    assert summary.compressed_tokens == sum(result["compressed_tokens"] for result in results)


def test_bad_rows_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    kept = "these words shall stay, whatever else goes"
    good = json.dumps({"id": "good", "text": "the cat sat on the mat and slept"}).encode()
    bad = [
        (b'{"text": "torn', "broken JSON at character", '{"text": "torn'),
        (b'["text"]', "a JSON array; expected one JSON object", '["text"]'),
        (b'{"text": "\xff"}', "not UTF-8", '{"text": "\ufffd"}'),
        (b'{"text": "a", "x": NaN}', "NaN is not a JSON value", '{"text": "a", "x": NaN}'),
        (b'{"text": "a", "x": 1e400}', "Out of range float", '{"text": "a", "x": 1e400}'),
        (b'{"id": 1}', "the row holds no prompt; expected one of text, prompt, or instruction", {"id": 1}),
        (b'{"text": ""}', "the prompt is empty", {"text": ""}),
        (b'{"text": "a", "question": "b"}', "the row holds text and question", ...),
        (b'{"text": 3}', "text is a int; expected a string", ...),
        (b'{"prompt": "a"}', "prompt is a str; expected an object .* under the key text", ...),
        (b'{"prompt": {"context": "a"}}', "prompt has a key 'context'", ...),
        (b'{"demonstrations": {"a": 1}}', "demonstrations is a dict; expected a list", ...),
        (b'{"demonstrations": ["a", 3]}', r"demonstrations\[1\] is a int", ...),
        (b'{"text": "\\ud800"}', "half a surrogate pair", {"text": "\ud800"}),
        (b'{"text": "a", "budget": 2, "rate": 0.5}', "both a budget and a rate are given", ...),
        (b'{"text": "a", "budget": 0}', "the budget is 0; expected a whole number", ...),
        (b'{"text": "a", "budget": "9"}', "the budget is '9'; expected a whole number", ...),
        (b'{"text": "a", "rate": "1"}', "the rate is '1'; expected a fraction", ...),
        (b'{"text": "a b c", "rate": 0.001}', "a rate of 0.001 leaves none of", ...),
        (b'{"text": "a", "ratio": 2}', "the row has a key 'ratio' already", ...),
        (json.dumps({"text": kept * 2, "budget": 3}).encode(), "the protected text alone has .* raise the budget", ...),
    ]
    lines = [line for wrong, *_ in bad for line in (good, b"", wrong)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    summary = bulk(source, out, keep=kept)
    (result,) = expected([(Prompt(demonstrations=["the cat sat on the mat and slept"]), {})], rate=0.4)
    assert read_rows(out) == [{"id": "good"} | result] * len(bad)
    aside = read_rows(tmp_path / "out.rejected.jsonl")
    assert [entry["line"] for entry in aside] == list(range(3, 3 * len(bad) + 1, 3))
    for entry, (line, reason, row) in zip(aside, bad, strict=True):
        with pytest.raises(ValueError, match=reason):
            raise ValueError(entry["reason"])
        assert entry["row"] == (json.loads(line) if row is ... else row)
    assert (summary.rows, summary.rejected) == (2 * len(bad), len(bad))
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.rejected.jsonl"]


def test_an_unforeseen_error_costs_only_its_row(tmp_path: Path) -> None:
    """Of a model that cannot read one token."""
    rows = rows_of(40)
    rows[17]["question"] += " § § §"
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    alien = random_lm().tokenizer("§")["input_ids"][-1]
    ill = breaking(10**9)

    def fail(module: Any, args: Any, values: Any) -> None:
        if (values["input_ids"] == alien).any():
            raise IndexError("index out of\nrange")

    ill.lm.model.model.register_forward_pre_hook(fail, with_kwargs=True)
    summary = bulk(source, out, lambda: ill)
    assert summary.rejected == 1
    (aside,) = read_rows(tmp_path / "out.rejected.jsonl")
    assert aside == {"line": 18, "reason": "IndexError: index out of range", "row": rows[17]}
    whole = tmp_path / "whole.jsonl"
    write_rows(source, rows[:17] + rows[18:])
    bulk(source, whole)
    assert out.read_bytes() == whole.read_bytes()


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


def test_no_row_that_can_be_compressed(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", [{"text": "a b"}] * 9), tmp_path / "out.jsonl"
    with pytest.raises(DataFormatError, match=r"no row could be compressed, the first because: neither a budget nor"):
        compress_file(source, out, compressor, settings(rate=None))
    assert names(tmp_path) == ["in.jsonl", "out.rejected.jsonl"]
    assert len(read_rows(tmp_path / "out.rejected.jsonl")) == 9
    assert bulk(source, out, rate=0.9).rejected == 0
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_no_rows(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl"
    assert bulk(source, out, never).rows == 0
    assert out.read_bytes() == b""


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


@pytest.mark.parametrize(
    ("source", "out", "said"),
    [
        ("none.jsonl", "out.jsonl", "none.jsonl: cannot be read: No such file"),
        ("in.json", "out.jsonl", "in.json is neither JSON Lines nor Parquet; expected a name in .jsonl"),
        ("in.jsonl", "out", "out is neither JSON Lines nor Parquet"),
        ("in.jsonl", "in.jsonl/out.jsonl", "cannot write .*in.jsonl/out.jsonl: "),
        ("in.jsonl", "in.jsonl", "in.jsonl exists already"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, source: str, out: str, said: str) -> None:
    write_rows(tmp_path / "in.jsonl", rows_of(3))
    with pytest.raises((ConfigError, DataFormatError), match=said):
        compress_file(tmp_path / source, tmp_path / out, never, settings())
    assert names(tmp_path) == ["in.jsonl"]


def test_settings_check_themselves() -> None:
    for wrong in ({"budget": 9}, {"rate": 2.0}, {"rate": None, "budget": 0}):
        with pytest.raises(BudgetError):
            settings(**wrong)
    for wrong in ({"batch_size": 0}, {"keep": [""]}):
        with pytest.raises(ConfigError):
            settings(**wrong)
    assert BulkSettings(model="m").rate is None


def test_lines_tell_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(40)), tmp_path / "out.jsonl"
    done = broken_off(source, out)
    monkeypatch.setattr(bulk_progress, "_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="terselm"):
        bulk(source, out)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == -(-(40 - done) // 7)
    assert said[-1].startswith("40 of 40 prompts, ")
    assert said[-1].endswith(" prompts/s, 0 s left")
    assert capfd.readouterr() == ("", "")
    assert [bulk_progress.duration(s) for s in (9.4, 728, 3905)] == ["9 s", "12 min 08 s", "1 h 05 min"]


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

"""Bulk files: every row in its place, and bad rows set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bulk_runs import (
    as_parts,
    breaking,
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

from terselm.compress.bulk import BulkSettings, compress_file
from terselm.compress.prompt import Prompt
from terselm.errors import BudgetError, ConfigError, DataFormatError

OTHERS = {
    "id": 7,
    "nested": {"a": [1, None, 2.5]},
    "big": 2**70,
    "line\u2028end": "\u2028 👍",
    "half": "\ud83d",
    "none": None,
}


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
        (
            b'{"id": 1}',
            r"no prompt; expected one of text \(and the question it is for\), prompt, or instruction",
            {"id": 1},
        ),
        (b'{"text": ""}', "the prompt is empty", {"text": ""}),
        (b'{"text": "a", "instruction": "b"}', "the row holds text and instruction", ...),
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
    tokens = f"{summary.original_tokens:,} tokens to {summary.compressed_tokens:,}"
    assert str(summary) == (
        f"21 of 42 prompts compressed (0 rows done before), {tokens}; "
        f"21 rows are set aside in {tmp_path / 'out.rejected.jsonl'}"
    )
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.rejected.jsonl"]


def test_an_unforeseen_error_costs_only_its_row(tmp_path: Path) -> None:
    rows = rows_of(40)
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    summary = bulk(source, out, lambda: breaking(for_ever=False))
    assert summary.rejected == 1
    (aside,) = read_rows(tmp_path / "out.rejected.jsonl")
    assert aside == {"line": 21, "reason": "Died: the GPU has fallen off the bus", "row": rows[20]}
    write_rows(source, rows[:20] + rows[21:])
    bulk(source, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


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


def test_all_mistakes_of_the_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BulkSettings(model="m", budget=0, keep=["", "fine", 3], batch_size=0)  # type: ignore[list-item]
    message = str(caught.value)
    faults = ["the budget is 0", "keep holds ''", "keep holds 3", "batch_size is 0"]
    assert [fault for fault in faults if fault in message] == faults
    with pytest.raises(BudgetError, match="the rate is 2"):  # one mistake is what it was by itself
        BulkSettings(model="m", rate=2.0)

"""Bulk files in Parquet, in and out: columns keep their types, and what JSON cannot hold is said."""

from __future__ import annotations

import json
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_runs import (
    Json,
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

from terselm.compress.bulk import compress_file
from terselm.compress.bulk import files as bulk_files
from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError, DataFormatError

NOW = datetime(2025, 3, 4, 5, 6, 7, 890000, tzinfo=UTC)


def write_table(path: Path, columns: Json, **types: Any) -> Path:
    arrays = {name: pa.array(values, type=types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays).replace_schema_metadata({"huggingface": "{}", "pandas": "{}"}), path)
    return path


def columns_of(made: list[Prompt]) -> Json:
    rows = [as_parts(prompt) for prompt in made]
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_columns_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_files, "_ROWS_AT_ONCE", 7)
    made = prompts(40)
    others = {
        "id": list(range(40)),
        "when": [NOW, None] * 20,
        "cost": [Decimal("1.10"), Decimal("2.25")] * 20,
        "kind": ["a", "b"] * 20,
        "bytes": [b"\xff\x00", None] * 20,
        "scores": [[float("nan"), 1.5], []] * 20,
        "meta": [{"a": 1, "b": None}, None] * 20,
    }
    types = {"id": pa.int16(), "when": pa.timestamp("ms", "UTC"), "kind": pa.dictionary(pa.int8(), pa.string())}
    source = write_table(tmp_path / "in.parquet", columns_of(made) | others, **types)
    out = tmp_path / "out.parquet"
    summary = bulk(source, out)
    assert (summary.rows, summary.rejected) == (40, 0)
    before, after = pq.read_table(source), pq.read_table(out)
    for name in others:
        assert after.schema.field(name).type == before.schema.field(name).type
        assert repr(after[name].to_pylist()) == repr(before[name].to_pylist())
    assert after.schema.metadata is None
    assert after.column_names == [*others, "compressed", "original_tokens", "compressed_tokens", "ratio", "selected"]
    assert after.select(after.column_names[-5:]).to_pylist() == expected([(p, {}) for p in made], rate=0.4)
    assert names(tmp_path) == ["in.parquet", "out.parquet"]


def test_rejected_rows_leave_the_others_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_files, "_ROWS_AT_ONCE", 7)
    made = prompts(40)
    bad = {0, 6, 7, *range(14, 21), 39}  # ends of chunks, a whole chunk
    budgets = [0.0 if n in bad else float(n + 3) if n % 2 else None for n in range(40)]
    others = {"n": list(range(40)), "data": [b"\x01"] * 40, "budget": budgets}
    source = write_table(tmp_path / "in.parquet", columns_of(made) | others)
    summary = bulk(source, tmp_path / "out.parquet")
    assert summary.rejected == len(bad)
    asked = [(p, {"budget": n + 3} if n % 2 else {}) for n, p in enumerate(made) if n not in bad]
    results = [
        {"n": n, "data": b"\x01"} | r
        for n, r in zip(sorted({*range(40)} - bad), expected(asked, rate=0.4), strict=True)
    ]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == results
    aside = read_rows(tmp_path / "out.rejected.jsonl")
    assert [entry["line"] for entry in aside] == sorted(n + 1 for n in bad)
    assert aside[1]["reason"] == "the budget is 0; expected a whole number of tokens, at least 1"
    assert aside[1]["row"] == as_parts(made[6]) | {"n": 6, "data": "b'\\x01'", "budget": 0.0}


def test_a_prompt_in_one_column(tmp_path: Path) -> None:
    made = prompts(9)
    nested = [as_parts(prompt) for prompt in made]
    source = write_table(tmp_path / "a.parquet", {"prompt": nested})
    bulk(source, tmp_path / "a-out.parquet")
    results = expected([(p, {}) for p in made], rate=0.4)
    assert pq.read_table(tmp_path / "a-out.parquet").to_pylist() == results
    mixed = {"text": ["the cat sat on the mat", None], "prompt": [None, nested[0]]}
    source = write_table(tmp_path / "b.parquet", mixed)
    bulk(source, tmp_path / "b-out.parquet", rate=0.4)
    (first,) = expected([(Prompt(demonstrations=["the cat sat on the mat"]), {})], rate=0.4)
    assert pq.read_table(tmp_path / "b-out.parquet").to_pylist() == [first, results[0]]


def test_parquet_to_json_lines(tmp_path: Path) -> None:
    others = {
        "when": [NOW] * 4,
        "day": [date(2025, 3, 4)] * 4,
        "cost": [Decimal("1.10")] * 4,
        "score": [1.5, None, float("nan"), 2.0],
    }
    others["data"] = [None, None, None, b"\x01"]
    source = write_table(tmp_path / "in.parquet", columns_of(prompts(4)) | others)
    summary = bulk(source, tmp_path / "out.jsonl")
    common = {"when": "2025-03-04T05:06:07.890000+00:00", "day": "2025-03-04", "cost": "1.10", "data": None}
    results = expected([(p, {}) for p in prompts(4)[:2]], rate=0.4)
    assert read_rows(tmp_path / "out.jsonl") == [
        {**common, "score": 1.5, **results[0]},
        {**common, "score": None, **results[1]},
    ]
    reasons = [entry["reason"] for entry in read_rows(tmp_path / "out.rejected.jsonl")]
    assert reasons[0].startswith("ValueError: Out of range float values are not JSON compliant")
    assert reasons[1].endswith("a value of type bytes has no form in JSON; write a .parquet file instead")
    assert summary.rejected == 2


def test_json_lines_to_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that come late, numbers that turn out to have fractions, objects that grow; and lines that are no rows."""
    monkeypatch.setattr(bulk_files, "_ROWS_AT_ONCE", 3)
    rows = rows_of(8)
    rows[1] |= {"score": 1, "meta": {"a": 1}, "tags": []}
    rows[5] |= {"score": 2.5, "meta": {"b": "x"}, "tags": ["t"], "late": True}
    source = write_rows(tmp_path / "in.jsonl", rows)
    with source.open("a") as file:
        file.write('{"broken\n\n{"text": "a", "ratio": "taken"}\n')
    summary = bulk(source, tmp_path / "out.parquet")
    assert (summary.rows, summary.rejected) == (10, 2)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("score").type == pa.float64()
    results = expected([(p, {}) for p in prompts(8)], rate=0.4)
    blank = {"score": None, "meta": None, "tags": None, "late": None}
    found = {1: {"score": 1.0, "meta": {"a": 1, "b": None}, "tags": []}}
    found[5] = {"score": 2.5, "meta": {"a": None, "b": "x"}, "tags": ["t"], "late": True}
    assert table.to_pylist() == [{"id": f"r{n}"} | blank | found.get(n, {}) | r for n, r in enumerate(results)]


@pytest.mark.parametrize("values", [["a", 1], [2**70, 1], [{}, {}], [2**60 + 1, 0.5], ["\ud800", "a"], [[1], {"a": 1}]])
def test_values_that_make_no_column_are_refused_before_any_work(tmp_path: Path, values: list[Any]) -> None:
    rows = [row | {"odd": values[n % 2]} for n, row in enumerate(rows_of(4))]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(
        ConfigError, match=r"the key 'odd' of .*in\.jsonl cannot become a Parquet column \(.*write a .jsonl"
    ):
        compress_file(source, tmp_path / "out.parquet", never, settings())
    assert names(tmp_path) == ["in.jsonl"]
    bulk(source, tmp_path / "out.jsonl")
    assert [row["odd"] for row in read_rows(tmp_path / "out.jsonl")] == values * 2


def test_no_rows(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.parquet", {"text": [], "n": []}, text=pa.string(), n=pa.int8())
    assert bulk(source, tmp_path / "out.parquet", never).rows == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert (table.num_rows, table.schema.field("n").type) == (0, pa.int8())
    bulk(write_rows(tmp_path / "in.jsonl", []), tmp_path / "lines.parquet", never)
    assert pq.read_table(tmp_path / "lines.parquet").column_names[0] == "compressed"


def test_only_a_prompt(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.parquet", {"text": ["the cat sat on the mat"] * 3, "rate": [0.5, None, 2]})
    assert bulk(source, tmp_path / "out.parquet").rejected == 1
    results = expected([(Prompt(demonstrations=["the cat sat on the mat"]), {"rate": r}) for r in (0.5, 0.4)])
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == results


def test_what_is_not_a_table(tmp_path: Path) -> None:
    write_rows(tmp_path / "json.parquet", rows_of(2))
    write_table(tmp_path / "taken.parquet", {"text": ["a"], "ratio": [1]})
    torn = write_table(tmp_path / "torn.parquet", columns_of(prompts(50))).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(torn[:-100])
    for name, said in (
        ("none", "cannot be read as Parquet: No such file"),
        ("json", "cannot be read as Parquet: Parquet magic bytes not found"),
        ("torn", "cannot be read as Parquet: "),
        ("taken", "has a column 'ratio' already, which the result needs; rename it"),
    ):
        with pytest.raises((DataFormatError, ConfigError), match=rf"{name}\.parquet:? {said}"):
            compress_file(tmp_path / f"{name}.parquet", tmp_path / "out.jsonl", never, settings())


def test_damage_inside_is_named(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.parquet", columns_of(prompts(200)))
    content = bytearray(source.read_bytes())
    for at in range(100, len(content) // 2, 7):
        content[at] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(DataFormatError, match=r"in\.parquet: cannot be read as Parquet: "):
        compress_file(source, tmp_path / "out.parquet", compressor, settings())


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "in.parquet", {"text": ["a b c"]})
    lines = write_rows(tmp_path / "in.jsonl", rows_of(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for source, out in ((table, "out.jsonl"), (lines, "out.parquet")):
        with pytest.raises(ConfigError, match=r"^pyarrow is not installed; run: pip install 'terselm\[collect\]'$"):
            compress_file(source, tmp_path / out, never, settings())
    assert bulk(lines, tmp_path / "out.jsonl").rows == 3
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["id"] == "r0"

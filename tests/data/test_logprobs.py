"""The file of log-probabilities: what goes in comes out, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.data.logprobs import About, Given, LogProbFile, ScoredText, write_logprobs
from terselm.errors import DataFormatError

ABOUT = About(model="m", tokenizer="t", source="local")


def plain(**changes: Any) -> ScoredText:
    values: dict[str, Any] = {
        "id": "a",
        "text": "née 👍",
        "starts": np.array([0, 4, 4], np.int32),
        "ends": np.array([3, 5, 5], np.int32),
        "logprobs": np.array([np.nan, -0.5, 0.0], np.float32),
    }
    return ScoredText(**values | changes)


def same(one: ScoredText, other: ScoredText) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=True) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@st.composite
def scored_texts(draw: st.DrawFn) -> ScoredText:
    text = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    count, width = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    spans = [sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2))) for _ in range(count)]
    rows = draw(st.lists(st.tuples(st.floats(-50, 0, width=32), st.binary(max_size=4)), min_size=count, max_size=count))
    top = np.full((count, width), -np.inf, np.float32)
    wanted = draw(st.booleans())
    return ScoredText(
        id=draw(st.uuids()).hex,
        text=text,
        given=draw(st.sampled_from(Given)),
        response_start=draw(st.none() | st.integers(0, len(text))),
        starts=np.array([start for start, _ in spans], np.int32),
        ends=np.array([end for _, end in spans], np.int32),
        logprobs=np.array([value for value, _ in rows], np.float32),
        token_ids=np.arange(count, dtype=np.int32) if wanted else None,
        tokens=tuple(piece for _, piece in rows),
        top_logprobs=top if wanted and count else None,
        top_ids=np.full((count, width), -1, np.int32) if wanted and count else None,
        top_tokens=tuple((piece,) * width for _, piece in rows) if wanted else None,
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(scored_texts(), max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, texts: list[ScoredText]) -> None:
    path = tmp_path_factory.mktemp("scores") / "x.parquet"
    assert write_logprobs(path, iter(texts), ABOUT) == len(texts)
    file = LogProbFile(path)
    read = list(file)
    assert len(file) == len(read) == len(texts)
    assert file.about == ABOUT
    assert all(same(one, other) for one, other in zip(texts, read, strict=True))


def test_more_texts_than_are_written_at_once(tmp_path: Path) -> None:
    texts = [plain(id=str(number)) for number in range(600)]
    write_logprobs(tmp_path / "x.parquet", texts, ABOUT)
    assert [text.id for text in LogProbFile(tmp_path / "x.parquet")] == [text.id for text in texts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": np.array([3, 5, 6], np.int32)}, "span is not within the text of 5"),
        ({"starts": np.array([-1, 4, 4], np.int32)}, "span is not within"),
        ({"starts": np.array([0, 4], np.int32)}, "starts has 2 entries for 3"),
        ({"top_ids": np.zeros((2, 4), np.int32)}, "top_ids has 2 entries for 3"),
        ({"logprobs": np.array([0.1, -1, -1], np.float32)}, "expected at most 0"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**changes)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_logprobs(path, [plain()], ABOUT)

    def fails() -> Any:
        yield plain()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_logprobs(path, fails(), ABOUT)
    assert len(LogProbFile(path)) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["x.parquet"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    with pytest.raises(DataFormatError, match="no such file"):
        LogProbFile(path)
    write_logprobs(path, [plain()], ABOUT)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataFormatError, match="cannot be read as Parquet"):
        LogProbFile(path)
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(DataFormatError, match="not a file of log-probabilities"):
        LogProbFile(path)

"""Tokenised texts on disk: what comes back, when it is made anew, and mixtures of sources."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.errors import ConfigError, DataFormatError
from terselm.models import CausalLM, load_causal_lm
from terselm.train import text_cache
from terselm.train.example_store import ExampleStore, ExampleWriter
from terselm.train.examples import Example, Guide
from terselm.train.packing import pack_examples
from terselm.train.settings import AlignSettings, DataSettings, EvaluationSettings, Overlong
from terselm.train.text_cache import RecordSource
from terselm.train.texts import Texts, examples_of_epoch, prepare_texts


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> CausalLM:
    return load_causal_lm(tiny_model, device="cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def config(records: Path | str = "", **data: Any) -> AlignSettings:
    found = DataSettings(**({"records": str(records)} if records else {}), max_length=64, **data)
    return AlignSettings(data=found, evaluation=EvaluationSettings(held_out=0.2))


def write(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": f"{p} is one"}) + "\n" for p in prompts))
    return path


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def example(draw: np.random.Generator, guided: bool, top_k: int, record: int) -> Example:
    size, words = int(draw.integers(1, 9)), int(draw.integers(0, 4))
    guide = Guide(
        words=draw.integers(-1, max(1, words), size).astype(np.int32),
        nats=draw.random(words).astype(np.float32),
        top_ids=draw.integers(0, 9, (size, top_k)).astype(np.int32) if top_k else None,
        top_logprobs=draw.random((size, top_k)).astype(np.float32) if top_k else None,
    )
    return Example(
        draw.integers(0, 2**31, size),
        draw.random(size) < 0.5,
        record,
        guide if guided else None,
    )


@settings(max_examples=40)
@given(seed=st.integers(0, 99), count=st.integers(0, 5), guided=st.booleans(), top_k=st.sampled_from([0, 3]))
def test_examples_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, guided: bool, top_k: int
) -> None:
    generator = np.random.default_rng(seed)
    written = [example(generator, guided, top_k, record) for record in range(count)]
    folder = tmp_path_factory.mktemp("store")
    with ExampleWriter(folder, guided=guided, top_k=top_k) as writer:
        writer.append(written[:2])
        writer.append(written[2:])
    store = ExampleStore(folder)
    assert len(store) == count
    assert store.lengths.tolist() == list(map(len, written))
    assert store.counted.tolist() == [int(e.counted.sum()) for e in written]
    for ours, theirs in zip(written, store, strict=True):
        assert ours.record == theirs.record
        for name in ("ids", "counted"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert (ours.guide is None) == (theirs.guide is None)
        for name in ("words", "nats", "top_ids", "top_logprobs") if ours.guide else ():
            left, right = getattr(ours.guide, name), getattr(theirs.guide, name)
            assert (left is None) == (right is None)
            if left is not None:
                np.testing.assert_array_equal(left, right)
                assert left.dtype == right.dtype


def test_texts_are_made_once(lm: CausalLM, records_file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first = prepare_texts(config(records_file), lm)
    monkeypatch.setattr(text_cache, "_write", lambda *_: pytest.fail("made again"))
    second = prepare_texts(config(records_file), lm)
    assert first.describe() == second.describe()
    assert len(folders(cache)) == 1
    for ours, theirs in zip(first.rows, second.rows, strict=True):
        assert [e.ids.tolist() for e in ours] == [e.ids.tolist() for e in theirs]


def test_rows_are_those_of_all_examples_at_once(lm: CausalLM, records_file: Path) -> None:
    texts = prepare_texts(config(records_file), lm)
    expected = pack_examples(list(texts.training.examples), 64)
    assert [[e.ids.tolist() for e in row] for row in texts.rows] == [[e.ids.tolist() for e in row] for row in expected]
    assert texts.tokens == sum(len(e) for row in texts.rows for e in row)
    assert texts.counted_tokens == texts.training.counted_tokens


def test_other_content_or_settings_are_other_texts(lm: CausalLM, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"count {i}" for i in range(30)])
    prepare_texts(config(path), lm)
    prepare_texts(config(path, overlong=Overlong.DROP), lm)
    assert len(folders(cache)) == 2
    write(path, [f"sort {i}" for i in range(30)])
    changed = prepare_texts(config(path), lm)
    assert len(folders(cache)) == 3
    assert all(record.response.startswith("sort") for record in _held_out(cache))
    assert changed.records + len(changed.held_out.prompt_of) == 30


def test_nothing_left_is_an_error(lm: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "one " * i, "completion": "two"}) + "\n" for i in range(80, 110)))
    with pytest.raises(ConfigError, match=r"none of \d+ records.*data\.max_length"):
        prepare_texts(config(path, overlong=Overlong.DROP), lm)


def _held_out(cache: Path) -> list[Any]:
    newest = max(folders(cache), key=lambda folder: folder.stat().st_mtime_ns)
    return text_cache._read(newest).held_out_records


def test_what_was_long_unused_is_removed(lm: CausalLM, tmp_path: Path, cache: Path) -> None:
    prepare_texts(config(write(tmp_path / "a.jsonl", [f"count {i}" for i in range(30)])), lm)
    (old,) = folders(cache)
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (month_ago, month_ago))
    prepare_texts(config(write(tmp_path / "b.jsonl", [f"sort {i}" for i in range(30)])), lm)
    assert old not in folders(cache)


def _read_in_another_process(model: Path, records: Path, found: Any) -> None:
    texts = prepare_texts(config(records), load_causal_lm(model, device="cpu"))
    found.put((os.getpid(), texts.describe()))


def test_processes_that_start_together_agree(tiny_model: Path, records_file: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    arguments = (tiny_model, records_file, found)
    processes = [context.Process(target=_read_in_another_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    (_, ours), (_, theirs) = (found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert ours == theirs
    assert len(folders(cache)) == 1


def test_a_cache_that_cannot_be_written_takes_one_sentence(
    lm: CausalLM, records_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(Exception, match=r"cannot write to .*; TERSELM_CACHE can name a folder elsewhere"):
        prepare_texts(config(records_file), lm)


def test_a_bad_row_leaves_nothing(lm: CausalLM, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"count {i}" for i in range(2000)])
    with path.open("a") as file:
        file.write('{"prompt": "one", "completion": " "}\n')
    with pytest.raises(DataFormatError, match=r"a.jsonl:2001: response is empty"):
        prepare_texts(config(path), lm)
    assert folders(cache) == []


def test_mixed_schemas_take_one_sentence(lm: CausalLM, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    with path.open("a") as file:
        file.write('{"instruction": "add", "output": "three"}\n')
    with pytest.raises(DataFormatError, match=r"a.jsonl:3: missing key 'prompt' \(read as format prompt_completion\)"):
        prepare_texts(config(path), lm)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_is_read_as_json_lines_are(lm: CausalLM, records_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in records_file.read_text().splitlines()]
    theirs = prepare_texts(config(parquet(tmp_path / "a.parquet", rows)), lm)
    assert prepare_texts(config(records_file), lm).describe() == theirs.describe()


def test_a_folder_of_a_data_set(lm: CausalLM, records_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(records_file.read_bytes())
    theirs = prepare_texts(config(folder), lm)
    assert prepare_texts(config(records_file), lm).describe() == theirs.describe()


def test_an_unreachable_hub_takes_one_sentence(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"the hub does not say which revision 'hub:a/b' is of: .*no hub$"):
        prepare_texts(config("hub:a/b"), lm)


def mixture(lm: CausalLM, tmp_path: Path, **times: float) -> Texts:
    paths = {name: write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(60)]) for name in ("count", "sort")}
    return prepare_texts(config(mixture={str(paths[name]): value for name, value in times.items()}), lm)


def test_a_mixture_repeats_and_draws(lm: CausalLM, tmp_path: Path) -> None:
    texts = mixture(lm, tmp_path, count=2.0, sort=0.25)
    seen = [lm.tokenizer.decode(e.ids) for row in texts.rows for e in row]
    count, sort = ([text for text in seen if f"<s>{name}" in text] for name in ("count", "sort"))
    assert len(count) + len(sort) == len(seen)
    assert len(count) == 2 * len(set(count))
    whole = sum("sort" in lm.tokenizer.decode(e.ids) for e in texts.training.examples)
    assert len(sort) == len(set(sort)) == round(whole / 4)
    assert texts.tokens == sum(len(e) for row in texts.rows for e in row)
    assert mixture(lm, tmp_path, count=2.0, sort=0.25).describe() == texts.describe()


def test_draws_come_from_their_source() -> None:
    sources = [RecordSource(name=str(times), times=times, fingerprint="") for times in (0.5, 3.0, 1.5)]
    drawn = examples_of_epoch([10, 4, 6], sources, seed=0)
    counts = np.bincount(drawn, minlength=20)
    assert counts[:10].sum() == 5
    assert counts[:10].max() == 1
    assert counts[10:14].tolist() == [3] * 4
    assert sorted(counts[14:].tolist()) == [1, 1, 1, 2, 2, 2]
    assert examples_of_epoch([10, 4, 6], sources, seed=0).tolist() == drawn.tolist()
    assert examples_of_epoch([10, 4, 6], sources, seed=1).tolist() != drawn.tolist()


@pytest.mark.parametrize("times", [0, -1, float("nan")])
def test_a_mixture_without_weight_is_refused(times: float) -> None:
    with pytest.raises(ConfigError, match=r"data.mixture gives 'a' the weight"):
        replace(DataSettings(), mixture={"a": times})

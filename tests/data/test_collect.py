"""Collection from a local target: nothing is asked twice, nothing is lost, and what is not kept is said."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import bigram_lm, random_lm
from filelock import FileLock

from terselm.data.collection import local
from terselm.data.collection.collect import CollectSummary, collect
from terselm.data.collection.ledger import ledger_of, status
from terselm.data.collection.settings import CollectSettings, LogProbSettings, PromptTemplate
from terselm.data.generate import Answer, Limits, Query, generate
from terselm.data.instructions import Instruction
from terselm.data.logprobs import Given, LogProbFile, score_texts
from terselm.data.records import Message, Record, Role, read_records
from terselm.data.schema import PlainText
from terselm.errors import ConfigError, ContextLengthError, DataFormatError, ModelError, TargetLLMError
from terselm.models import CausalLM

PLAIN = {"default": PromptTemplate(text="{prompt}")}


def instructions(*prompts: str) -> list[Instruction]:
    return [
        Instruction(id=f"i{number}", category="test", messages=(Message(role=Role.USER, content=prompt),))
        for number, prompt in enumerate(prompts)
    ]


ASK = instructions(*(f"Question {number}: " + "how many? " * (number % 7 + 1) for number in range(20)))


def settings(**changes: Any) -> CollectSettings:
    plain: dict[str, Any] = {
        "endpoint": "local:no/such/model/here",
        "temperatures": [0.0, 0.8, 0.8],
        "max_new_tokens": 16,
        "batch_size": 8,
        "templates": PLAIN,
    }
    return CollectSettings(**plain | changes)


def exact_lm() -> CausalLM:
    """In float64, so that no answer hangs on how a processor rounds the sums of another batch."""
    lm = random_lm()
    lm.model.double()
    return lm


def undated(path: Path) -> list[Record]:
    """The records, as if all had been made at once."""
    records = []
    for record in read_records(path):
        assert record.generation is not None
        records.append(replace(record, generation=replace(record.generation, created="2025-01-01")))
    return records


def test_each_record_says_where_it_came_from(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    lm = exact_lm()
    summary = collect(ASK, out, settings(seed=5), lm=lm)
    records = list(read_records(out))
    assert summary.records == len(records) == 60 - sum(summary.without_record.values())
    assert (summary.reused, summary.waiting, summary.stopped) == (0, 0, None)
    left = {"records.jsonl", "records.jsonl.ledger"} | ({"records.failures.jsonl"} if summary.without_record else set())
    assert {path.name for path in tmp_path.iterdir()} == left
    order = [[ask.messages for ask in ASK].index(record.messages) for record in records]
    assert order == sorted(order)
    for record in records:
        made = record.generation
        assert made is not None
        asked = made.parameters
        assert (made.model, record.category) == ("no/such/model/here", "test")
        assert (asked["max_new_tokens"], asked["prompt_template"], asked["stop"]) == (16, "{prompt}", [])
        assert set(made.versions) == {"terselm", "transformers"}
        assert made.created.endswith("+00:00")
        if made.finish_reason == "loop":
            continue
        query = Query(
            prompt=record.messages[0].content,
            temperature=float(str(asked["temperature"])),
            seed=int(str(asked["seed"])) + made.attempts - 1,
        )
        (answer,) = generate(lm, [query], Limits(max_new_tokens=16))
        assert (record.response, made.finish_reason) == (answer.text, answer.finish_reason)
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (
            answer.prompt_tokens,
            answer.completion_tokens,
        )
    made_tokens = [record.generation.usage for record in records if record.generation]
    assert summary.completion_tokens == sum(usage.completion_tokens for usage in made_tokens)
    assert summary.prompt_tokens == sum(usage.prompt_tokens for usage in made_tokens)


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    lm = random_lm()
    sampled = settings(temperatures=[0.8, 0.9, 0.9])
    first = collect(ASK[:10], out, sampled, lm=lm)
    assert not first.without_record
    before = list(read_records(out))
    # The model that the settings name does not exist, so whoever loads it fails.
    again = collect(ASK[:10], out, sampled)
    assert again == replace(first, reused=30)
    (tmp_path / "records.jsonl.ledger").unlink()
    assert collect(ASK[:10], out, sampled) == again  # from the records alone
    assert list(read_records(out)) == before
    with pytest.raises(ModelError):
        collect(ASK[:11], out, sampled)
    assert list(read_records(out)) == before
    more = collect(ASK[:11], out, sampled, lm=lm)
    assert (more.records, more.reused) == (33, 30)
    assert list(read_records(out))[:30] == before


def test_a_changed_setting_asks_only_for_what_it_changes(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    first = collect(ASK[:4], out, settings(), lm=random_lm())
    before = out.read_bytes()
    wider = collect(ASK[:4], out, settings(temperatures=[0.0, 0.8, 0.8, 0.9]), lm=random_lm())
    assert wider.reused == first.records
    collect(ASK[:4], out, settings(max_new_tokens=17), lm=random_lm())
    assert out.read_bytes() != before
    again = collect(ASK[:4], out, settings())  # nothing was thrown away: no model is needed
    assert (again, out.read_bytes()) == (replace(first, reused=first.records), before)


def test_records_of_other_settings_are_never_lost(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    collect(ASK[:4], out, settings(), lm=random_lm())
    before = out.read_bytes()
    (tmp_path / "records.jsonl.ledger").unlink()
    for others, asked in ((settings(max_new_tokens=17), ASK[:4]), (settings(), ASK[:3])):
        with pytest.raises(ConfigError, match=r"records\.jsonl holds \d+ records of other instructions or settings"):
            collect(asked, out, others, lm=random_lm())
        assert out.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with FileLock(tmp_path / ".records.jsonl.lock"), pytest.raises(ConfigError, match="another process is writing"):
        collect(ASK, out, settings(), lm=random_lm())
    assert collect(ASK[:1], out, settings(), lm=random_lm()).records == 3


RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_collect
from terselm.data.collection.collect import collect
collect(test_collect.ASK * 1, Path(sys.argv[2]), test_collect.slow_settings(sys.argv[1]))
"""


def slow_settings(model: str) -> CollectSettings:
    """Of a run of some seconds in many small commits; each answer alone, so that none hangs on what is beside it."""
    return settings(endpoint=f"local:{model}", batch_size=1, max_new_tokens=120)


@pytest.mark.slow
def test_after_kill_9_the_next_run_goes_on(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out" / "records.jsonl"
    lm = random_lm()
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    out.parent.mkdir()
    committed = 0
    chance = random.Random(0)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(model), str(out), *paths])
        while answers(out) < committed + 5:
            assert process.poll() is None, "ended before it could be killed; make the run slower"
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert answers(out) >= committed + 5
        committed = answers(out)
        assert not out.exists()
    summary = collect(ASK, out, slow_settings(str(model)))
    assert summary.reused >= 10
    assert status(ledger_of(out))["attempts"]["interrupted"] <= 3 * 2
    whole = tmp_path / "whole.jsonl"
    collect(ASK, whole, slow_settings(str(model)))
    assert undated(out) == undated(whole)


def answers(out: Path) -> int:
    """Answers that the ledger has committed."""
    try:
        return int(status(ledger_of(out))["attempts"].get("answered", 0))
    except (DataFormatError, TargetLLMError):  # not there yet
        return 0


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    ledger = tmp_path / "records.jsonl.ledger"
    ledger.write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    with pytest.raises(DataFormatError, match=r"records\.jsonl\.ledger: is not a ledger, or damaged"):
        collect(ASK[:1], tmp_path / "records.jsonl", settings(), lm=random_lm())
    ledger.unlink()
    with sqlite3.connect(ledger) as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(DataFormatError, match="is a database, but not a ledger"):
        collect(ASK[:1], tmp_path / "records.jsonl", settings(), lm=random_lm())


def test_a_prompt_that_does_not_fit_stops_before_anything_is_generated(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with pytest.raises(ContextLengthError, match="do not fit into the window of 40 tokens"):
        collect(ASK, out, settings(), lm=random_lm(window=40))
    assert not out.exists()


def gather(lm: CausalLM, path: Path, prompts: Sequence[str], **changes: Any) -> tuple[CollectSummary, list[Record]]:
    summary = collect(instructions(*prompts), path, settings(**changes), lm=lm)
    return summary, list(read_records(path))


def test_a_greedy_loop_is_cut_after_its_first_cycle(tmp_path: Path) -> None:
    lm = bigram_lm(["eins", "zwei", "drei"], {"eins": {"zwei": 0.9}, "zwei": {"drei": 0.9}, "drei": {"eins": 0.9}})
    summary, (record,) = gather(lm, tmp_path / "r.jsonl", ["eins"], temperatures=[0.0], max_new_tokens=30)
    assert record.response == "zwei drei eins"
    assert record.generation is not None
    assert (record.generation.finish_reason, record.generation.attempts) == ("loop", 1)
    assert record.generation.usage.completion_tokens == 30
    assert (summary.cut, summary.retried, summary.without_record) == (1, 0, {})


def test_a_sampled_answer_is_drawn_again_until_it_is_fit(tmp_path: Path) -> None:
    """Of a model that says nothing two times out of three."""
    lm = bigram_lm(["ask", "yes"], {"ask": {"</s>": 0.66, "yes": 0.33}, "yes": {"</s>": 0.9999}})
    ask = [f"ask {'ask ' * n}".strip() for n in range(30)]
    summary, records = gather(lm, tmp_path / "r.jsonl", ask, temperatures=[1.0], attempts=4)
    attempts = [record.generation.attempts for record in records if record.generation]
    assert {record.response.split()[0] for record in records} == {"yes"}
    assert set(attempts) == {1, 2, 3, 4}
    assert summary.retried == sum(count > 1 for count in attempts)
    assert summary.without_record.keys() == {"empty"}  # (2/3)^4 of them, about 6
    assert summary.records + summary.without_record["empty"] == 30
    # What was dropped stays dropped: its seeds would give the same again.
    again = gather(lm, tmp_path / "r.jsonl", ask, temperatures=[1.0], attempts=4)[0]
    assert again == replace(summary, reused=summary.records)
    assert status(ledger_of(tmp_path / "r.jsonl"))["attempts"]["answered"] > 30


def test_a_greedy_answer_with_a_fault_is_dropped_and_said(tmp_path: Path) -> None:
    table = {"a": {"</s>": 0.9}, "b": {"c": 0.9}, "c": {"</s>": 0.9}}
    summary, records = gather(bigram_lm("abc", table), tmp_path / "r.jsonl", ["a", "b"], temperatures=[0.0])
    assert [record.response for record in records] == ["c"]
    assert summary.without_record == {"empty": 1}
    (line,) = (tmp_path / "r.failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert (failure["instruction"], failure["state"], failure["reason"]) == ("i0", "dropped", "empty")


def test_nothing_fit_to_keep(tmp_path: Path) -> None:
    lm = bigram_lm("a", {"a": {"</s>": 0.9}})
    for _ in range(2):
        with pytest.raises(TargetLLMError, match=r"none of the 1 answers of no/such/.* to keep \(1 empty\)"):
            gather(lm, tmp_path / "r.jsonl", ["a"], temperatures=[0.0])
    assert not (tmp_path / "r.jsonl").exists()


def test_no_progress_bar_off_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    collect(ASK[:2], tmp_path / "r.jsonl", settings(), lm=random_lm())
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def tight(lm: CausalLM, queries: Sequence[Query], limits: Limits, **how: Any) -> list[Answer]:
        sizes.append(len(queries))
        if len(queries) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(lm, queries, limits, **how)

    monkeypatch.setattr(local, "generate", tight)
    given = settings(temperatures=[0.0], batch_size=16)
    asked = collect(ASK, tmp_path / "tight.jsonl", given, lm=exact_lm())
    monkeypatch.undo()
    collect(ASK, tmp_path / "wide.jsonl", given, lm=exact_lm())
    assert undated(tmp_path / "tight.jsonl") == undated(tmp_path / "wide.jsonl")
    assert sizes[0] > 6
    assert asked.records + sum(asked.without_record.values()) == 20
    assert max(sizes[sizes.index(next(size for size in sizes if size <= 6)) :]) <= 8  # the other half of the first


def test_memory_for_not_even_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(lm: CausalLM, queries: Sequence[Query], limits: Limits, **how: Any) -> list[Answer]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, "generate", none)
    with pytest.raises(TargetLLMError, match="too small for one answer; lower max_new_tokens"):
        collect(ASK[:3], tmp_path / "r.jsonl", settings(), lm=random_lm())


def test_log_probabilities_of_a_local_target(tmp_path: Path) -> None:
    out, lm = tmp_path / "r.jsonl", random_lm()
    summary = collect(ASK[:5], out, settings(), lm=lm)
    kept = settings(logprobs=LogProbSettings(keep=True))
    assert collect(ASK[:5], out, kept, lm=lm).records == summary.records
    for record, scored in zip(read_records(out), LogProbFile(tmp_path / "r.logprobs.parquet"), strict=True):
        assert (scored.id, scored.given, scored.top_logprobs) == (record.id, Given.TEXT, None)
        assert scored.text == f"{record.messages[0].content}\n\n{record.response}"
        assert scored.text[scored.response_start :] == record.response
        ((alone,),) = score_texts(lm, [PlainText(id="x", text=scored.text)])
        assert abs(alone.logprobs - scored.logprobs).max() < 1e-4
    # What is there is not read again: the model that the settings name does not exist.
    collect(ASK[:5], out, kept)
    with pytest.raises(ModelError):
        collect(ASK[:5], out, settings(logprobs=LogProbSettings(keep=True, top_k=2)))
    collect(ASK[:5], out, settings(logprobs=LogProbSettings(keep=True, top_k=2)), lm=lm)
    assert all(scored.top_ids is not None for scored in LogProbFile(tmp_path / "r.logprobs.parquet"))

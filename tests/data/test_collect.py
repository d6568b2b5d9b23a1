"""Collection from a local target: nothing is asked twice, nothing is lost, and what is not kept is said."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import bigram_lm, random_lm
from filelock import FileLock

from terselm.data.collect import CollectSettings, CollectSummary, Dropped, PromptTemplate, collect_local
from terselm.data.faults import Fault
from terselm.data.generate import Limits, Query, generate
from terselm.data.instructions import Instruction
from terselm.data.records import Message, Record, Role, read_records
from terselm.data.requests import plan_requests
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
        "model": "no/such/model/here",
        "temperatures": [0.0, 0.8, 0.8],
        "max_new_tokens": 16,
        "batch_size": 8,
        "templates": PLAIN,
    }
    return CollectSettings(**plain | changes)


def undated(path: Path) -> list[Record]:
    """The records, as if all had been made at once."""
    records = []
    for record in read_records(path):
        assert record.generation is not None
        records.append(replace(record, generation=replace(record.generation, created="2025-01-01")))
    return records


def test_each_record_says_where_it_came_from(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    lm = random_lm()
    summary = collect_local(ASK, out, settings(seed=5), lm)
    records = list(read_records(out))
    assert summary.records == len(records) == 60 - len(summary.dropped)
    assert summary.reused == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]
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
    first = collect_local(ASK[:10], out, sampled, lm)
    assert not first.dropped
    before = list(read_records(out))
    # The model that the settings name does not exist, so whoever loads it fails.
    again = collect_local(ASK[:10], out, sampled)
    assert again == replace(first, reused=30)
    assert list(read_records(out)) == before
    with pytest.raises(ModelError):
        collect_local(ASK[:11], out, sampled)
    assert list(read_records(out)) == before
    more = collect_local(ASK[:11], out, sampled, lm)
    assert (more.records, more.reused) == (33, 30)
    assert list(read_records(out))[:30] == before


def test_records_of_other_settings_are_never_lost(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    collect_local(ASK[:4], out, settings(), random_lm())
    before = out.read_bytes()
    for others, asked in ((settings(max_new_tokens=17), ASK[:4]), (settings(), ASK[:3])):
        with pytest.raises(ConfigError, match=r"records\.jsonl holds \d+ records of other instructions or settings"):
            collect_local(asked, out, others, random_lm())
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with FileLock(tmp_path / ".records.jsonl.lock"), pytest.raises(ConfigError, match="another process is writing"):
        collect_local(ASK, out, settings(), random_lm())
    assert collect_local(ASK[:1], out, settings(), random_lm()).records == 3


RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_collect
from terselm.data.collect import collect_local
collect_local(test_collect.ASK * 1, Path(sys.argv[2]), test_collect.slow_settings(sys.argv[1]))
"""


def slow_settings(model: str) -> CollectSettings:
    """Of a run of some seconds in many small commits."""
    return settings(model=model, batch_size=2, max_new_tokens=120)


@pytest.mark.slow
def test_after_kill_9_the_next_run_goes_on(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out" / "records.jsonl"
    lm = random_lm()
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    journal = out.with_name("records.jsonl.journal")
    out.parent.mkdir()
    committed: list[bytes] = []
    chance = random.Random(0)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(model), str(out), *paths])
        while not journal.exists() or len(journal.read_bytes().split(b"\n")) < len(committed) + 5:
            assert process.poll() is None, "ended before it could be killed; make the run slower"
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        lines = journal.read_bytes().split(b"\n")[:-1]
        assert lines[: len(committed)] == committed
        committed = lines
        assert not out.exists()
        with journal.open("ab") as file:  # as if the kill had come in the middle of a write
            file.write(committed[0][: chance.randrange(1, len(committed[0]))])
    summary = collect_local(ASK, out, slow_settings(str(model)))
    assert summary.reused >= 10
    assert summary.reused + sum(b'"dropped"' in line for line in committed) == len(committed)
    whole = tmp_path / "whole.jsonl"
    collect_local(ASK, whole, slow_settings(str(model)))
    assert undated(out) == undated(whole)
    assert [path.name for path in out.parent.iterdir()] == ["records.jsonl"]


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    journal = tmp_path / "records.jsonl.journal"
    for line, message in (
        ("{", "broken JSON"),
        ('{"id": "a"}', "not an entry"),
        ('{"dropped": "loop"}', "not an entry"),
    ):
        journal.write_text('{"id": "a", "dropped": "loop"}\n' + line + "\n")
        with pytest.raises(DataFormatError, match=rf"records\.jsonl\.journal:2: .*{message}"):
            collect_local(ASK[:1], tmp_path / "records.jsonl", settings(), random_lm())
        assert len(journal.read_text().splitlines()) == 2


def test_a_prompt_that_does_not_fit_stops_before_anything_is_generated(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with pytest.raises(ContextLengthError, match="do not fit into the window of 40 tokens"):
        collect_local(ASK, out, settings(), random_lm(window=40))
    assert not out.exists()


def collect(lm: CausalLM, path: Path, prompts: Sequence[str], **changes: Any) -> tuple[CollectSummary, list[Record]]:
    summary = collect_local(instructions(*prompts), path, settings(**changes), lm)
    return summary, list(read_records(path))


def test_a_greedy_loop_is_cut_after_its_first_cycle(tmp_path: Path) -> None:
    lm = bigram_lm(["eins", "zwei", "drei"], {"eins": {"zwei": 0.9}, "zwei": {"drei": 0.9}, "drei": {"eins": 0.9}})
    summary, (record,) = collect(lm, tmp_path / "r.jsonl", ["eins"], temperatures=[0.0], max_new_tokens=30)
    assert record.response == "zwei drei eins"
    assert record.generation is not None
    assert (record.generation.finish_reason, record.generation.attempts) == ("loop", 1)
    assert record.generation.usage.completion_tokens == 30
    assert (summary.cut, summary.retried, summary.dropped) == (1, 0, ())


def test_a_sampled_answer_is_drawn_again_until_it_is_fit(tmp_path: Path) -> None:
    """Of a model that says nothing two times out of three."""
    lm = bigram_lm(["ask", "yes"], {"ask": {"</s>": 0.66, "yes": 0.33}, "yes": {"</s>": 0.9999}})
    ask = [f"ask {'ask ' * n}".strip() for n in range(30)]
    summary, records = collect(lm, tmp_path / "r.jsonl", ask, temperatures=[1.0], attempts=4)
    attempts = [record.generation.attempts for record in records if record.generation]
    assert {record.response.split()[0] for record in records} == {"yes"}
    assert set(attempts) == {1, 2, 3, 4}
    assert summary.retried == sum(count > 1 for count in attempts)
    assert summary.records + len(summary.dropped) == 30
    assert {dropped.fault for dropped in summary.dropped} == {Fault.EMPTY}  # (2/3)^4 of them, about 6
    # What was dropped is asked again by the next run, in vain, since its seeds are the same.
    assert collect(lm, tmp_path / "r.jsonl", ask, temperatures=[1.0], attempts=4)[0].dropped == summary.dropped


def test_a_greedy_answer_with_a_fault_is_dropped_and_said(tmp_path: Path) -> None:
    table = {"a": {"</s>": 0.9}, "b": {"c": 0.9}, "c": {"</s>": 0.9}}
    summary, records = collect(bigram_lm("abc", table), tmp_path / "r.jsonl", ["a", "b"], temperatures=[0.0])
    assert [record.response for record in records] == ["c"]
    assert summary.dropped == (Dropped(instruction="i0", temperature=0.0, fault=Fault.EMPTY),)


def test_what_the_journal_says_is_dropped_is_not_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    table = {"a": {"</s>": 0.9}, "b": {"c": 0.9}, "c": {"</s>": 0.9}}
    summary, _ = collect(bigram_lm("abc", table), out, ["a", "b"], temperatures=[0.0])
    (lost,) = plan_requests(instructions("a"), settings(temperatures=[0.0]))
    journal = out.with_name("r.jsonl.journal")
    out.rename(journal)  # as if the run had been killed before it wrote the file
    with journal.open("a") as file:
        file.write(f'{{"id": "{lost.id}", "dropped": "empty"}}\n')
    assert collect_local(instructions("a", "b"), out, settings(temperatures=[0.0])) == replace(summary, reused=1)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_nothing_fit_to_keep(tmp_path: Path) -> None:
    lm = bigram_lm("a", {"a": {"</s>": 0.9}})
    for _ in range(2):
        with pytest.raises(TargetLLMError, match="none of the 1 answers of no/such/model/here was fit to keep"):
            collect(lm, tmp_path / "r.jsonl", ["a"], temperatures=[0.0])
    assert not (tmp_path / "r.jsonl").exists()


def test_no_progress_bar_off_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    collect_local(ASK[:2], tmp_path / "r.jsonl", settings(), random_lm())
    assert capfd.readouterr() == ("", "")

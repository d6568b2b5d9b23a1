"""Suites from local files: what becomes of their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from terselm.errors import ConfigError, DataFormatError
from terselm.evaluate.items import full_text
from terselm.evaluate.settings import Distractors, SuiteName, SuiteSettings, parse_budget
from terselm.evaluate.suites import load_suite


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gsm8k(gsm8k: Path) -> None:
    settings = SuiteSettings(questions=6, sets=3, shots=4, data=gsm8k / "test.jsonl", train=gsm8k / "train.jsonl")
    suite = load_suite(settings)
    assert [item.group for item in suite.items] == ["set 0", "set 1", "set 2"] * 2
    item = suite.items[0]
    assert item.prompt.question.startswith("Question: test ")
    assert item.prompt.question.endswith("\nLet's think step by step")
    assert len(item.prompt.demonstrations) == 4
    assert all("<<" not in text and "\nThe answer is " in text for text in item.prompt.demonstrations)
    assert (
        item.gold
        == f"\nHe had {int(item.answers[0]) + 2} - 2 = {item.answers[0]} left.\nThe answer is {item.answers[0]}"
    )
    assert suite.right is not None
    assert suite.right(item.gold, item)
    assert len({item.prompt.demonstrations for item in suite.items}) == 3
    assert load_suite(settings).items == suite.items
    assert full_text(item.bare) == f"{item.prompt.instruction}\n\n{item.prompt.question}"


def test_gsm8k_with_a_given_prompt(gsm8k: Path) -> None:
    (gsm8k / "prompt.txt").write_text(
        "Question: a\nThe answer is 1\n\n\nQuestion: b\nThe answer is 2\n", encoding="utf-8"
    )
    settings = SuiteSettings(questions=2, data=gsm8k / "test.jsonl", prompt=gsm8k / "prompt.txt")
    assert [item.prompt.demonstrations for item in load_suite(settings).items] == [
        ("Question: a\nThe answer is 1", "Question: b\nThe answer is 2")
    ] * 2


def test_bbh(tmp_path: Path) -> None:
    (tmp_path / "cot").mkdir()
    (tmp_path / "cot" / "navigate.txt").write_text(
        "Do you return?\n\nQ: one\n- Yes\n- No\nA: Let's think step by step.\nSo the answer is Yes.\n\n"
        "Q: two\n\nwith a gap\nA: Let's think step by step.\nSo the answer is No.\n",
        encoding="utf-8",
    )
    examples = [{"input": f"walk {i}", "target": "Yes"} for i in range(5)]
    (tmp_path / "navigate.json").write_text(json.dumps({"canary": "x", "examples": examples}), encoding="utf-8")
    suite = load_suite(SuiteSettings(name=SuiteName.BBH, questions=3, data=tmp_path, prompt=tmp_path / "cot"))
    item = suite.items[0]
    assert len(suite.items) == 3
    assert item.prompt.instruction == "Do you return?"
    assert [text[:6] for text in item.prompt.demonstrations] == ["Q: one", "Q: two"]
    assert "with a gap" in item.prompt.demonstrations[1]
    assert item.prompt.question.startswith("Q: walk ")
    assert item.gold == "\nSo the answer is Yes."
    assert item.group == "navigate"
    with pytest.raises(ConfigError, match="holds no prompt for sorting; there are navigate"):
        load_suite(SuiteSettings(name=SuiteName.BBH, data=tmp_path, prompt=tmp_path / "cot", tasks=["sorting"]))
    with pytest.raises(ConfigError, match="expected the folder with BBH's chain-of-thought prompts"):
        load_suite(SuiteSettings(name=SuiteName.BBH))


def test_nq(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"who is {i}",
            "answers": [f"Person{i}", f"P{i}"],
            "ctxs": [{"title": f"T{i}", "text": f"Person{i} did it.", "isgold": True}],
        }
        for i in range(8)
    ]
    suite = load_suite(
        SuiteSettings(name=SuiteName.NQ, questions=5, documents=4, data=write_lines(tmp_path / "nq.jsonl", rows))
    )
    assert suite.kept is not None
    places = set()
    for item in suite.items:
        documents = item.prompt.demonstrations
        assert len(documents) == 4
        assert [text.split("(")[0] for text in documents] == [f"Document [{i}]" for i in range(1, 5)]
        holding = [i for i, text in enumerate(documents) if item.answers[0] in text]
        assert len(holding) == 1
        places.add(holding[0])
        assert suite.kept(full_text(item.prompt), item)
        assert not suite.kept(full_text(item.bare), item)
        assert item.gold == f" {item.answers[0]}"
    assert len(places) > 1


def rivals(path: Path) -> Path:
    """Eight questions; of the passages of the last six, those of 2 to 4 share most words with the first question."""
    texts = ["the lighthouse was built by Ada", "Bob", *["the lighthouse was built tall"] * 3, *["quiet rain"] * 3]
    rows = [
        {
            "question": "who built the lighthouse" if i == 0 else f"who is {i}",
            "answers": ["Ada"] if i == 0 else [f"Person{i}"],
            "ctxs": [{"title": f"T{i}", "text": text}],
        }
        for i, text in enumerate(texts)
    ]
    rows[7]["ctxs"] = [{"title": "T7", "text": "the lighthouse was built by her, Ada"}]  # an answer: no distractor
    return write_lines(path, rows)


def test_nq_with_the_hardest_distractors(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    options: dict[str, Any] = {"name": SuiteName.NQ, "questions": 8, "documents": 4, "data": rivals(tmp_path / "n")}
    suite = load_suite(SuiteSettings(distractors=Distractors.HARDEST, **options))
    (first,) = (item for item in suite.items if item.id == "0")
    titles = {text.split("Title: ")[1].split(")")[0] for text in first.prompt.demonstrations}
    assert titles == {"T0", "T2", "T3", "T4"}
    assert load_suite(SuiteSettings(distractors=Distractors.HARDEST, **options)).items == suite.items
    assert load_suite(SuiteSettings(**options)).items != suite.items


def test_the_hardest_distractors_need_bm25s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    settings = SuiteSettings(
        name=SuiteName.NQ, questions=2, documents=2, distractors=Distractors.HARDEST, data=rivals(tmp_path / "n.jsonl")
    )
    with pytest.raises(ConfigError, match="bm25s is not installed"):
        load_suite(settings)


def test_longbench(tmp_path: Path) -> None:
    rows = [
        {
            "input": "Who?",
            "context": "one\n\n" + "word " * 400,
            "answers": ["Ada", "A."],
            "dataset": task,
            "_id": f"{i}",
        }
        for task in ("hotpotqa", "musique")
        for i in range(3)
    ]
    rows[5] |= {"input": "Question: Who?\nType:"}
    data = write_lines(tmp_path / "l.jsonl", rows)
    suite = load_suite(SuiteSettings(name=SuiteName.LONGBENCH, questions=3, tasks=["hotpotqa", "musique"], data=data))
    assert [item.group for item in suite.items] == ["hotpotqa"] * 3 + ["musique"] * 3
    assert len({item.id for item in suite.items}) == 6
    assert {item.prompt.question for item in suite.items[:3]} == {"Question: Who?\nAnswer:"}
    assert "Question: Who?\nType:" in {item.prompt.question for item in suite.items[3:]}
    item = suite.items[0]
    assert len(item.prompt.demonstrations) == 2
    assert (item.gold, item.answers, suite.short) == (" Ada", ["Ada", "A."], True)
    assert suite.right is not None
    assert suite.right("It was Ada.", item)
    (summed,) = load_suite(
        SuiteSettings(
            name=SuiteName.LONGBENCH,
            questions=1,
            data=write_lines(tmp_path / "g.jsonl", [{**rows[0], "input": "", "dataset": "gov_report"}]),
        )
    ).items
    assert summed.prompt.question == "Summarize the text above.\nSummary:"
    with pytest.raises(ConfigError, match="name tasks of LongBench"):
        load_suite(SuiteSettings(name=SuiteName.LONGBENCH))
    bad = write_lines(tmp_path / "b.jsonl", [{**rows[0], "answers": "x"}])
    with pytest.raises(ConfigError, match="expected a list of texts under 'answers', got 'x'"):
        load_suite(SuiteSettings(name=SuiteName.LONGBENCH, questions=1, data=bad))


def test_meetings(tmp_path: Path) -> None:
    said = "\n".join(f"Speaker {i}: " + "word " * 99 for i in range(4))
    data = write_lines(tmp_path / "m.jsonl", [{"id": 1, "uid": "a", "transcript": said, "summary": "They spoke."}])
    suite = load_suite(SuiteSettings(name=SuiteName.MEETINGBANK, questions=1, data=data))
    assert [len(text.split("\n")) for text in suite.items[0].prompt.demonstrations] == [2, 2]
    assert suite.items[0].prompt.question == "Summarize the meeting above in a few sentences.\nSummary:"
    assert (suite.items[0].gold, suite.right, suite.short) == (" They spoke.", None, False)
    asked = [
        {"id": "a", "pid": "b", "input": f"What was decided?\n{said}", "output": "Nothing."},
        {"input": "What was decided?", "context": said, "answers": ["Nothing."]},  # as LongBench has it
    ]
    data = write_lines(tmp_path / "q.jsonl", asked)
    one, other = load_suite(SuiteSettings(name=SuiteName.QMSUM, questions=2, data=data)).items
    assert one.prompt == other.prompt
    assert one.prompt.question == "Question: What was decided?\nAnswer:"
    assert one.gold == other.gold == " Nothing."
    data = write_lines(tmp_path / "r.jsonl", [{"input": "What?", "output": "x"}])
    with pytest.raises(ConfigError, match="expected a question, a line end and a transcript"):
        load_suite(SuiteSettings(name=SuiteName.QMSUM, questions=1, data=data))


@pytest.mark.parametrize("name", ["longbench", "meetingbank", "qmsum"])
def test_the_hub_out_of_reach(name: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "from terselm.evaluate.settings import SuiteName, SuiteSettings\n"
        "from terselm.evaluate.suites import load_suite\n"
        "from terselm.errors import ConfigError\n"
        f"settings = SuiteSettings(name=SuiteName({name!r}), tasks=['hotpotqa'])\n"
        "try:\n    load_suite(settings)\nexcept ConfigError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline)
    assert done.stdout.count("\n") == 1, done.stderr
    assert done.stdout.endswith("give local files instead (suite.data)\n")


def test_sharegpt(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "system", "value": "ignored"},
        {"from": "human", "value": "How?"},
        {"from": "gpt", "value": "So."},
        {"from": "human", "value": "never answered"},
    ]
    data = write_lines(tmp_path / "s.jsonl", [{"conversations": turns}, {"conversations": turns[:2]}, {"x": 1}])
    (item,) = load_suite(SuiteSettings(name=SuiteName.SHAREGPT, questions=1, data=data)).items
    assert item.prompt.demonstrations == ("User: Hi", "Assistant: Hello")
    assert item.prompt.question == "User: How?\nAssistant:"
    assert item.answers == ("So.",)
    with pytest.raises(ConfigError, match="has 1 usable rows; 2 are asked for"):
        load_suite(SuiteSettings(name=SuiteName.SHAREGPT, questions=2, data=data))


def test_arxiv(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"text": "short one\n\nshort two\n\n" + "long " * 400}])
    (item,) = load_suite(SuiteSettings(name=SuiteName.ARXIV, questions=1, data=data)).items
    assert item.prompt.demonstrations[0] == "short one\nshort two"
    assert len(item.prompt.demonstrations) == 2
    assert item.answers == ()


def test_own_prompts(tmp_path: Path) -> None:
    data = write_lines(
        tmp_path / "p.jsonl",
        [{"demonstrations": ["a", "b"], "question": "c?", "answer": "d"}, {"instruction": "e", "question": "f?"}],
    )
    items = load_suite(SuiteSettings(name=SuiteName.PROMPTS, data=data)).items
    assert [(item.gold, tuple(item.answers)) for item in items] == [("\nd", ("d",)), ("", ())]
    with pytest.raises(ConfigError, match="unknown key 'answers'"):
        load_suite(SuiteSettings(name=SuiteName.PROMPTS, data=write_lines(tmp_path / "q.jsonl", [{"answers": 1}])))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "answer": "no mark"}], "expected an answer that ends with '#### NUMBER'"),
        ([{"question": "", "answer": "a\n#### 1"}], "expected a text under 'question'"),
        ([{"answer": "a\n#### 1"}], "expected a text under 'question', got None"),
        ([], "GSM8K has 0 test rows here; 1 questions are asked for"),
    ],
)
def test_rows_of_another_form(gsm8k: Path, rows: list[dict[str, Any]], message: str) -> None:
    data = write_lines(gsm8k / "bad.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        load_suite(SuiteSettings(questions=1, sets=1, data=data, train=gsm8k / "train.jsonl"))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="cannot be read"):
        load_suite(SuiteSettings(data=tmp_path / "none.jsonl"))
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataFormatError, match="broken JSON"):
        load_suite(SuiteSettings(data=tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("text", "tokens"), [("1-shot", 13), ("half-shot", 9), ("quarter-shot", 7), ("2-shot", 21), ("7", 7), ("0.5", 10)]
)
def test_budgets(gsm8k: Path, text: str, tokens: int) -> None:
    data = write_lines(
        gsm8k / "own.jsonl",
        [{"instruction": "a b", "demonstrations": ["1 2 3 4 5 6", "1 2 3 4 5 6 7 8 9 10"], "question": "c d e"}],
    )
    (item,) = load_suite(SuiteSettings(name=SuiteName.PROMPTS, data=data)).items
    assert parse_budget(text).of(item, lambda words: len(words.split())) == tokens


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "shot", "x-shot", "0.0", "1e3"])
def test_unknown_budgets(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a budget; expected '1-shot'"):
        parse_budget(text)

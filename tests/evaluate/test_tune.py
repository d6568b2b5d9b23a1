"""The search for settings, with a tiny target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.settings import RankBy, UnitKind
from terselm.config import load_config
from terselm.errors import ConfigError
from terselm.evaluate import tune as tune_module
from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.opening import parse_method
from terselm.evaluate.settings import TargetSettings, TuneSettings
from terselm.evaluate.tune import Candidate, around, ranked_shapes, rankers_here, shapes, tune

ROWS = [
    {
        "instruction": "Answer.",
        "demonstrations": [
            f"Question: {a} + {b}?\nAnswer: it is {a + b}." for a, b in ((i, 1), (i, 2), (2, i), (3, i))
        ],
        "question": f"Question: {i} + {i}?",
        "answer": f"Answer: it is {2 * i}.",
    }
    for i in range(3)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "shapes", lambda: shapes()[:4])
    monkeypatch.setattr(tune_module, "around", lambda best: list(around(best))[:2])


def settings_for(prompts: Path, tiny: Path, **options: Any) -> TuneSettings:
    return TuneSettings(
        prompts=prompts, target=TargetSettings(model=str(tiny), device="cpu"), model=str(tiny), device="cpu", **options
    )


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]


def test_the_best_at_a_budget(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    settings = settings_for(write(tmp_path / "p.jsonl", ROWS), tiny, budget="0.5")
    found = tune(settings, tmp_path / "out")
    means: dict[str, float] = {}
    for name in {entry["method"] for entry in entries_of(tmp_path / "out")} - {"zero-shot", "full"}:
        chosen = [entry for entry in entries_of(tmp_path / "out") if entry["method"] == name]
        means[name] = float(np.mean([entry["nats"] / entry["gold_tokens"] for entry in chosen]))
    assert len(means) > 4
    assert means[found.best.name] == min(means.values())
    loaded = load_config(CompressionSettings, tmp_path / "out" / "compress.yaml")
    assert Candidate(settings=loaded).name == found.best.name
    compressor = PromptCompressor.from_pretrained(tiny, device="cpu", settings=loaded)
    assert compressor.compress(demonstrations=["a b c d e f g h"], question="i?", rate=0.5).compressed_tokens
    first_line = (tmp_path / "out" / "compress.yaml").read_text().splitlines()[0]
    assert first_line == f"# terselm compress --model {tiny} --config compress.yaml --rate 0.5 --prompt prompt.json"
    again = tune(settings, tmp_path / "out")
    assert again.best == found.best


def test_the_smallest_budget_at_a_quality(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    prompts = write(tmp_path / "p.jsonl", ROWS)
    found = tune(settings_for(prompts, tiny, quality=0.01, minutes=0.001), tmp_path / "out")
    tried = {entry["budget"] for entry in entries_of(tmp_path / "out")} - {"-"}
    assert found.budget in tried
    assert not found.reached or float(found.budget) == min(
        float(one.budget)
        for one in found.figures
        if one.method == found.best.name and one.budget != "-" and one.quality["gain_retained"].value >= 0.01
    )


def test_prompts_without_answers(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(tune_module, "_ANSWER_TOKENS", 8)
    rows = [ROWS[0], *({key: row[key] for key in row if key != "answer"} for row in ROWS[1:])]
    tune(settings_for(write(tmp_path / "p.jsonl", rows), tiny, budget="0.5", minutes=0.001), tmp_path / "out")
    answered = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert answered[0] == ROWS[0]
    assert all(row["answer"] for row in answered)


def without_answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "answer"} for row in rows]


def test_another_file_of_prompts_is_not_the_first(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(tune_module, "_ANSWER_TOKENS", 8)
    first = write(tmp_path / "a.jsonl", without_answers(ROWS))
    out = tmp_path / "out"
    tuned = tune(settings_for(first, tiny, budget="0.5"), out)  # with all the time it takes: a limit would choose, too
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    changed = [{**row, "question": f"{row['question']} Say it."} for row in without_answers(ROWS)]
    for rows in (changed, without_answers(ROWS)[:2]):
        other = write(tmp_path / "b.jsonl", rows)
        with pytest.raises(ConfigError, match="holds another evaluation"):
            tune(settings_for(other, tiny, budget="0.5"), out)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    same = write(tmp_path / "c.jsonl", without_answers(ROWS))
    assert tune(settings_for(same, tiny, budget="0.5"), out).best == tuned.best
    assert (out / JOURNAL).read_bytes() == before[JOURNAL]  # it all was measured before


def documents(question: str = "who?") -> Prompt:
    return Prompt(demonstrations=["Ada built it. It rained.", "Bob left."], question=question)


def test_documents_are_ranked_for_the_question() -> None:
    names = [one.name for one in ranked_shapes([documents()], [RankBy.QUESTION, RankBy.BM25])]
    assert names == [
        f"terselm:unit={unit},rank_by={by}" for by in ("question", "bm25") for unit in ("sentence", "line")
    ]
    assert [parse_method(name).settings for name in names] == [
        one.settings for one in ranked_shapes([documents()], [RankBy.QUESTION, RankBy.BM25])
    ]
    examples = Prompt(demonstrations=["Question: a", "Question: b"], question="Question: c")
    assert {one.settings.unit for one in ranked_shapes([examples], [RankBy.QUESTION])} == {"demonstration", "line"}
    assert ranked_shapes([documents(), documents(question="")], [RankBy.QUESTION]) == []
    assert ranked_shapes([Prompt(question="who?")], [RankBy.QUESTION]) == []
    assert RankBy.QUESTION in rankers_here()


def test_around_a_ranking_only_what_makes_a_difference() -> None:
    near = [one.name for one in around(CompressionSettings(rank_by=RankBy.QUESTION, unit=UnitKind.SENTENCE))]
    assert "terselm:unit=sentence,rank_by=question,order=ranked" in near
    assert "terselm:unit=sentence,rank_by=question,rank_delta=0.3" in near
    assert not any("anchor" in name or "segment_size" in name for name in near)
    assert not any("order" in one.name or "rank" in one.name for one in around(CompressionSettings()))


def test_documents_are_tuned(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(tune_module, "rankers_here", lambda: [RankBy.QUESTION])
    rows = [
        {
            "demonstrations": [f"Person{i} built it. It rained.", "Bob left. He ran."],
            "question": f"who {i}?",
            "answer": "x",
        }
        for i in range(3)
    ]
    tune(settings_for(write(tmp_path / "p.jsonl", rows), tiny, budget="0.5"), tmp_path / "out")
    tried = {entry["method"] for entry in entries_of(tmp_path / "out")}
    assert {"terselm", "terselm:unit=sentence,rank_by=question", "terselm:unit=line,rank_by=question"} <= tried


def test_names_say_what_differs() -> None:
    names = [candidate.name for candidate in shapes()]
    assert names[0] == "terselm"
    assert len(set(names)) == len(names)
    assert "terselm:anchor=1.0,anchor_by=last" in names
    assert "terselm:anchor=0.0,question_rate=0.9,instruction_rate=0.85" in names
    near = [candidate.name for candidate in around(CompressionSettings())]
    assert len(set(near)) == len(near)
    assert "terselm" not in near


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of a budget and a quality"),
        ({"budget": "0.5", "quality": 0.5}, "give exactly one of a budget and a quality"),
        ({"quality": 1.5}, "quality is 1.5"),
        ({"budget": "much"}, "'much' is not a budget"),
        ({"budget": "300", "minutes": 0}, "minutes and questions must be above 0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneSettings(prompts=Path("p.jsonl"), **options)


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "terselm",
        "tune",
        tmp_path / "p.jsonl",
        "--out",
        tmp_path / "out",
        "--target",
        "x",
        "--budget",
        "-1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'-1' is not a budget" in done.stderr

"""Alignment for use by the real script on a tiny model: what it leaves, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_align_run import unfinished, wait_for
from tiny_labels import label, write_tiny_labels
from tiny_training import Script

from terselm.config import dump_config
from terselm.models.utility_head import UtilityHead
from terselm.train.align import main
from terselm.train.run_folder import run_key
from terselm.train.settings import AlignSettings, ObjectiveSettings

MakeScript = Callable[[Path], Script]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
FILES = ("adapter_model.safetensors", "utility_head.safetensors")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_labels(tmp_path_factory.mktemp("labels") / "labels.jsonl")


@pytest.fixture(scope="module")
def options(labels: Path, records_file: Path) -> list[str]:
    """Labels and records together."""
    mixture = f"data.mixture={{{labels}: 1.0, {records_file}: 0.5}}"
    return [mixture, "objective.utility=1", "objective.nll=0.1", "optimisation.head_learning_rate=0.02", "tracker=none"]


@pytest.fixture(scope="module")
def trained(make_script: MakeScript, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Script:
    script = make_script(tmp_path_factory.mktemp("trained"))
    done = script(*options)
    assert done.returncode == 0, done.stderr
    assert "utility of units by the trained head: rank correlation" in done.stderr
    return script


def result(script: Script) -> dict[str, bytes]:
    """The bytes of every tensor; safetensors writes what is noted beside them in any order."""
    return {
        f"{name} {key}": tensor.numpy().tobytes()
        for name in FILES
        for key, tensor in load_file(script.run / "adapter" / name).items()
    }


def test_it_leaves_a_head_with_its_adapter_and_metrics(trained: Script, model_name: str) -> None:
    head = UtilityHead.load(trained.run / "adapter", 32, base=model_name)
    assert head.facts == {"base": model_name, "target": "teacher"}
    assert head.weight.abs().max() > 0
    assert not any("utility" in name for name in load_file(trained.run / "adapter" / FILES[0]))
    metrics = trained.metrics()
    assert metrics["loss_history"][-1]["loss"] < metrics["loss_history"][0]["loss"]
    found = metrics["utility"]
    assert set(found["rankers"]) >= {"score", "surprisal"}
    for values in found["rankers"].values():
        assert values["best_first"]["value"] <= values["best_in_10"]["value"] <= values["best_in_25"]["value"]
        low, high = values["spearman"]["interval"]
        assert -1 <= low <= values["spearman"]["value"] <= high <= 1
    assert found["targets"] == ["teacher"]
    assert metrics["data"]["targets"] == ["teacher"]


def test_killed_while_training_it_goes_on_to_the_same_bytes(
    make_script: MakeScript, tmp_path: Path, options: list[str], trained: Script
) -> None:
    script = make_script(tmp_path)
    process = script.start(*options)
    wait_for(lambda: any(script.run.glob("checkpoints/checkpoint-*/whole.json")), process)
    process.kill()
    process.wait()
    assert unfinished(script)
    done = script(*options)
    assert done.returncode == 0, done.stderr
    assert script.metrics()["training"]["resumed"]
    assert result(script) == result(trained)


@pytest.mark.slow
def test_two_processes_equal_one(make_script: MakeScript, tmp_path: Path, options: list[str], trained: Script) -> None:
    script = make_script(tmp_path)
    done = script(*options, launcher=[*LAUNCH, "--main_process_port", "0"], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    ours, theirs = script.metrics(), trained.metrics()
    assert ours["compute"]["processes"] == 2
    assert [entry["loss"] for entry in ours["loss_history"]] == pytest.approx(
        [entry["loss"] for entry in theirs["loss_history"]], abs=1e-4
    )
    for name in FILES:
        expected = load_file(trained.run / "adapter" / name)
        for key, weight in load_file(script.run / "adapter" / name).items():
            torch.testing.assert_close(weight, expected[key], atol=1e-4, rtol=0)
    found, wanted = (m["utility"]["rankers"]["surprisal"]["spearman"]["value"] for m in (ours, theirs))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_labels_alone_train_all_weights_and_the_best_are_kept(
    make_script: MakeScript, tmp_path: Path, labels: Path
) -> None:
    script = make_script(tmp_path)
    options = [f"data.records={labels}", "objective.utility=1", "objective.nll=0", "method=full", "tracker=none"]
    options += ["evaluation.every=4", "save_every=4", "optimisation.head_learning_rate=0.02", "evaluation.held_out=0.3"]
    assert main([*script.command()[1:], *options]) == 0
    scores = {entry["step"]: entry["eval_utility"] for entry in script.metrics()["choice_history"]}
    best = max(scores, key=scores.__getitem__)
    kept = script.run / "checkpoints" / f"checkpoint-{best}"
    assert load_file(kept / FILES[1]).keys() == {"weight", "bias"}
    for name, weight in load_file(script.run / "model" / FILES[1]).items():
        assert torch.equal(weight, load_file(kept / FILES[1])[name])
    assert not any("utility" in name for name in load_file(script.run / "model" / "model.safetensors"))


def test_runs_made_before_are_still_known() -> None:
    """The key of the defaults as it was before there were labels."""
    before = "8422668f1a101909626d29f910318a30b97d65b0735087ff31faf253879e994c"
    assert run_key(dump_config(AlignSettings()), "x") == before
    changed = AlignSettings(objective=ObjectiveSettings(utility=1.0))
    assert run_key(dump_config(changed), "x") != before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.target=other", "the labels are of 'teacher', but objective.target is 'other'; make labels of"),
        ("data.records={records}", "objective.utility learns from labelled prompts, and data.records holds none"),
        ("data.records={flat}", "none of the labelled prompts that are trained on can be used: "),
        ("data.records={single}", "single.jsonl:1: the prompt has 1 unit; expected 2 to "),
        (
            "evaluation.metric=kept_overlap",
            "evaluation.metric=kept_overlap compares with the target; give",
        ),
    ],
)
def test_mistakes_take_one_sentence(
    make_script: MakeScript,
    tmp_path: Path,
    labels: Path,
    records_file: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    write_tiny_labels(tmp_path / "flat.jsonl", 0, [replace(label(i), utility=(1.0,) * 6) for i in range(30)])
    one = label(0).to_json() | {"units": [[0, 0, 5]], "parents": [-1], "utility": [1.0]}
    (tmp_path / "single.jsonl").write_text(json.dumps(one) + "\n", encoding="utf-8")
    override = override.format(records=records_file, flat=tmp_path / "flat.jsonl", single=tmp_path / "single.jsonl")
    script = make_script(tmp_path)
    options = [f"data.records={labels}", "objective.utility=1", "objective.nll=0", override]
    capsys.readouterr()
    assert main([*script.command()[1:], *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not script.run.exists()


def test_a_run_without_utility_has_no_head(finished: Script) -> None:
    assert not (finished.run / "adapter" / FILES[1]).exists()
    assert "utility" not in finished.metrics()


def test_the_best_weights_by_kept_words(make_script: MakeScript, tmp_path: Path, tiny_model: Path) -> None:
    """Towards the base itself, which keeps what it keeps before anything is trained."""
    script = make_script(tmp_path)
    options = ["objective.nll=0", "objective.matching=1", f"objective.target={tiny_model}", "tracker=none"]
    options += ["evaluation.every=5", "evaluation.metric=kept_overlap", "optimisation.epochs=2", "save_every=5"]
    assert main([*script.command()[1:], *options]) == 0
    history = script.metrics()["choice_history"]
    assert history
    assert all(0.9 < entry["eval_kept_overlap"] <= 1 for entry in history)

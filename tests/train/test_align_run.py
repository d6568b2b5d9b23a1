"""The real script on a tiny model: what it leaves, what it refuses, and that it survives being killed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import ROOT, Script, surprisals

from terselm.config import load_config
from terselm.models import load_causal_lm
from terselm.train.align import main
from terselm.train.packing import collate
from terselm.train.settings import AlignSettings
from terselm.train.surprisals import give_surprisals
from terselm.train.texts import prepare_texts
from terselm.train.trainer import schedule_rows

MakeScript = Callable[[Path], Script]


def adapter(script: Script) -> dict[str, torch.Tensor]:
    return load_file(script.run / "adapter" / "adapter_model.safetensors")


def test_it_leaves_an_adapter_with_its_metrics(finished: Script, model_name: str) -> None:
    metrics = finished.metrics()
    held_out = metrics["held_out"]
    assert held_out["after"]["bits_per_byte"] < held_out["before"]["bits_per_byte"]
    assert held_out["difference"]["bits_per_byte_interval"][1] < 0
    assert held_out["difference"]["bits_per_byte"] == pytest.approx(
        held_out["after"]["bits_per_byte"] - held_out["before"]["bits_per_byte"]
    )
    history = metrics["loss_history"]
    assert history[-1]["step"] == metrics["training"]["steps"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["tokens"] == metrics["training"]["tokens_seen"]
    base = json.loads((finished.run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == model_name
    assert {path.name for path in (finished.run / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(finished).items() if "lora_B" in name)


def test_the_tokens_seen_are_the_real_ones(finished: Script) -> None:
    metrics = finished.metrics()
    # Whole epochs but for the rounding to whole steps: at most a row's tokens a step more or less.
    expected = 4 * metrics["data"]["training_tokens"]
    assert metrics["training"]["tokens_seen"] == pytest.approx(expected, abs=2 * 64 * 4)


def test_the_first_loss_is_the_mean_over_the_tokens_of_the_step(finished: Script) -> None:
    """An adapter begins as nothing, so the first step's loss is the base model's, over all four passes together."""
    config = load_config(AlignSettings, finished.config)
    lm = load_causal_lm(config.model, device="cpu")
    rows = schedule_rows(prepare_texts(config, lm).rows, config)[: config.optimisation.rows_per_step]
    give_surprisals(lm.model, autocast=None)
    with torch.inference_mode():
        expected = torch.cat([surprisals(lm.model, collate([row], pad_id=0)) for row in rows]).mean().item()
    assert finished.metrics()["loss_history"][0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_every_epoch_sees_every_row_once(finished: Script) -> None:
    config = load_config(AlignSettings, finished.config)
    rows = prepare_texts(config, load_causal_lm(config.model, device="cpu")).rows
    schedule = schedule_rows(rows, config)
    assert len(schedule) % config.optimisation.rows_per_step == 0
    for start in range(0, len(schedule), len(rows)):
        epoch = [id(row) for row in schedule[start : start + len(rows)]]
        assert len(set(epoch)) == len(epoch)


def test_a_second_run_has_nothing_to_do(finished: Script) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.run.rglob("*")}
    done = finished()
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.run.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "holds a finished run with other settings or data"),
        ("data.records=/nowhere.jsonl", "/nowhere.jsonl: cannot be read: No such file"),
        ("data.max_lenght=12", "did you mean data.max_length?"),
    ],
)
def test_mistakes_take_one_sentence(
    finished: Script, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(finished.command(override)[1:]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_mistake_is_no_traceback(finished: Script) -> None:
    done = finished("seed=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimisation.rows_per_pass=3", "is not a multiple of 1 process(es) × optimisation.rows_per_pass=3"),
        ("data.max_length=300", "reads at most 256 tokens at once"),
        ("model=./nowhere", "no model at ./nowhere"),
    ],
)
def test_mistakes_found_late_leave_no_run(
    make_script: MakeScript, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    script = make_script(tmp_path)
    assert main(script.command(override)[1:]) == 2
    assert not script.run.exists()
    assert message in capsys.readouterr().err


def test_killed_while_training_it_goes_on(make_script: MakeScript, tmp_path: Path, finished: Script) -> None:
    script = make_script(tmp_path)
    process = script.start()
    wait_for(lambda: any(script.run.glob("checkpoints/checkpoint-*/whole.json")), process)
    process.kill()
    process.wait()
    assert unfinished(script)
    tear(script)
    done = script()
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert script.metrics()["training"]["resumed"]
    same_result(script, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_the_next_run_works(
    make_script: MakeScript, tmp_path: Path, finished: Script, seed: int
) -> None:
    draw = random.Random(seed)
    script = make_script(tmp_path)
    for _ in range(3):
        process = script.start()
        time.sleep(draw.uniform(0.1, 14))
        process.kill()
        process.wait()
        assert unfinished(script) or (script.run / "metrics.json").is_file()
    done = script()
    assert done.returncode == 0, done.stderr
    same_result(script, finished)
    assert not list(script.run.glob(".*partial*"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the process ended first"
        time.sleep(0.05)
    pytest.fail("waited for a minute in vain")


def unfinished(script: Script) -> bool:
    return not (script.run / "adapter").exists()


def tear(script: Script) -> None:
    """Leave a newer checkpoint as a kill in the middle of writing it would."""
    whole = max(script.run.glob("checkpoints/checkpoint-*/whole.json")).parent
    torn = whole.with_name("checkpoint-15")
    shutil.copytree(whole, torn)
    (torn / "whole.json").unlink()
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def same_result(script: Script, finished: Script) -> None:
    expected = adapter(finished)
    for name, tensor in adapter(script).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    ours, theirs = script.metrics(), finished.metrics()
    assert ours["training"]["tokens_seen"] == theirs["training"]["tokens_seen"]
    assert [entry["loss"] for entry in ours["loss_history"]] == pytest.approx(
        [entry["loss"] for entry in theirs["loss_history"]], abs=1e-5
    )


@pytest.mark.slow
def test_two_processes_equal_one(make_script: MakeScript, tmp_path: Path, finished: Script) -> None:
    script = make_script(tmp_path)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = script(launcher=[*launcher, "--main_process_port", "0"], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert script.metrics()["compute"]["processes"] == 2
    ours, theirs = script.metrics(), finished.metrics()
    assert ours["training"]["tokens_seen"] == theirs["training"]["tokens_seen"]
    assert [entry["loss"] for entry in ours["loss_history"]] == pytest.approx(
        [entry["loss"] for entry in theirs["loss_history"]], abs=1e-5
    )
    for moment in ("before", "after"):
        assert ours["held_out"][moment] == pytest.approx(theirs["held_out"][moment], abs=1e-4)


@pytest.mark.slow
def test_passes_of_several_rows_equal_passes_of_one(make_script: MakeScript, tmp_path: Path, finished: Script) -> None:
    script = make_script(tmp_path)
    assert script("optimisation.rows_per_pass=4").returncode == 0
    assert [entry["loss"] for entry in script.metrics()["loss_history"]] == pytest.approx(
        [entry["loss"] for entry in finished.metrics()["loss_history"]], abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["template=alpaca", "loss_on=all"], ["dtype=bfloat16"], ["data.overlong=drop"]])
def test_other_settings_train_too(make_script: MakeScript, tmp_path: Path, overrides: list[str]) -> None:
    script = make_script(tmp_path)
    done = script(*overrides)
    assert done.returncode == 0, done.stderr
    held_out = script.metrics()["held_out"]
    assert held_out["after"]["bits_per_byte"] < held_out["before"]["bits_per_byte"]


def test_it_runs_from_another_folder(finished: Script, tmp_path: Path) -> None:
    """As `accelerate launch PATH/train/align.py` does, with the script's own folder first on sys.path."""
    script = ROOT / "train" / "align.py"
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--config" in done.stdout


def test_the_command_is_the_script(make_script: MakeScript, tmp_path: Path, finished: Script) -> None:
    """`terselm align` in a process of its own: the same adapter as the script's, and the same words for a mistake."""
    script = make_script(tmp_path)
    command = [sys.executable, "-m", "terselm", "align", str(script.config)]
    done = subprocess.run([*command, "tracker=none"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    same_result(script, finished)
    assert main(script.command("seed=1")[1:]) == 2
    wrong = subprocess.run([*command, "seed=1"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "holds a finished run with other settings or data" in wrong.stderr


def test_a_config_is_named_by_position_or_option(finished: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished.config)]) == 0
    assert main(["--config", str(finished.config), "--no-resume"]) == 0
    assert capsys.readouterr().err.count("nothing to do") == 2
    assert main(["seed=1"]) == 2
    assert capsys.readouterr().err.startswith("error: no config file is named")

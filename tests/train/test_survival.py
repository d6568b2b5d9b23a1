"""Runs that are killed, run out of disk or memory, or go wrong: what is kept, what is said, and how they go on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import ROOT, Script

from terselm.errors import ConfigError
from terselm.train.align import main
from terselm.train.callbacks import rounds_since_best, tracker_callbacks
from terselm.train.fitting import fewer_rows
from terselm.train.settings import Tracker
from terselm.train.trainer import AlignmentTrainer

MakeScript = Callable[[Path], Script]


def weights(script: Script) -> bytes:
    return (script.run / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(script: Script) -> list[float]:
    return [entry["loss"] for entry in script.metrics()["loss_history"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "processes", "overrides"),
    [(20, 1, ["lora.dropout=0.1", "evaluation.every=5"]), (5, 2, ["lora.dropout=0.1"])],
)
def test_killed_at_random_moments_the_weights_are_the_same_to_the_bit(
    make_script: MakeScript, tmp_path: Path, kills: int, processes: int, overrides: list[str]
) -> None:
    """SIGKILL; dropout, so that a random state that is not restored shows."""
    script = make_script(tmp_path)
    command = [str(ROOT / "tests" / "train" / "killing.py"), str(script.config), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, str(kills), str(processes), "0", "save_every=1", *overrides],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    assert len(set(result["steps_at_kill"])) > 2, "the kills all fell on the same moment"
    assert all(result["same"])


def test_a_full_disk_keeps_the_checkpoint_before(make_script: MakeScript, finished: Script, tmp_path: Path) -> None:
    """No file may grow beyond 30 kB: the optimiser's state is larger."""
    script = make_script(tmp_path)
    assert main([*script.command()[1:], "--dry-run"]) == 0
    assert not script.run.exists()
    limited = ["bash", "-c", 'ulimit -f 30; exec "$0" "$@"', sys.executable]
    done = script(launcher=limited)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write to")
    assert "file too large; there is no earlier checkpoint; free some space and run the same command" in last
    assert "Traceback" not in done.stderr
    assert script().returncode == 0
    assert weights(script) == weights(finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint and part of another."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_later(make_script: MakeScript, finished: Script, small_disk: Path) -> None:
    script = make_script(small_disk)
    done = script("tracker=none")
    assert done.returncode == 2
    assert "no space left on device; the checkpoint of step 4 is kept" in done.stderr.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = script("tracker=none")
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert weights(script) == weights(finished)


@pytest.mark.parametrize("from_step", [None, 6])
def test_too_little_memory_makes_the_passes_smaller(
    make_script: MakeScript, finished: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_step: int | None
) -> None:
    """At once, or only after some steps; the steps are the same."""
    script = make_script(tmp_path)
    compute_loss = AlignmentTrainer.compute_loss

    def little_memory(self: Any, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        if len(inputs["input_ids"]) > 2 and (from_step is None or self.state.global_step >= from_step):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute_loss(self, model, inputs, *others, **named)

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", little_memory)
    assert main([*script.command()[1:], "optimisation.rows_per_pass=4"]) == 0
    assert script.metrics()["compute"]["rows_per_pass"] == 2
    assert script.metrics()["training"]["resumed"] == (from_step is not None)
    steps = {entry["step"]: entry["loss"] for entry in script.metrics()["loss_history"]}
    expected = {entry["step"]: entry["loss"] for entry in finished.metrics()["loss_history"]}
    assert steps == pytest.approx(expected, abs=1e-5)


def test_no_memory_at_all_takes_one_sentence(
    make_script: MakeScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = make_script(tmp_path)

    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", no_memory)
    assert main(script.command()[1:]) == 2
    assert "not even one row of data.max_length tokens fits into memory" in capsys.readouterr().err


def test_passes_divide_the_share_of_a_process() -> None:
    assert list(fewer_rows(8, 12)) == [6, 4, 3, 2, 1]
    assert list(fewer_rows(50, 4)) == [4, 2, 1]


def untie_and_break(model: Path, to: Path, token: str) -> None:
    """A copy whose embedding of one token is NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    (rare,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    lm.config.tie_word_embeddings = False
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    with torch.no_grad():
        lm.model.embed_tokens.weight[rare] = float("nan")
    lm.save_pretrained(to)
    tokenizer.save_pretrained(to)


def test_nan_stops_with_the_checkpoint_before(
    make_script: MakeScript, tmp_path: Path, tiny_model: Path, records_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token cannot be read; it comes up in one training record, after some steps."""
    untie_and_break(tiny_model, tmp_path / "broken", "~")
    with (tmp_path / "records.jsonl").open("w") as file:
        file.write(records_file.read_text())
        file.write(json.dumps({"prompt": "count to three", "completion": "one two ~"}) + "\n")
    script = make_script(tmp_path)
    options = [f"model={tmp_path / 'broken'}", f"data.records={tmp_path / 'records.jsonl'}", "save_every=1"]
    assert main([*script.command()[1:], *options]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"became infinite or NaN by step (\d+); the checkpoint of step (\d+) is kept\. Lower", said)
    assert found, said
    step, kept = map(int, found.groups())
    assert kept == step - 1
    for tensor in load_file(script.run / f"checkpoints/checkpoint-{kept}/adapter_model.safetensors").values():
        assert tensor.isfinite().all()
    assert not (script.run / "adapter").exists()


def test_the_best_weights_are_the_result(make_script: MakeScript, tmp_path: Path) -> None:
    """So large a learning rate that the text gets worse again."""
    script = make_script(tmp_path)
    options = ["optimisation.learning_rate=0.3", "optimisation.schedule=constant_with_warmup", "save_every=1"]
    assert main([*script.command()[1:], *options, "evaluation.every=1", "evaluation.patience=3"]) == 0
    metrics = script.metrics()
    scores = {entry["step"]: entry["eval_bits_per_byte"] for entry in metrics["choice_history"]}
    best = min(scores, key=scores.__getitem__)
    assert best < metrics["training"]["steps"] == best + 3 < metrics["compute"]["steps"]
    kept = load_file(script.run / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    for name, tensor in load_file(script.run / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, kept[name])


def test_rounds_since_best() -> None:
    assert rounds_since_best([3.0]) == 0
    assert rounds_since_best([3.0, 2.0, 2.0, 2.5]) == 2


def test_a_dry_run_says_what_it_would_take(
    make_script: MakeScript, tmp_path: Path, finished: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script = make_script(tmp_path)
    capsys.readouterr()
    assert main([*script.command()[1:], "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"steps {finished.metrics()['training']['steps']} of 4 pass(es) of 1 row(s)" in said
    assert "time about " in said
    assert "GiB" in said
    assert not script.run.exists()


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from terselm.train import callbacks

    monkeypatch.setattr(callbacks, "find_spec", lambda _: None)
    assert tracker_callbacks(Tracker.AUTO, tmp_path) == []
    with pytest.raises(ConfigError, match="tracker=trackio needs the package trackio; run: pip install 'trackio'"):
        tracker_callbacks(Tracker.TRACKIO, tmp_path)


def test_tensorboard_has_the_loss(finished: Script) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.run / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    for entry in finished.metrics()["loss_history"]:
        assert written[entry["step"]] == pytest.approx(entry["loss"], rel=1e-5)

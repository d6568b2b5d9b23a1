"""Launches over two processes on the CPU: each reaches the adapter of one process, and leaves it whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import ROOT, Script

from terselm.errors import CheckpointError, ConfigError
from terselm.train.hardware import join_processes
from terselm.train.model import gather_trained
from terselm.train.publish import publish
from terselm.train.verify import verify

MakeScript = Callable[[Path], Script]

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]

# Two processes share out a small model and gather it again.
GATHER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from terselm.train.model import gather_trained

dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method=f"file://{sys.argv[2]}")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))
model[0].weight.requires_grad_(False)
whole = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
assert model[1].weight.to_local().numel() < whole["1.weight"].numel()
found = gather_trained(model)
assert found.keys() == whole.keys()
assert all(torch.equal(found[name], whole[name]) for name in whole)
"""


# Two processes share out a utility head, load another one's weights into it, and gather it again.
SHARED_HEAD = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig
from terselm.train.model import add_head, gather_trained, head_of, load_head, save_head

dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method=f"file://{sys.argv[2]}")
stored = {"weight": torch.arange(10.0), "bias": torch.tensor([3.0])}
folder = Path(f"{sys.argv[2]}-{sys.argv[1]}")
folder.mkdir()
save_head(folder, stored, {})
lm = torch.nn.Module()
lm.config, lm.device = LlamaConfig(hidden_size=10, num_attention_heads=1), torch.device("cpu")
add_head(lm, seed=0)
fully_shard(lm, mesh=init_device_mesh("cpu", (2,)))
assert head_of(lm).weight.to_local().numel() < 10
load_head(lm, folder)
found = gather_trained(head_of(lm))
assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored), found
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed builds its CPU operators with g++")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_and_publishes(make_script: MakeScript, finished: Script, tmp_path: Path, stage: int) -> None:
    script = make_script(tmp_path)
    config = f"configs/accelerate/zero{stage}.yaml"
    done = subprocess.run(
        [*LAUNCH, "--config_file", config, *script.command()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert script.metrics()["compute"]["processes"] == 2
    ours, theirs = script.metrics()["loss_history"], finished.metrics()["loss_history"]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-4)
    weights = load_file(script.run / "adapter" / "adapter_model.safetensors")
    expected = load_file(finished.run / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0)
    verify(publish(script.run, tmp_path / "published").path)


@pytest.mark.slow
@pytest.mark.parametrize("code", [GATHER, SHARED_HEAD], ids=["model", "head"])
def test_weights_shared_out_by_fsdp_are_gathered(tmp_path: Path, code: str) -> None:
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]


def test_an_empty_weight_is_not_written() -> None:
    """As a parameter of ZeRO-3 is while nobody gathers it."""
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    with pytest.raises(CheckpointError, match="1 trained weights came back empty, such as weight"):
        gather_trained(model)


def test_fsdp_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="asks for FSDP on a CPU"):
        join_processes()

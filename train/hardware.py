"""What this process runs on, and the number format that suits it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from terselm.errors import ConfigError
from terselm.train.choices import Precision

if TYPE_CHECKING:
    from accelerate import PartialState

_PACKAGES = ("terselm", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
_FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # instructions that multiply bfloat16


def pick_precision(asked: Precision, device: torch.device) -> torch.dtype:
    """The number format of weights and matrix products.

    Raises:
        ConfigError: bfloat16 was asked for and the GPU has none.
    """
    if device.type == "cuda" and asked is Precision.BFLOAT16 and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set dtype=float32")
    match asked:
        case Precision.FLOAT32:
            return torch.float32
        case Precision.BFLOAT16:
            return torch.bfloat16
        case Precision.AUTO:
            return torch.bfloat16 if _multiplies_bf16_fast(device) else torch.float32


def share_out_cores() -> None:
    """Undo the one thread that ``accelerate launch`` allows a process that it does not know to be for the CPU."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes() -> PartialState:
    """This process's place among those of the launch.

    DeepSpeed on a CPU has to be told its backend before the Trainer asks for one: accelerate would leave it out.

    Raises:
        ConfigError: FSDP without GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and (cpu or not torch.accelerator.is_available()):
        raise ConfigError(
            "this launch asks for FSDP on a CPU, where accelerate would not share the model out and not say so; use "
            "GPUs, or configs/accelerate/zero3.yaml"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and (cpu or not torch.accelerator.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["ACCELERATE_USE_CPU"] = "false"  # with it accelerate takes DeepSpeed for DDP
        return PartialState(backend="gloo")
    return PartialState(cpu=cpu)


def _multiplies_bf16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return any(_cpu().get(name, False) for name in _FAST_BF16)


def _cpu() -> Mapping[str, Any]:
    query = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch that we support
    return query() if query is not None else {}


def describe_hardware() -> dict[str, Any]:
    """The processor, its cores and the GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Of Python and the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found

"""What this process runs on: its number format, its cores, its place among others, and how fast it can be made."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from terselm.errors import ConfigError
from terselm.train.settings import EngineSettings, Precision

if TYPE_CHECKING:
    from accelerate import PartialState

_FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # instructions that multiply bfloat16
_DENSE_BF16 = {  # FLOP/s without sparsity, from the vendors' data sheets; the first name that fits
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def pick_precision(asked: Precision, device: torch.device) -> torch.dtype:
    """The number format of weights and matrix products.

    Raises:
        ConfigError: bfloat16 was asked for and the GPU has none.
    """
    if device.type == "cuda" and asked is Precision.BFLOAT16 and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set dtype=float32")
    half = asked is Precision.BFLOAT16 or (asked is Precision.AUTO and _multiplies_bf16_fast(device))
    return torch.bfloat16 if half else torch.float32


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


def quieten_libraries() -> None:
    """No bars and no notices between our lines of what libraries do among themselves; their errors remain."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, says what it has found
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch\.distributed)\b"
    )


def apply_engine(lm: Any, settings: EngineSettings) -> None:
    """Compile the layers, recompute their activations, or neither.

    Each layer is compiled by itself: all share one compilation, where that of the whole model would take minutes.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    if settings.recompute:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not settings.compile:
        return
    from torch.utils._triton import has_triton

    for is_there, needed in (
        (lm.device.type == "cuda", f"a GPU of NVIDIA or AMD, but the device is {lm.device.type}"),
        (has_triton(), "Triton"),
        (any(shutil.which(name) for name in ("cc", "gcc", "clang")), "a C compiler"),
    ):
        if not is_there:
            raise ConfigError(f"engine.compile needs {needed}; set engine.compile=false")
    layers = getattr(lm.base_model, "layers", None)
    for layer in layers if isinstance(layers, torch.nn.ModuleList) else []:
        layer.compile()


def flops_per_token(lm: Any) -> int:
    """Of a forward and a backward pass: 6N, or 4N where no gradient is computed for the base weights (LoRA).

    N is the weights of the base that every token is multiplied with: an input embedding is looked up, unless it is the
    output head too. Attention's own products, the adapter's and what is recomputed are left out, as usual for the
    model FLOPs utilisation (MFU).

    Args:
        lm: a transformers causal LM, with an adapter put on it if one is trained.

    Source: Appendix B of arXiv:2204.02311.
    """
    total, trained = lm.num_parameters(), lm.num_parameters(only_trainable=True)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    looked_up = 0 if head is None or head.weight is embedding.weight else embedding.weight.numel()
    if trained < total:
        return int(4 * (total - trained - looked_up))
    return int(6 * (total - looked_up))


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU by its data sheet; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _DENSE_BF16.items() if part in name), None)


def _multiplies_bf16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return any(cpu_capabilities().get(name, False) for name in _FAST_BF16)


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of the processor."""
    query = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch that we support
    return query() if query is not None else {}

"""What makes training fast on a GPU, and the arithmetic that says how fast it is."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from terselm.errors import ConfigError
from terselm.train.config import EngineSettings

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


def decoder_layers(lm: Any) -> list[Any]:
    """The repeated layers of a transformers causal LM."""
    layers = getattr(lm.base_model, "layers", None)
    return list(layers) if isinstance(layers, torch.nn.ModuleList) else []


def tune(lm: Any, settings: EngineSettings) -> None:
    """Compile the layers, recompute their activations, or neither.

    Each layer is compiled by itself: all share one compilation, where that of the whole model would take minutes.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    if settings.recompute:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not settings.compile:
        return
    if (missing := _missing_to_compile(lm.device)) is not None:
        raise ConfigError(f"engine.compile needs {missing}; set engine.compile=false")
    for layer in decoder_layers(lm):
        layer.compile()


def _missing_to_compile(device: torch.device) -> str | None:
    from torch.utils._triton import has_triton

    if device.type != "cuda":
        return f"a GPU of NVIDIA or AMD, but the device is {device.type}"
    if not has_triton():
        return "Triton"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "a C compiler"
    return None


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

"""What makes training fast on a GPU, and the arithmetic that says how fast it is."""

from __future__ import annotations

import shutil
from typing import Any

import torch

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


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile would find what it needs: Triton and a C compiler."""
    if device.type != "cuda" or not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return False
    return torch.utils._triton.has_triton()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def compile_layers(lm: Any) -> None:
    """Compile each decoder layer by itself: they share one compilation, where the whole model would take minutes."""
    for layer in decoder_layers(lm):
        layer.compile()


def multiplied_parameters(lm: Any) -> int:
    """N: the weights that every token is multiplied with; an input embedding is looked up unless it is the head too."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    total = sum(parameter.numel() for parameter in lm.parameters())
    tied = head is not None and head.weight is embedding.weight
    return int(total if tied else total - embedding.weight.numel())


def flops_per_token(parameters: int, *, base_is_trained: bool) -> int:
    """Of a forward and a backward pass: 6N, or 4N where no gradient is computed for the base weights (LoRA).

    Attention's own products and recomputed activations are left out, as usual for the model FLOPs utilisation (MFU).

    Source: Appendix B of arXiv:2204.02311.
    """
    return (6 if base_is_trained else 4) * parameters


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU by its data sheet; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _DENSE_BF16.items() if part in name), None)

"""int8 for CPUs: torch's own dynamic quantisation of the linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from terselm.errors import ModelError


def quantise_linear_layers(model: Any) -> Any:
    """The float32 model with int8 weights (one scale a row) and int8 activations (one scale a matrix, found each pass).

    The embeddings, the norms, attention, and the output head, whose log-probabilities are the result, stay float32.

    Args:
        model: a transformers model on the CPU; it is changed.

    Raises:
        ModelError: this build of torch has no int8 kernels for this processor, or no longer the quantiser.
    """
    import torch

    if "onednn" not in torch.backends.quantized.supported_engines:
        raise ModelError("this build of torch has no int8 kernels for this processor; choose dtype float32 or bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao, which needs a C++ compiler to be fast
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
        except ImportError:
            raise ModelError(
                f"torch {torch.__version__} no longer has dynamic quantisation; choose dtype float32 or bfloat16"
            ) from None
        layers = {
            name: per_channel_dynamic_qconfig
            for name, module in model.base_model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        with _engine("onednn"):
            quantize_dynamic(model.base_model, layers, inplace=True)  # type: ignore[no-untyped-call]
    return model


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """The engine that packs the weights also multiplies them later on; it is a setting of the whole process."""
    import torch

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before

"""int8 for CPUs: torch's own dynamic quantisation, of the linear layers that bear it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from terselm.errors import ModelError

_MOST_ERROR = 0.2
_PROBE = (
    "Question: A café sells 85 cups of coffee at 2.80 euros and 40 pieces of cake at 3.35 euros on Saturday, and 20 "
    "cups more on Sunday. What does it take?\nLet's think step by step. On Saturday it takes 85 * 2.80 = 238 euros "
    "for coffee.\n\ndef mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n"
    "The committee met on 4 May 2021 in Lisbon; Ms Duarte asked that the minutes (see https://example.org) be sent."
)


def quantise_linear_layers(model: Any, tokenizer: Any) -> Any:
    """The float32 model with int8 weights (one scale a row) and int8 activations (one scale a matrix, found each pass).

    A layer stays float32 where a few activations are so large that int8 would leave too little of the others: where,
    on a short text, rounding moves the median token's activations by more than 20%. So do the embeddings, the norms
    and attention.

    Args:
        model: a transformers model on the CPU; it is changed.
        tokenizer: its own, to read the text with.

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
        errors = _rounding_errors(model, tokenizer)
        layers = {name: per_channel_dynamic_qconfig for name, error in errors.items() if error <= _MOST_ERROR}
        with _engine("onednn"):
            quantize_dynamic(model, layers, inplace=True)  # type: ignore[no-untyped-call]
    return model


def _rounding_errors(model: Any, tokenizer: Any) -> dict[str, float]:
    """By linear layer: |x − int8(x)| / |x| of its input, the median over the tokens of a text."""
    import torch

    errors: dict[str, float] = {}

    def watch(name: str) -> Any:
        def measure(_: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            scale = ((x.max() - x.min()) / 255).clamp(min=1e-12)
            moved = (torch.round(x / scale) * scale - x).norm(dim=-1)
            errors[name] = float((moved / x.norm(dim=-1).clamp(min=1e-12)).median())

        return measure

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=tokenizer(_PROBE, return_tensors="pt")["input_ids"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


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

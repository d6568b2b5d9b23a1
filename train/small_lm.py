"""The model that is trained: loaded as the method needs it, made trainable, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.errors import ConfigError, ModelError
from terselm.models import CausalLM, load_causal_lm, load_tokenizer, resolve
from terselm.train.choices import Method
from terselm.train.config import AlignConfig
from terselm.train.lora import add_adapter, save_adapter


def load_small_lm(config: AlignConfig, device: torch.device, precision: torch.dtype) -> CausalLM:
    """The base.

    Args:
        config: names it.
        device: to put it on.
        precision: of the frozen weights and the products; weights that are trained are float32 all the same.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: 4 bits where bitsandbytes or a GPU is missing.
    """
    match config.method:
        case Method.QLORA:
            return _load_in_4_bits(config.model, device, precision)
        case Method.FULL:
            precision = torch.float32
    return load_causal_lm(config.model, device=str(device), dtype=str(precision).removeprefix("torch."))


def make_trainable(lm: Any, config: AlignConfig) -> Any:
    """The model with what the method trains, and nothing else, asking for gradients."""
    return lm.requires_grad_(True) if config.method is Method.FULL else add_adapter(lm, config.lora)


def save_trained(model: Any, folder: Path, *, config: AlignConfig, tokenizer: Any, weights: dict[str, Tensor]) -> None:
    """Write the adapter, or the whole model with its tokenizer.

    Args:
        model: as `make_trainable` gave it.
        folder: to write into.
        config: of the run.
        tokenizer: of the model.
        weights: as `gather_trained` gives them.
    """
    if config.method is not Method.FULL:
        save_adapter(model, folder, base=config.model, weights=weights)
        return
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    model.save_pretrained(folder, state_dict={**weights, **buffers})
    tokenizer.save_pretrained(folder)


def _load_in_4_bits(name: str, device: torch.device, precision: torch.dtype) -> CausalLM:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ConfigError("method=qlora needs bitsandbytes; run: pip install 'terselm[qlora]', or set method=lora")
    if device.type == "cpu":
        raise ConfigError("method=qlora needs a GPU, and there is none; set method=lora")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            quantization_config=quantisation,
            device_map={"": device},
            dtype=precision,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"cannot load {name!r} in 4 bits: {reason}") from None
    return CausalLM(model=model.eval(), tokenizer=load_tokenizer(name), name=name)

"""The adapter: put on a model, saved so that it can be carried elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.train.config import LoraSettings


def add_adapter(lm: Any, settings: LoraSettings) -> Any:
    """A PEFT model with float32 adapters on every linear layer but the output head; the base is frozen."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm, lora)  # float32 whatever the base is
    if lm.dtype != torch.float32:
        _leave_casts_to_autocast(model)
    return model


def save_adapter(model: Any, folder: Path, base: str, weights: dict[str, Tensor]) -> None:
    """Write the adapter; it names its base as the user did, so that it works on another machine.

    Args:
        model: a PEFT model.
        folder: to write into.
        base: the model that was aligned, as the user named it.
        weights: as `gather_trained` gives them.
    """
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base
    # "auto" would ask the hub about the base model's vocabulary, which an adapter cannot change.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form


def _leave_casts_to_autocast(model: Any) -> None:
    """Without this PEFT casts each layer's input to float32, only for autocast to cast it back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False

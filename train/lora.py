"""The adapter: put on a model, saved so that it can be carried elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.errors import ConfigError
from terselm.train.choices import Initialisation
from terselm.train.config import LoraSettings

_FIRST = "terselm_first_values"  # attribute of a model whose base has lost them


def add_adapter(lm: Any, settings: LoraSettings) -> Any:
    """A PEFT model with float32 adapters on every linear layer but the output head; the base is frozen.

    Raises:
        ConfigError: the rank is too high for the initialisation.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rank_stabilised,
        use_dora=settings.weight_decomposed,
        init_lora_weights=True if settings.initialisation is Initialisation.ZERO else settings.initialisation.value,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(lm, lora)  # float32 whatever the base is
    except (RuntimeError, ValueError) as error:
        if settings.initialisation is Initialisation.ZERO:
            raise
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"lora.initialisation={settings.initialisation} does not go here: {reason}") from None
    if settings.changes_base:
        first = {name: w.detach().to("cpu", copy=True) for name, w in model.named_parameters() if w.requires_grad}
        if (most := min(map(min, (w.shape for w in first.values())))) < settings.rank:
            raise ConfigError(
                f"lora.rank is {settings.rank}; lora.initialisation={settings.initialisation} gives the weights of "
                f"{type(lm).__name__} a rank of at most {most}"
            )
        setattr(model, _FIRST, first)
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
    if (first := getattr(model, _FIRST, None)) is not None:
        weights = _difference(weights, first)
        _double_rank(settings)
    # "auto" would ask the hub about the base model's vocabulary, which an adapter cannot change.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form


def _difference(weights: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """B·A − B₀·A₀ as one adapter of twice the rank, [B, −B₀]·[A; A₀]: what it adds to the base as it was."""
    found = {}
    for name, weight in weights.items():
        is_a = "lora_A" in name
        parts = [weight, first[name] if is_a else -first[name]]
        found[name] = torch.cat(parts, dim=0 if is_a else 1)
    return found


def _double_rank(settings: Any) -> None:
    """With the same factor before B·A, for an adapter that is put on the base as it was."""
    settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2
    settings.r *= 2
    settings.init_lora_weights = True


def _leave_casts_to_autocast(model: Any) -> None:
    """Without this PEFT casts each layer's input to float32, only for autocast to cast it back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False

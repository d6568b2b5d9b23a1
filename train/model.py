"""The model that is trained: loaded as the method needs it, made trainable, gathered from all processes, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.errors import CheckpointError, ConfigError, ModelError
from terselm.extras import first_line
from terselm.models import CausalLM, load_causal_lm, load_tokenizer, resolve
from terselm.models.utility_head import UtilityHead
from terselm.train.settings import AlignSettings, Initialisation, LoraSettings, TrainingMethod
from terselm.train.surprisals import UTILITY_HEAD

_FIRST_SCORES = 0.1  # standard deviation of a head's first scores, were the states' variances 1
_FIRST = "terselm_first_values"  # attribute of a model whose base has lost them


def load_small_lm(settings: AlignSettings, device: torch.device, precision: torch.dtype) -> CausalLM:
    """The base.

    Args:
        settings: name it.
        device: to put it on.
        precision: of the frozen weights and the products; weights that are trained are float32 all the same.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: 4 bits where bitsandbytes or a GPU is missing.
    """
    if settings.method is TrainingMethod.QLORA:
        return _load_in_4_bits(settings.model, device, precision)
    stored = torch.float32 if settings.method is TrainingMethod.FULL else precision
    return load_causal_lm(settings.model, device=str(device), dtype=str(stored).removeprefix("torch."))


def make_trainable(lm: Any, settings: AlignSettings) -> Any:
    """The model with what the method trains, and nothing else, asking for gradients."""
    model = lm.requires_grad_(True) if settings.method is TrainingMethod.FULL else add_adapter(lm, settings.lora)
    if settings.objective.utility:
        add_head(lm, settings.seed)
    return model


def add_head(lm: Any, seed: int) -> UtilityHead:
    """Give a causal LM a head that scores units, in float32, as part of the model, so that all wrappers see it."""
    head = UtilityHead(lm.config.get_text_config().hidden_size, seed=seed).to(lm.device)
    with torch.no_grad():
        head.weight.mul_(_FIRST_SCORES)
    head.bias = torch.nn.Parameter(head.bias.detach().reshape(1))  # FSDP cannot share out a number
    setattr(lm, UTILITY_HEAD, head)
    return head


def head_of(model: Any) -> UtilityHead | None:
    """The head of a model, whatever is wrapped around it, if it has one."""
    return next((module for module in model.modules() if isinstance(module, UtilityHead)), None)


def save_head(folder: Path, weights: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a head as `UtilityHead.save` does.

    Args:
        folder: of an adapter, a model or a checkpoint.
        weights: as `take_head` gives them.
        facts: what it belongs to.
    """
    head = UtilityHead(len(weights["weight"]))
    head.load_state_dict({"weight": weights["weight"], "bias": weights["bias"].reshape(())})
    head.save(folder, facts)


@torch.no_grad()
def load_head(model: Any, folder: Path) -> None:
    """Take a head's weights over from a checkpoint, into whatever part of them this process holds."""
    head = head_of(model)
    if head is None:
        return
    stored = UtilityHead.load(folder, head.weight.numel())
    for name, weight in head.named_parameters():
        value = getattr(stored, name).to(weight.device).reshape(weight.shape)
        if hasattr(weight, "device_mesh"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(weight, DTensor)
            value = distribute_tensor(value, weight.device_mesh, weight.placements)
        weight.copy_(value)


def take_head(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained weights without those of the head, and those."""
    own = {name: weight for name, weight in weights.items() if f"{UTILITY_HEAD}." in name}
    rest = {name: weight for name, weight in weights.items() if name not in own}
    return rest, {name.rpartition(".")[2]: weight for name, weight in own.items()}


def save_trained(
    model: Any,
    folder: Path,
    *,
    settings: AlignSettings,
    tokenizer: Any,
    weights: dict[str, Tensor],
    facts: dict[str, str] | None = None,
) -> None:
    """Write the adapter, or the whole model with its tokenizer; and the utility head, if there is one.

    Args:
        model: as `make_trainable` gave it.
        folder: to write into.
        settings: of the run.
        tokenizer: of the model.
        weights: as `gather_trained` gives them.
        facts: what a utility head belongs to.
    """
    weights, head = take_head(weights)
    if head:
        save_head(folder, head, facts or {})
    if settings.method is not TrainingMethod.FULL:
        save_adapter(model, folder, base=settings.model, weights=weights)
        return
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    model.save_pretrained(folder, state_dict={**weights, **buffers})
    tokenizer.save_pretrained(folder)


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
        raise ConfigError(
            f"lora.initialisation={settings.initialisation} does not work with {type(lm).__name__}: {first_line(error)}"
        ) from None
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
        # B·A − B₀·A₀ as one adapter of twice the rank, [B, −B₀]·[A; A₀]: what it adds to the base as it was.
        weights = {
            name: torch.cat([weight, first[name]]) if "lora_A" in name else torch.cat([weight, -first[name]], dim=1)
            for name, weight in weights.items()
        }
        settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2  # the same factor before B·A
        settings.r *= 2
        settings.init_lora_weights = True
    # "auto" would ask the hub about the base model's vocabulary, which an adapter cannot change.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form


@torch.no_grad()
def gather_trained(model: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The trained weights, whole, on the CPU; every process has to call it.

    One weight at a time, so that no process needs memory for more: DDP holds them whole, FSDP2 as DTensors, ZeRO-3 as
    empty tensors that DeepSpeed fills for a moment.

    Args:
        model: with what was trained.
        keep: whether this process is to have them; the others get nothing, for which they need no memory.

    Raises:
        CheckpointError: a weight stayed empty.
    """
    trained = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        with _whole(weight) as whole:
            if keep:
                trained[name] = whole.detach().to("cpu", copy=True)
    if empty := [name for name, weight in trained.items() if not weight.numel()]:
        raise CheckpointError(f"{len(empty)} trained weights came back empty, such as {empty[0]}; nothing was written")
    return trained


def _load_in_4_bits(name: str, device: torch.device, precision: torch.dtype) -> CausalLM:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ConfigError("method=qlora needs bitsandbytes; run: pip install 'terselm[qlora]', or set method=lora")
    if device.type == "cpu":
        raise ConfigError("method=qlora needs a GPU, and there is none; set method=lora")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=precision
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
        raise ModelError(f"cannot load {name!r} in 4 bits: {first_line(error)}") from None
    return CausalLM(model=model.eval(), tokenizer=load_tokenizer(name), name=name)


def _leave_casts_to_autocast(model: Any) -> None:
    """Without this PEFT casts each layer's input to float32, only for autocast to cast it back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


@contextmanager
def _whole(weight: Any) -> Iterator[Tensor]:
    """The weight with all its parts."""
    if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight.full_tensor() if hasattr(weight, "full_tensor") else weight

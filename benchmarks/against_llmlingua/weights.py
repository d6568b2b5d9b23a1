"""Models of a given shape with random weights: speed depends on the shape alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from terselm.errors import ConfigError

_COMMON = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}


def random_model(shape: str, tokenizer: Path, target: Path, device: str, dtype: str) -> Path:
    """Write a Llama of one of `SHAPES`, with the tokenizer and vocabulary of a model folder, into ``target``.

    Raises:
        ConfigError: an unknown shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    base = AutoConfig.from_pretrained(tokenizer)
    special = {name: getattr(base, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**_COMMON, **SHAPES[shape], **special), dtype=getattr(torch, dtype)
        )
    model.save_pretrained(target)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, target)
    return target

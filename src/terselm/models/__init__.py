"""Load a causal LM by alias, folder, run folder, adapter folder or hub id."""

from terselm.models.aliases import ALIASES, Alias, cache_folder, convert_alias
from terselm.models.load import CausalLM, load_causal_lm, load_tokenizer, resolve

__all__ = [
    "ALIASES",
    "Alias",
    "CausalLM",
    "cache_folder",
    "convert_alias",
    "load_causal_lm",
    "load_tokenizer",
    "resolve",
]

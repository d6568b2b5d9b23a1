"""Where instructions come from, and what is taken out of them before anyone is asked."""

from terselm.data.sources.load import Loaded, load_instructions, load_texts

__all__ = ["Loaded", "load_instructions", "load_texts"]

"""Counting tokens as the caller does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from terselm.errors import ConfigError, ModelError

Count = Callable[[str], int]


def resolve_counter(counter: Count | str | None) -> Count | None:
    """A counter by name: a tiktoken encoding or OpenAI model, else whatever `load_tokenizer` takes.

    Args:
        counter: such as ``cl100k_base``, ``gpt-4o``, ``gemma3-270m``, a folder or a hub id; a callable, and None (the
            small LM's own), are given back.

    Raises:
        ModelError: no such tokenizer, or tiktoken could not get its vocabulary.
        ConfigError: neither a name nor a callable.
    """
    if counter is None or (callable(counter) and not isinstance(counter, str)):
        return counter
    if not isinstance(counter, str):
        raise ConfigError(f"counter is a {type(counter).__name__}; expected a tokenizer's name or a callable")
    if (encoding := _tiktoken_encoding(counter)) is not None:
        return lambda text: len(encoding.encode_ordinary(text))
    from terselm.models import load_tokenizer

    return TokenizerCounter(load_tokenizer(counter))


class TokenizerCounter:
    """Tokens of a text under a fast Hugging Face tokenizer; text that looks like a special token is ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = plain_backend(tokenizer)

    def __call__(self, text: str) -> int:
        return len(self.backend.encode(text, add_special_tokens=False))

    def many(self, texts: Sequence[str]) -> list[int]:
        """The counts of several texts, in parallel."""
        return [len(encoding) for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def plain_backend(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer's core that neither truncates, nor pads, nor sees special tokens in text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def count_all(count: Count, texts: Sequence[str]) -> list[int]:
    """The counts of several texts, in parallel where the counter can."""
    return count.many(texts) if isinstance(count, TokenizerCounter) else [count(text) for text in texts]


def _tiktoken_encoding(name: str) -> Any:
    """tiktoken's encoding of that name or for that model; None where it knows neither."""
    try:
        import tiktoken
    except ImportError:
        if name.startswith(("cl100k", "o200k", "p50k", "r50k", "gpt-", "o1", "o3", "o4")):
            raise ModelError(f"counting as {name!r} does needs tiktoken; run: pip install tiktoken") from None
        return None
    try:
        encoding = name if name in tiktoken.list_encoding_names() else tiktoken.encoding_name_for_model(name)
    except KeyError:
        return None
    try:
        return tiktoken.get_encoding(encoding)
    except Exception as error:  # whatever its download meets: requests' errors, OSError, a wrong checksum
        raise ModelError(
            f"tiktoken could not get its vocabulary {encoding!r} ({type(error).__name__}); it downloads it once, or "
            "takes it from the folder in TIKTOKEN_CACHE_DIR"
        ) from None

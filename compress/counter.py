"""Counting tokens as the caller does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Count = Callable[[str], int]


def tokenizer_counter(tokenizer: Any) -> Count:
    """Tokens of a text under a Hugging Face tokenizer; text that looks like a special token is ordinary text."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    return count

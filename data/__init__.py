"""Records of what a target LLM was asked and answered: their form, their files, and how they are collected."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from terselm.data.records import Message, Record, Role, read_records, split_by_instruction, write_records

__all__ = ["Message", "Record", "Role", "read_records", "split_by_instruction", "write_records"]


def __getattr__(name: str) -> Any:
    """Import the names above on first use: most commands need few of them."""
    if name in __all__:
        return getattr(import_module("terselm.data.records"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

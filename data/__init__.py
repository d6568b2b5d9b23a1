"""Records of what a target LLM was asked and answered: their form, their files, and how they are collected."""

from terselm.data.records import Message, Record, Role, read_records, split_by_instruction, write_records

__all__ = ["Message", "Record", "Role", "read_records", "split_by_instruction", "write_records"]

"""Compress prompts: budget controller, iterative token-level compression, hard budget."""

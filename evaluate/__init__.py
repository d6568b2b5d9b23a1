"""Evaluation: what a target LLM makes of compressed prompts, with intervals (docs/evaluation.md)."""

"""Asking a target LLM, over the network or in process, and keeping everything that it answers."""

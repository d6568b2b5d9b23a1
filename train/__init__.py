"""Align a small LM to a target LLM's own output, and publish the result."""

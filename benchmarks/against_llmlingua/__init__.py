"""The parts of compress_vs_llmlingua.py."""

"""Surprisals under the small LM: what of the compressor knows tensors."""

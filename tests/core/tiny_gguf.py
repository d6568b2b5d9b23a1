"""A tiny GGUF file with random weights and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from fakes import bytes_tokenizer

_HIDDEN, _HEADS, _INNER, _WINDOW = 16, 2, 32, 512


def write_gguf(path: Path) -> Path:
    """Write a Qwen2 of one layer; its projections have no biases, and input and output share their embeddings."""
    model = json.loads(bytes_tokenizer(bos=False, trim=False).backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(_WINDOW)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    square = (_HIDDEN, _HIDDEN)
    shapes = {f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}.weight": (_INNER, _HIDDEN) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down.weight": (_HIDDEN, _INNER), "token_embd.weight": (len(tokens), _HIDDEN)}
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.4, shape).astype(np.float32))
    for name in ("blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias"):
        writer.add_tensor(name, np.zeros(_HIDDEN, dtype=np.float32))
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(_HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

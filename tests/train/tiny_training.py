"""A tiny Llama with a real tokenizer, examples of random tokens, and the command line of a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from terselm.train.examples import Example
from terselm.train.packing import MODEL_INPUTS

IGNORED = -100
ROOT = Path(__file__).parents[2]
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "count",
    "sort",
    "name",
    "list",
    "add",
    "the",
    "of",
    "and",
    "is",
]

# Everything a run of a few seconds needs; the file's settings go before these.
TINY_RUN = """
data: {{records: {records}, max_length: 64}}
model: {model}
run_dir: {run}
lora: {{rank: 4, alpha: 8}}
optimisation: {{epochs: 4, rows_per_step: 4, rows_per_pass: 1, learning_rate: 5e-3}}
evaluation: {{held_out: 0.2}}
dtype: float32
log_every: 2
save_every: 4
"""


def make_tokenizer() -> Any:
    """Byte-level BPE with <s> and </s>, and merges learnt from the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def example(length: int, record: int = 0, seed: int = 0) -> Example:
    draw = np.random.default_rng((seed, record))
    counted = draw.random(length) < 0.5
    counted[0], counted[-1] = False, True
    return Example(draw.integers(2, 300, length), counted, record)


def surprisals(lm: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = lm(**{name: batch[name] for name in MODEL_INPUTS})
    return result


def labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``(B, T)``: the token after each place if it is asked for, else `IGNORED`, as transformers takes them."""
    result = torch.full_like(batch["input_ids"], IGNORED)
    result.view(-1)[batch["at"]] = batch["wanted"]
    return result


@dataclass(frozen=True)
class Script:
    """The command line of align.py for a tiny run."""

    config: Path
    run: Path

    def command(self, *overrides: str) -> list[str]:
        return [str(ROOT / "train" / "align.py"), "--config", str(self.config), *overrides]

    def __call__(
        self, *overrides: str, launcher: Sequence[str] = (sys.executable,), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *self.command(*overrides)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            timeout=300,
            check=False,
        )

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *self.command(*overrides)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def metrics(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.run / "metrics.json").read_text(encoding="utf-8"))
        return value

"""Load a published folder in a process of its own and compare its logits with those that it should give.

A fresh process, because one that has merged the weights still holds them: only from the outside is it certain that the
folder is complete.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.errors import CheckpointError

_TEXT = (
    "The capital of France is Paris. 巴黎是法国的首都。 def f(x): return x**2 🙂 <|im_end|> <s> 12.5% of 80 is 10.\n"
    "- one\n- two\n"
)
_LENGTH = 64


def probe(tokenizer: Any, vocab_size: int) -> Tensor:
    """``(2, 64)`` int64: text of many kinds, and noise, which reaches the rarely used rows of the embedding."""
    text = (_text_ids(tokenizer) * _LENGTH)[:_LENGTH]
    noise = torch.randint(0, vocab_size, (_LENGTH,), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.tensor(text), noise])


def compare_in_fresh_process(folder: Path, reference: Path) -> float:
    """Root mean square difference of the folder's logits from the reference, as a share of the reference's spread.

    Args:
        folder: a published folder.
        reference: safetensors file with ``ids`` and ``logits``.

    Raises:
        CheckpointError: the folder cannot be loaded by itself, or tokenises otherwise.
    """
    command = [sys.executable, "-m", "terselm.train.reload", str(folder), str(reference)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").split("\n")[-1]
        raise CheckpointError(f"the published folder cannot be loaded in a fresh process: {reason}")
    return float(json.loads(done.stdout)["difference"])


def main(folder: Path, reference: Path) -> None:
    """Print the difference as JSON."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = load_file(reference)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not torch.equal(probe(tokenizer, model.config.vocab_size), expected["ids"]):
        raise SystemExit("the saved tokenizer gives other tokens")
    with torch.inference_mode():
        logits = model(input_ids=expected["ids"]).logits
    spread = expected["logits"] - expected["logits"].mean(-1, keepdim=True)
    difference = (logits - expected["logits"]).norm() / spread.norm()
    print(json.dumps({"difference": difference.item()}))


def _text_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(_TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

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
_COLUMNS = 256  # of the logits that are kept


def probe(tokenizer: Any, vocab_size: int) -> Tensor:
    """``(2, 64)`` int64: text of many kinds, and noise, which reaches the rarely used rows of the embedding."""
    text = (_text_ids(tokenizer) * _LENGTH)[:_LENGTH]
    noise = torch.randint(0, vocab_size, (_LENGTH,), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.tensor(text), noise])


def write_references(ids: Tensor, logits: Tensor, *, whole: Path, kept: Path) -> None:
    """The logits that a folder has to give: all of them, and few enough to be kept with it.

    Args:
        ids: ``(2, 64)``, as `probe` gives them.
        logits: ``(2, 64, V)``.
        whole: file for all of them.
        kept: file for some columns of them.
    """
    from safetensors.torch import save_file

    columns = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(0))[:_COLUMNS].sort().values
    save_file({"ids": ids, "logits": logits.contiguous()}, whole)
    save_file({"ids": ids, "logits": logits[..., columns].contiguous(), "columns": columns}, kept)


def compare_in_fresh_process(folder: Path, reference: Path) -> float:
    """Root mean square difference of the folder's logits from the reference, as a share of the reference's spread.

    Args:
        folder: a published folder, or one that is about to be.
        reference: as `write_references` writes it.

    Raises:
        CheckpointError: the folder cannot be loaded by itself, or tokenises otherwise.
    """
    if not reference.is_file():
        raise CheckpointError(f"{reference} is missing: there is nothing to compare with")
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

    expected = load_file(reference)
    model, tokenizer = _load(folder)
    if not torch.equal(probe(tokenizer, model.config.vocab_size), expected["ids"]):
        raise SystemExit("the saved tokenizer gives other tokens")
    with torch.inference_mode():
        logits = model(input_ids=expected["ids"]).logits
    if "columns" in expected:
        logits = logits[..., expected["columns"]]
    spread = expected["logits"] - expected["logits"].mean(-1, keepdim=True)
    difference = (logits - expected["logits"]).norm() / spread.norm()
    print(json.dumps({"difference": difference.item()}))


def _load(folder: Path) -> tuple[Any, Any]:
    """As anybody would with transformers alone; an adapter goes into its base, which is loaded by name."""
    if (folder / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    from terselm.models import load_causal_lm

    lm = load_causal_lm(folder, device="cpu", dtype="float32")
    return lm.model, lm.tokenizer


def _text_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(_TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

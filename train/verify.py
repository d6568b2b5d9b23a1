"""Whether a published folder is as it was published, and still gives the logits and scores that it gave then.

It is loaded in a fresh process, because one that has merged the weights still holds them: only from the outside is it
certain that the folder is complete. That process runs this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terselm.errors import CheckpointError
from terselm.models.reading import last_states
from terselm.models.utility_head import UtilityHead
from terselm.train.provenance import folder_sha256, read_json

PROVENANCE = "provenance.json"
KEPT_REFERENCE = "probe.safetensors"
"""Some of the logits of the base with its adapter, by which a folder can be verified anywhere."""

# What rounding may do to the logits, as a share of their own spread; measured: 4e-6 and 1.3e-2 for SmolLM2-135M.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Of a utility head's scores: one direction of the states may vary little. Those of another model are off by 1 or more.
UTILITY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}

_TEXT = (
    "The capital of France is Paris. 巴黎是法国的首都。 def f(x): return x**2 🙂 <|im_end|> <s> 12.5% of 80 is 10.\n"
    "- one\n- two\n"
)
_LENGTH = 64
_COLUMNS = 256  # of the logits that are kept


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Root mean square differences of a folder from a reference, as shares of the reference's spread.

    Attributes:
        logits: of its logits.
        utility: of its utility head's scores; None where the reference has none.
    """

    logits: float
    utility: float | None = None


def verify(folder: Path) -> float:
    """Recompute the checksums of a published folder, and load it in a fresh process.

    Returns:
        the difference of its logits from those at its publication, as a share of their spread.

    Raises:
        CheckpointError: a file is missing, changed, or was not there when it was published; it cannot be loaded; or it
            gives other logits, or other scores of units.
    """
    provenance = read_json(folder / PROVENANCE)
    try:
        recorded, dtype = provenance["sha256"], getattr(torch, provenance["weights"]["stored_in"])
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / PROVENANCE} is damaged: it does not say what was published") from None
    files = folder_sha256(folder, leave_out=PROVENANCE)
    hubs_own = {name for name in files if name == ".gitattributes" or name.startswith(".cache/")}
    ours = {name: digest for name, digest in files.items() if name not in hubs_own}
    if wrong := sorted(name for name in recorded.keys() | ours.keys() if recorded.get(name) != ours.get(name)):
        raise CheckpointError(f"{folder} is not as it was published; these files differ: {', '.join(wrong)}")
    return check_logits(folder, folder / KEPT_REFERENCE, dtype).logits


def check_logits(folder: Path, reference: Path, dtype: torch.dtype) -> Differences:
    """The differences of the folder, loaded anew, from the reference: of its logits, and of its head's scores.

    Raises:
        CheckpointError: they are more than rounding in ``dtype`` can do.
    """
    found = compare_in_fresh_process(folder, reference)
    if not found.logits <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"the weights in {folder}, loaded anew, change the logits by {found.logits:.2g} of their spread (at most "
            f"{TOLERANCE[dtype]:.0e} is rounding); do not use them"
        )
    if found.utility is not None and not found.utility <= UTILITY_TOLERANCE[dtype]:
        raise CheckpointError(
            f"the utility head in {folder}, loaded anew, changes its scores by {found.utility:.2g} of their spread (at "
            f"most {UTILITY_TOLERANCE[dtype]:.0e} is rounding); do not use it"
        )
    return found


def probe(tokenizer: Any, vocab_size: int) -> Tensor:
    """``(2, 64)`` int64: text of many kinds, and noise, which reaches the rarely used rows of the embedding."""
    ids = list(tokenizer(_TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    text = (ids * _LENGTH)[:_LENGTH]
    noise = torch.randint(0, vocab_size, (_LENGTH,), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.tensor(text), noise])


def write_references(ids: Tensor, logits: Tensor, utility: Tensor | None = None, *, whole: Path, kept: Path) -> None:
    """The logits that a folder has to give: all of them, and few enough to be kept with it; and its head's scores.

    Args:
        ids: ``(2, 64)``, as `probe` gives them.
        logits: ``(2, 64, V)``.
        utility: ``(2, 64)``, the utility head's score of each place, if there is a head.
        whole: file for all of them.
        kept: file for some columns of them.
    """
    from safetensors.torch import save_file

    columns = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(0))[:_COLUMNS].sort().values
    both = {"ids": ids} if utility is None else {"ids": ids, "utility": utility.contiguous()}
    save_file({**both, "logits": logits.contiguous()}, whole)
    save_file({**both, "logits": logits[..., columns].contiguous(), "columns": columns}, kept)


def compare_in_fresh_process(folder: Path, reference: Path) -> Differences:
    """How far the folder is from the reference.

    Args:
        folder: a published folder, or one that is about to be.
        reference: as `write_references` writes it.

    Raises:
        CheckpointError: the folder cannot be loaded by itself, or tokenises otherwise.
    """
    if not reference.is_file():
        raise CheckpointError(f"{reference} is missing: there is nothing to compare with")
    command = [sys.executable, "-m", "terselm.train.verify", str(folder), str(reference)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").split("\n")[-1]
        raise CheckpointError(f"the published folder cannot be loaded in a fresh process: {reason}")
    return Differences(**json.loads(done.stdout))


def print_differences(folder: Path, reference: Path) -> None:
    """Print the `Differences` as JSON."""
    from safetensors.torch import load_file

    expected = load_file(reference)
    model, tokenizer = _load(folder)
    if not torch.equal(probe(tokenizer, model.config.vocab_size), expected["ids"]):
        raise SystemExit("the saved tokenizer gives other tokens")
    with torch.inference_mode():
        logits = model(input_ids=expected["ids"]).logits
    if "columns" in expected:
        logits = logits[..., expected["columns"]]
    found = {"logits": _difference(logits, expected["logits"], expected["logits"].mean(-1, keepdim=True))}
    if "utility" in expected:
        head = UtilityHead.load(folder, int(model.config.get_text_config().hidden_size))
        scores = utility_scores(model, head, expected["ids"])
        found["utility"] = _difference(scores, expected["utility"], expected["utility"].mean())
    print(json.dumps(found))


@torch.inference_mode()
def utility_scores(model: Any, head: UtilityHead, ids: Tensor) -> Tensor:
    """``(2, 64)``, the head's score of each place.

    Args:
        model: of transformers, or an adapter on one, not merged.
        head: on the same device.
        ids: ``(2, 64)``.
    """
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores: Tensor = head(last_states(body, ids))
    return scores


def _difference(found: Tensor, expected: Tensor, centre: Tensor) -> float:
    """As a share of the spread about the centre."""
    return float((found - expected).norm() / (expected - centre).norm())


def _load(folder: Path) -> tuple[Any, Any]:
    """As anybody would with transformers alone; an adapter goes into its base, which is loaded by name."""
    if (folder / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    from terselm.models import load_causal_lm

    lm = load_causal_lm(folder, device="cpu", dtype="float32")
    return lm.model, lm.tokenizer


if __name__ == "__main__":
    print_differences(Path(sys.argv[1]), Path(sys.argv[2]))

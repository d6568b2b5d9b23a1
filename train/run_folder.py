"""The folder of a run: what is in it, what may go on, and what must not be touched.

``config.yaml`` is there from the start, ``checkpoints/`` while training, ``metrics.json`` and ``adapter/`` at the end.
``adapter/`` comes last and whole: where it is, the run is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.errors import CheckpointError, ConfigError
from terselm.files import atomic_file, atomic_folder, remove_partials

_WHOLE = "whole.json"  # written into a checkpoint once every process has finished its part


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the key that says which run it is.

    Attributes:
        path: the folder.
        key: hash of the resolved config and the data.
    """

    path: Path
    key: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    def is_finished(self) -> bool:
        """Whether this very run has been finished.

        Raises:
            ConfigError: the folder holds another run, finished or not.
            CheckpointError: it is a file, or its metrics are damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; set run_dir to a folder")
        if self.adapter.exists():
            self._refuse_other(_read_key(self.metrics), "a finished run")
            return True
        for checkpoint in self._whole_checkpoints():
            self._refuse_other(_read_key(checkpoint / _WHOLE), "an unfinished run")
        return False

    def begin(self, config_yaml: str) -> Path | None:
        """Write the config, clear away what a killed run left half-made; the last whole checkpoint, if any."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for final in (self.adapter, self.metrics, self.path / "config.yaml"):
            remove_partials(final)
        with atomic_file(self.path / "config.yaml") as file:
            file.write(config_yaml)
        whole = self._whole_checkpoints()
        for folder in self.checkpoints.iterdir():
            if folder not in whole:
                shutil.rmtree(folder, ignore_errors=True)
        return whole[-1] if whole else None

    def mark_whole(self, step: int) -> None:
        """Say that the checkpoint of ``step`` is complete."""
        with atomic_file(self.checkpoints / f"checkpoint-{step}" / _WHOLE) as file:
            json.dump({"run_key": self.key}, file)

    def finish(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Write the metrics, then the adapter.

        Args:
            metrics: what JSON can hold.
            save: called with a folder to write the adapter into.
        """
        with atomic_file(self.metrics) as file:
            json.dump({"run_key": self.key, **metrics}, file, indent=2, allow_nan=False)
            file.write("\n")
        with atomic_folder(self.adapter) as partial:
            save(partial)

    def _whole_checkpoints(self) -> list[Path]:
        """In the order of their steps."""
        found = [path.parent for path in self.checkpoints.glob(f"checkpoint-*/{_WHOLE}")]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _refuse_other(self, key: str, what: str) -> None:
        if key != self.key:
            raise ConfigError(
                f"{self.path} holds {what} with other settings or data; set another run_dir or remove this folder"
            )


def run_key(config_yaml: str, data_sha256: str) -> str:
    """What tells one run from another."""
    return hashlib.sha256(f"{config_yaml}\n{data_sha256}".encode()).hexdigest()


def _read_key(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run_key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is missing or damaged; remove its folder and run again") from None

"""The folder of a run: what is in it, what may go on, and what must not be touched.

``config.yaml`` is there from the start, ``checkpoints/`` while training, ``metrics.json`` and ``adapter/`` at the end,
or ``model/`` where all weights were trained. That comes last and whole: where it is, the run is finished. A checkpoint
is whole if it holds ``whole.json``, which is written last, and every file that is named there has the digest that is
noted there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.errors import CheckpointError, ConfigError
from terselm.files import atomic_file, atomic_folder, flush_folder, remove_partials
from terselm.train.provenance import folder_sha256

_WHOLE = "whole.json"  # written into a checkpoint once every process has finished its part
_FITTING = "rows_per_pass.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIAL_BYTES = 1 << 20
_LATER = ("utility: 0.0", "question_dropped: 0.1", "head_learning_rate: 0.001", "metric: auto")
ADAPTER = "adapter"
MODEL = "model"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the key that says which run it is.

    Attributes:
        path: the folder.
        key: hash of the resolved config and the data.
        result_name: of the folder within it that holds what was trained.
    """

    path: Path
    key: str
    result_name: str = ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        return self.path / self.result_name

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
        finished = any((self.path / name).exists() for name in (ADAPTER, MODEL))
        for mark in [self.metrics] if finished else [folder / _WHOLE for folder in self._marked_checkpoints()]:
            if _read_key(mark) != self.key:
                raise ConfigError(
                    f"{self.path} holds {'a finished' if finished else 'an unfinished'} run with other settings or "
                    "data; set another run_dir or remove this folder"
                )
        return finished

    def begin(self, config_yaml: str, *, resume: bool = True) -> Path | None:
        """Write the config, clear away what a killed run left half-made; the last whole checkpoint, if any.

        Args:
            config_yaml: the resolved config.
            resume: keep the whole checkpoints; else all of them go.

        Raises:
            CheckpointError: the disk is full.
        """
        with clear_disk_errors(self.path, "the run cannot begin"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for final in (self.result, self.metrics, self.path / "config.yaml"):
                remove_partials(final)
            with atomic_file(self.path / "config.yaml") as file:
                file.write(config_yaml)
        whole = [folder for folder in self._marked_checkpoints() if resume and _is_whole(folder)]
        for path in self.checkpoints.iterdir():
            if path.is_dir() and path not in whole:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and not resume:
                path.unlink()
        return whole[-1] if whole else None

    def mark_whole(self, step: int) -> None:
        """Say that the checkpoint of ``step`` is complete: all of it is on disk, and this is what it holds."""
        folder = self.checkpoints / f"checkpoint-{step}"
        flush_folder(folder)
        mark = {"run_key": self.key, "sha256": folder_sha256(folder, leave_out=_WHOLE)}
        with atomic_file(folder / _WHOLE) as file:
            json.dump(mark, file)

    def last_step(self) -> int | None:
        """The step of the last checkpoint that was marked whole, if any."""
        marked = self._marked_checkpoints()
        return _step(marked[-1]) if marked else None

    def note_rows_per_pass(self, rows: int) -> None:
        """Remember how many rows fit into memory, so that a run that goes on takes the same passes."""
        with clear_disk_errors(self.path, "the run cannot go on"), atomic_file(self.checkpoints / _FITTING) as file:
            json.dump(rows, file)

    def noted_rows_per_pass(self) -> int | None:
        """What `note_rows_per_pass` noted, if it did."""
        path = self.checkpoints / _FITTING
        return int(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def finish(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Write the metrics, then what was trained.

        Args:
            metrics: what JSON can hold.
            save: called with a folder to write it into.

        Raises:
            CheckpointError: the disk is full; the checkpoints are still there.
        """
        with clear_disk_errors(self.path, "the result could not be written; the checkpoints are kept"):
            with atomic_file(self.metrics) as file:
                json.dump({"run_key": self.key, **metrics}, file, indent=2, allow_nan=False)
                file.write("\n")
            with atomic_folder(self.result) as partial:
                save(partial)

    def _marked_checkpoints(self) -> list[Path]:
        """Those that were whole once, in the order of their steps."""
        return sorted((path.parent for path in self.checkpoints.glob(f"checkpoint-*/{_WHOLE}")), key=_step)


def finished_result(run: Path) -> Path:
    """The folder of what a finished run has trained: an adapter or a whole model.

    Raises:
        CheckpointError: there is no such run, it has not finished, or it is damaged.
    """
    if not run.is_dir():
        raise CheckpointError(f"no run folder at {run}; expected the run_dir of an alignment")
    needed = ["config.yaml", "metrics.json"]
    if (run / MODEL / "config.json").is_file():
        result = run / MODEL
    elif (run / ADAPTER / "adapter_config.json").is_file():
        result = run / ADAPTER
        needed.append(f"{ADAPTER}/adapter_model.safetensors")
    else:
        raise CheckpointError(f"run folder {run} holds no adapter: its training has not finished; run it again")
    for name in needed:
        if not (run / name).is_file():
            raise CheckpointError(f"run folder {run} holds no {name}; it is damaged, run the alignment again")
    return result


def run_key(config_yaml: str, data_sha256: str) -> str:
    """What tells one run from another.

    Settings that came later count only where they are not their default, so that runs made before are still known.
    """
    for setting in _LATER:
        config_yaml = config_yaml.replace(f"\n  {setting}\n", "\n")
    return hashlib.sha256(f"{config_yaml}\n{data_sha256}".encode()).hexdigest()


@contextmanager
def clear_disk_errors(folder: Path, consequence: str) -> Iterator[None]:
    """Turn the errors of a disk that is full or not writable into a `CheckpointError`; others pass.

    Args:
        folder: what is written to.
        consequence: what is lost and what is not.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _explain(folder, error, consequence) from None
    except (RuntimeError, SafetensorError) as error:  # torch.save and safetensors do not say why
        if (reason := _trial(folder)) is None:
            raise
        raise _explain(folder, reason, consequence) from error


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    noted = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8")).get("sha256")
    return bool(noted == folder_sha256(checkpoint, leave_out=_WHOLE))


def _read_key(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run_key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is missing or damaged; remove its folder and run again") from None


def _trial(folder: Path) -> OSError | None:
    """What goes wrong when something is written there now."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _explain(folder: Path, error: OSError, consequence: str) -> CheckpointError:
    reason = (error.strerror or str(error)).lower()
    remedy = "free some space" if error.errno in _FULL else "make the folder writable"
    return CheckpointError(f"cannot write to {folder}: {reason}; {consequence}; {remedy} and run the same command")

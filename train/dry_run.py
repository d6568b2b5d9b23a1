"""What a run would take, without doing it."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from terselm.errors import ConfigError
from terselm.train.fitting import PassCost, find_fitting
from terselm.train.progress import duration
from terselm.train.run import Run

_OVERHEAD = 1.05  # of the optimiser, the logs and the checkpoints, over the passes alone
_FORWARD = 1 / 3  # of a pass that trains


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Steps, time and memory of a run.

    Attributes:
        steps: of the optimiser.
        passes: of a process in each step.
        cost: of a pass.
        scoring_seconds: of all scorings of held-out text together.
        device: type of device.
    """

    steps: int
    passes: int
    cost: PassCost
    scoring_seconds: float
    device: str

    @property
    def seconds(self) -> float:
        return self.steps * self.passes * self.cost.seconds * _OVERHEAD + self.scoring_seconds

    def __str__(self) -> str:
        memory = "GPU memory of a process" if self.device == "cuda" else "memory of a process"
        return (
            f"steps {self.steps:,} of {self.passes} pass(es) of {self.cost.rows} row(s)\n"
            f"time about {duration(self.seconds)} ({self.cost.seconds:.2f} s a pass, "
            f"{duration(self.scoring_seconds)} of it for scoring held-out text)\n"
            f"peak {memory} about {self.cost.peak_bytes / 2**30:.2f} GiB"
        )


def estimate(run: Run) -> Estimate:
    """Try a pass and reckon from it.

    Raises:
        ConfigError: the model would be sharded.
        TrainingError: not even one row fits into memory.
    """
    if run.is_sharded:
        raise ConfigError("--dry-run cannot try a sharded model; use it with one process or with DDP")
    _remove_empty(run)
    cost = find_fitting(run.trainer, asked=run.rows_per_pass, share=run.share, repeat=True)
    steps, every = run.compute["steps"], run.config.evaluation.every
    scored = 2 * run.reported.text.tokens
    if run.choosing is not None:
        scored += math.ceil(steps / every) * run.choosing.text.tokens
    forward = cost.seconds / cost.rows * _FORWARD  # seconds of a row
    return Estimate(
        steps=steps,
        passes=run.share // cost.rows,
        cost=cost,
        scoring_seconds=scored / run.texts.row_length * forward / run.state.num_processes,
        device=run.compute["device"],
    )


def _remove_empty(run: Run) -> None:
    """The folders that the Trainer makes before there is anything to put into them."""
    for folder in (run.folder.checkpoints, run.folder.path):
        with suppress(OSError):
            folder.rmdir()

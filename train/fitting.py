"""What a pass costs, found by trying: how many rows fit into memory at once, and how long a whole run would take."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from terselm.errors import TrainingError
from terselm.progress import duration
from terselm.train.trainer import AlignmentTrainer

_LOOKED_AT = 64  # rows among which the fullest is sought: nearly all of them are full
_OVERHEAD = 1.05  # of the optimiser, the logs and the checkpoints, over the passes alone
_FORWARD = 1 / 3  # of a pass that trains


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """One forward and backward pass of the fullest row, as often as rows go through the model at once.

    Attributes:
        rows: in the pass.
        seconds: that it took.
        peak_bytes: of this process: of the GPU's memory, or of the main memory where there is no GPU.
    """

    rows: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class DryRunEstimate:
    """Steps, time and memory of a run.

    Attributes:
        steps: of the optimiser.
        passes: of a process in each step.
        cost: of a pass.
        scored_rows: that one process scores of held-out text, in all scorings together.
        device: type of device.
    """

    steps: int
    passes: int
    cost: PassCost
    scored_rows: float
    device: str

    @property
    def scoring_seconds(self) -> float:
        return self.scored_rows * self.cost.seconds / self.cost.rows * _FORWARD

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


def find_fitting(trainer: AlignmentTrainer, *, asked: int, share: int, repeat: bool = False) -> PassCost:
    """The most rows a pass, at most ``asked``, that fit into the memory of every process.

    Leaves weights, gradients and random states as they were. A sharded model is not tried: its processes depend on
    each other within a pass.

    Args:
        trainer: whose loss is computed.
        asked: rows a pass.
        share: rows of a step that fall to one process; the result divides it.
        repeat: time a second pass, without what only the first one costs.

    Raises:
        TrainingError: not even one row fits.
    """
    for rows in fewer_rows(asked, share):
        cost = _try(trainer, rows)
        if cost is not None and repeat:
            cost = _try(trainer, rows)
        fits = torch.tensor(float(cost is not None), device=trainer.accelerator.device)
        if trainer.accelerator.reduce(fits, reduction="sum").item() == trainer.accelerator.num_processes and cost:
            return cost
    raise TrainingError(
        "not even one row of data.max_length tokens fits into memory; lower data.max_length, choose a smaller model "
        "or set dtype=bfloat16"
    )


def fewer_rows(most: int, share: int) -> Iterator[int]:
    """The divisors of ``share`` that are at most ``most``, in descending order."""
    return (rows for rows in range(min(most, share), 0, -1) if share % rows == 0)


def is_out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )


def _try(trainer: AlignmentTrainer, rows: int) -> PassCost | None:
    """None if it does not fit."""
    device = trainer.accelerator.device
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        try:
            return _pass(trainer, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            trainer.model.zero_grad(set_to_none=True)
    if gpus:
        torch.cuda.empty_cache()
    return None


def _pass(trainer: AlignmentTrainer, rows: int) -> PassCost:
    model: Any = trainer.model
    schedule: Any = trainer.train_dataset
    first = (schedule[index] for index in range(min(len(schedule), _LOOKED_AT)))
    fullest = max(first, key=lambda row: sum(map(len, row)))
    batch = trainer._prepare_inputs(trainer.data_collator([fullest] * rows))
    on_gpu = trainer.accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    moments = [torch.empty_like(w, dtype=torch.float32) for w in model.parameters() if w.requires_grad for _ in "mv"]
    model.train()
    started = time.perf_counter()
    trainer.compute_loss(model, batch, num_items_in_batch=trainer.divisors([fullest] * rows)).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    del moments  # what the optimiser will hold
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_reserved() if on_gpu else of_process
    return PassCost(rows=rows, seconds=seconds, peak_bytes=peak)

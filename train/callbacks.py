"""What watches over training: whole checkpoints, finite weights, the best weights so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from terselm.errors import TrainingError
from terselm.train.config import EvaluationSettings
from terselm.train.run_folder import RunFolder

if TYPE_CHECKING:
    from terselm.train.trainer import AlignmentTrainer

MEASURE = "eval_bits_per_byte"


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Marks a checkpoint once every process has written its part; one without a mark is never resumed from."""

    def __init__(self, trainer: AlignmentTrainer, folder: RunFolder) -> None:
        self._trainer = trainer
        self._folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self._folder.mark_whole(state.global_step)


class FiniteWeights(TrainerCallback):  # type: ignore[misc]
    """Stops before anything is saved or logged that an infinite loss or gradient has spoilt."""

    def __init__(self, trainer: AlignmentTrainer, folder: RunFolder) -> None:
        self._trainer = trainer
        self._folder = folder
        self._losses: list[Tensor] = []

    def note(self, loss: Tensor) -> None:
        """Keep the loss of a pass until it is looked at: looking at each would hold up a GPU."""
        self._losses.append(loss.detach())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not (control.should_log or control.should_save or control.should_evaluate):
            return
        spoilt = torch.stack([*self._losses, *_sums(self._trainer.model)]).isfinite().logical_not().any()
        self._losses.clear()
        if not self._trainer.accelerator.reduce(spoilt.float(), reduction="sum").item():
            return
        kept = self._folder.last_step()
        saved = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been written yet"
        raise TrainingError(
            f"the loss or a weight became infinite or NaN by step {state.global_step}; {saved}. Lower "
            "optimisation.learning_rate, raise optimisation.warmup or look for broken text in the data, and set "
            "another run_dir"
        )


class BestWeights(TrainerCallback):  # type: ignore[misc]
    """Asks for a score of the held-out text every so often, and for an end when it has stopped getting better."""

    def __init__(self, settings: EvaluationSettings, save_every: int) -> None:
        self._settings = settings
        self._save_every = save_every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        control.should_save |= control.should_evaluate or state.global_step % self._save_every == 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        scores = [entry[MEASURE] for entry in state.log_history if MEASURE in entry]
        if self._settings.patience and rounds_since_best(scores) >= self._settings.patience:
            control.should_training_stop = True


def rounds_since_best(scores: Sequence[float]) -> int:
    """How many scores came after the lowest."""
    return len(scores) - 1 - min(range(len(scores)), key=scores.__getitem__)


@torch.no_grad()
def _sums(model: Any) -> list[Tensor]:
    """A number for each trained weight that is finite only if the weight is; of this process's shard, if sharded."""
    local = (getattr(weight, "_local_tensor", weight) for weight in model.parameters() if weight.requires_grad)
    return [weight.float().abs().sum() for weight in local]

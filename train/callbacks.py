"""What watches over training: progress, whole checkpoints, finite weights, the best weights so far, a tracker."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from terselm.errors import ConfigError, TrainingError
from terselm.progress import Progress, duration, say
from terselm.train.run_folder import RunFolder
from terselm.train.settings import AlignSettings, Metric, Tracker


def logged_as(metric: Metric) -> str:
    """The name that a score of held-out text has in the history."""
    return f"eval_{metric.value}"


class TrainingProgress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Loss, tokens per second and time left; silent on all processes but the first."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._figures = ""
        self._started = 0.0
        self._first_step = 0
        self._first_tokens = 0
        self._last = (0.0, 0)

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._started

    def tokens_per_second(self, state: Any) -> float:
        """Real tokens, since training began or went on."""
        return float((state.num_input_tokens_seen - self._first_tokens) / self.seconds)

    def recent_tokens_per_second(self, state: Any) -> float:
        """Real tokens since this was last asked, without what only the start of training costs."""
        seconds, tokens = self.seconds, state.num_input_tokens_seen
        (before, seen), self._last = self._last, (seconds, tokens)
        return float((tokens - seen) / (seconds - before))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()
        self._first_step = state.global_step
        self._first_tokens = state.num_input_tokens_seen
        self._last = (0.0, self._first_tokens)
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = Progress(state.max_steps, "aligning", "step", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the last step, whatever log_every is
        if self._bar is not None:
            self._bar.update(1, self._figures)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self._figures = f"loss {logs['loss']:.3f}, {self.tokens_per_second(state):,.0f} tokens/s"
        if self._bar is None:
            done = state.global_step - self._first_step
            left = self.seconds / done * (state.max_steps - state.global_step)
            mfu = f", MFU {logs['mfu']:.1%}" if "mfu" in logs else ""
            say(f"step {state.global_step}/{state.max_steps}, {self._figures}{mfu}, {duration(left)} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint once every process has written its part; one without a mark is never resumed from."""

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self._trainer = trainer
        self._folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self._folder.mark_whole(state.global_step)


class FiniteWeights(TrainerCallback):  # type: ignore[misc]
    """Stops before anything is saved or logged that an infinite loss or gradient has spoilt."""

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
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

    def __init__(self, settings: AlignSettings) -> None:
        self._patience = settings.evaluation.patience
        self._save_every = settings.save_every
        self._name = logged_as(settings.metric)
        self._sign = 1 if settings.metric is Metric.BITS_PER_BYTE else -1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        control.should_save |= control.should_evaluate or state.global_step % self._save_every == 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        scores = [self._sign * entry[self._name] for entry in state.log_history if self._name in entry]
        if self._patience and rounds_since_best(scores) >= self._patience:
            control.should_training_stop = True


def tracker_callbacks(choice: Tracker, run: Path) -> list[Any]:
    """The Trainer's callbacks that report to a tracker.

    Args:
        choice: of the settings.
        run: folder of the run; TensorBoard's files go into ``tensorboard/`` there, the others have their own settings
            in the environment (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, …).

    Raises:
        ConfigError: its package is not installed.
    """
    installed = Tracker.TENSORBOARD if find_spec("tensorboard") else Tracker.NONE
    tracker = installed if choice is Tracker.AUTO else choice
    if tracker is Tracker.NONE:
        return []
    if find_spec(tracker.value) is None:
        package = "terselm[train]" if tracker is Tracker.TENSORBOARD else tracker.value
        raise ConfigError(f"tracker={tracker} needs the package {tracker}; run: pip install '{package}'")
    from transformers.integrations import get_reporting_integration_callbacks

    (kind,) = get_reporting_integration_callbacks([tracker.value])
    callback = kind()
    if tracker is Tracker.TENSORBOARD:
        callback.logging_dir = str(run / "tensorboard")
    return [callback]


def rounds_since_best(scores: Sequence[float]) -> int:
    """How many scores came after the lowest."""
    return len(scores) - 1 - min(range(len(scores)), key=scores.__getitem__)


@torch.no_grad()
def _sums(model: Any) -> list[Tensor]:
    """A number for each trained weight that is finite only if the weight is; of this process's shard, if sharded."""
    local = (getattr(weight, "_local_tensor", weight) for weight in model.parameters() if weight.requires_grad)
    return [weight.float().abs().sum() for weight in local]

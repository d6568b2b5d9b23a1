"""transformers' Trainer with our loss, our order of rows, and checkpoints that are known to be whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from terselm.errors import ConfigError
from terselm.train.batches import MODEL_INPUTS, Collator, StepCounts
from terselm.train.callbacks import MEASURE, BestWeights, FiniteWeights, WholeCheckpoints
from terselm.train.config import AlignConfig
from terselm.train.objectives import Mixture
from terselm.train.packing import Row
from terselm.train.progress import Progress
from terselm.train.run_folder import RunFolder
from terselm.train.saving import clear_disk_errors
from terselm.train.speed import flops_per_token, peak_flops
from terselm.train.trackers import tracker_callbacks


class AlignmentTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Minimises the objective of each optimiser step, whichever process or pass its tokens are in."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        schedule: Sequence[Row],
        folder: RunFolder,
        config: AlignConfig,
    ) -> None:
        self.control: Any  # transformers is untyped
        self.progress = Progress()
        self._objective = Mixture.of(config.objective)
        self._counts = StepCounts.of(schedule, config.optimisation.rows_per_step, self._objective)
        self.choose_by: Callable[[], float] | None = None  # bits per byte of the text that chooses the best weights
        self._folder = folder
        self._finite = FiniteWeights(self, folder)
        watchers = [self.progress, WholeCheckpoints(self, folder)]
        if config.evaluation.every:
            watchers.append(BestWeights(config.evaluation, config.save_every))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=schedule,
            eval_dataset=[],  # it asks for one before `evaluate` is called; ours is scored by `choose_by`
            data_collator=Collator(
                objective=self._objective,
                width=config.data.max_length if arguments.device.type == "cuda" else None,  # one shape to compile for
            ),
            callbacks=[*watchers, self._finite, *tracker_callbacks(config.tracker, folder.path)],
        )
        peak = peak_flops(arguments.device)
        self._peak_flops = None if peak is None else peak * self.accelerator.num_processes
        self._flops_per_token = flops_per_token(getattr(model, "get_base_model", lambda: model)())
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that the loss is not divided by the number of passes again

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], list[float]]:
        """The passes of one step, and the divisors of its losses over all processes; asks no GPU."""
        step = self.state.global_step
        self.state.num_input_tokens_seen += int(self._counts.tokens[step])
        return list(islice(epoch_iterator, num_batches)), self._counts.units[step].tolist()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This pass's share of the step's loss; times the processes, over which DDP takes the mean."""
        surprisals = model(**{name: inputs[name] for name in MODEL_INPUTS})
        loss = self._objective.loss(surprisals, inputs, num_items_in_batch) * self.accelerator.num_processes
        return (loss, surprisals) if return_outputs else loss

    def divisors(self, rows: Sequence[Row]) -> list[float]:
        """What the losses of a step of these rows alone are divided by."""
        return [float(units) for units in self._objective.units([example for row in rows for example in row])]

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: transformers would go through all parameters in each pass; see `speed.flops_per_token`."""
        return 0

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **named)
        self._finite.note(loss)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Bits per byte of the held-out text that chooses the best weights."""
        if self.choose_by is None:
            raise RuntimeError("no text was set apart to choose the best weights by")
        metrics = {MEASURE: self.choose_by()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss history needs: real tokens seen, the seconds it took, and how fast that is."""
        logs["tokens"] = self.state.num_input_tokens_seen
        logs["seconds"] = self.progress.seconds
        if "loss" in logs:
            logs["tokens_per_second"] = self.progress.recent_tokens_per_second(self.state)
            if self._peak_flops is not None:
                logs["mfu"] = logs["tokens_per_second"] * self._flops_per_token / self._peak_flops
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, or say clearly that the disk is full and which checkpoint is the last whole one."""
        kept = self._folder.last_step()
        consequence = f"the checkpoint of step {kept} is kept" if kept else "there is no earlier checkpoint"
        with clear_disk_errors(self._folder.checkpoints, consequence):
            super()._save_checkpoint(model, trial)


def schedule_rows(rows: Sequence[Row], config: AlignConfig) -> list[Row]:
    """The rows of the whole run, in order: a new permutation each epoch, cut to whole steps.

    One list for all epochs, so that the steps are the same whatever the number of processes.
    """
    settings = config.optimisation
    steps = max(1, round(settings.epochs * len(rows) / settings.rows_per_step))
    wanted = steps * settings.rows_per_step
    generator = np.random.default_rng(config.seed)
    order: list[int] = []
    while len(order) < wanted:
        order.extend(generator.permutation(len(rows)).tolist())
    return [rows[index] for index in order[:wanted]]


def training_arguments(config: AlignConfig, folder: RunFolder, *, rows: int, processes: int) -> TrainingArguments:
    """Our settings in the Trainer's words.

    Args:
        config: of the run.
        folder: of the run.
        rows: in the whole schedule.
        processes: that share each step.

    Raises:
        ConfigError: the rows of a step cannot be shared out evenly.
    """
    settings = config.optimisation
    at_once = processes * settings.rows_per_pass
    if settings.rows_per_step % at_once:
        raise ConfigError(
            f"optimisation.rows_per_step={settings.rows_per_step} is not a multiple of {processes} process(es) × "
            f"optimisation.rows_per_pass={settings.rows_per_pass}; change one of them"
        )
    steps = rows // settings.rows_per_step
    every = config.evaluation.every
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        run_name=folder.path.name,
        max_steps=steps,
        per_device_train_batch_size=settings.rows_per_pass,
        gradient_accumulation_steps=settings.rows_per_step // at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule.value,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show the last finite loss in the place of NaN
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        load_best_model_at_end=bool(every),
        metric_for_best_model=MEASURE if every else None,
        greater_is_better=False,
        save_steps=every or config.save_every,  # the Trainer saves where it evaluates; `BestWeights` adds save_every
        save_total_limit=3,  # the last one may be torn, and the best is one of them
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},  # see `join_processes`
        report_to="none",  # see `trackers`
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would spread over all GPUs with DataParallel
    return arguments

"""transformers' Trainer with our loss, our order of rows, and checkpoints that are known to be whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from terselm.errors import ConfigError
from terselm.train.config import AlignConfig
from terselm.train.packing import IGNORED, Row, collate
from terselm.train.progress import Progress
from terselm.train.run_folder import RunFolder


class AlignmentTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Minimises the mean NLL of the counted tokens of each optimiser step, whichever process or pass they are in."""

    def __init__(self, model: Any, arguments: TrainingArguments, schedule: Sequence[Row], folder: RunFolder) -> None:
        self.progress = Progress()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=schedule,
            data_collator=partial(collate, pad_id=0),
            callbacks=[self.progress, _WholeCheckpoints(self, folder)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that the loss is not divided by the number of passes again

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The passes of one step, and how many tokens they count over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        counted = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        tokens = sum(int(batch["tokens"].sum()) for batch in batches)
        totals = self.accelerator.reduce(torch.tensor([counted, tokens], device=device), reduction="sum")
        self.state.num_input_tokens_seen += int(totals[1])
        return batches, totals[0]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of nats / counted tokens of the whole step; times the processes, over which DDP takes the mean."""
        surprisals = model(**{name: inputs[name] for name in ("input_ids", "position_ids", "labels")})
        loss = surprisals.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, surprisals) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss history needs: real tokens seen, and the seconds it took."""
        logs["tokens"] = self.state.num_input_tokens_seen
        logs["seconds"] = self.progress.seconds
        super().log(logs, start_time)


class _WholeCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint once every process has written its part; one without a mark is never resumed from."""

    def __init__(self, trainer: AlignmentTrainer, folder: RunFolder) -> None:
        self._trainer = trainer
        self._folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self._folder.mark_whole(state.global_step)


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
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
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
        save_steps=config.save_every,
        save_total_limit=2,  # the last one may be torn
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would spread over all GPUs with DataParallel
    return arguments

"""transformers' Trainer with our loss, our order of rows, and checkpoints that are known to be whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from terselm.errors import ConfigError
from terselm.train.callbacks import (
    BestWeights,
    FiniteWeights,
    TrainingProgress,
    WholeCheckpoints,
    logged_as,
    tracker_callbacks,
)
from terselm.train.hardware import flops_per_token, peak_flops
from terselm.train.model import gather_trained, head_of, load_head, save_head
from terselm.train.objectives import Mixture
from terselm.train.packing import MODEL_INPUTS, Row, collate
from terselm.train.run_folder import RunFolder, clear_disk_errors
from terselm.train.settings import AlignSettings, Metric
from terselm.train.surprisals import Readings, surprisals_of


class AlignmentTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Minimises the objective of each optimiser step, whichever process or pass its tokens are in."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        schedule: Sequence[Row],
        folder: RunFolder,
        settings: AlignSettings,
    ) -> None:
        self.control: Any  # transformers is untyped
        self.progress = TrainingProgress()
        self._objective = Mixture.of(settings.objective)
        self._counts = StepCounts.of(schedule, settings.optimisation.rows_per_step, self._objective)
        self.choose_by: Callable[[], float] | None = None  # the score of the text that chooses the best weights
        self._measure = logged_as(settings.metric)
        self._head_learning_rate = settings.optimisation.head_learning_rate
        self._folder = folder
        self._finite = FiniteWeights(self, folder)
        watchers = [self.progress, WholeCheckpoints(self, folder)]
        if settings.evaluation.every:
            watchers.append(BestWeights(settings))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=schedule,
            eval_dataset=[],  # it asks for one before `evaluate` is called; ours is scored by `choose_by`
            data_collator=Collator(
                objective=self._objective,
                width=settings.data.max_length if arguments.device.type == "cuda" else None,  # one shape to compile for
            ),
            callbacks=[*watchers, self._finite, *tracker_callbacks(settings.tracker, folder.path)],
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
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This pass's share of the step's loss; times the processes, over which DDP takes the mean."""
        output = model(**{name: inputs[name] for name in MODEL_INPUTS})
        if isinstance(output, Readings):
            inputs = {**inputs, "scores": output.scores}
        loss = self._objective.loss(surprisals_of(output), inputs, num_items_in_batch)
        loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's, where the head has a learning rate of its own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        head = head_of(self.model if model is None else model)
        if made and head is not None:
            own = {id(weight) for weight in head.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if id(weight) not in own]
            optimizer.add_param_group(
                {"params": list(head.parameters()), "lr": self._head_learning_rate, "weight_decay": 0.0}
            )
        return optimizer

    def divisors(self, rows: Sequence[Row]) -> list[float]:
        """What the losses of a step of these rows alone are divided by."""
        return [float(units) for units in self._objective.units([example for row in rows for example in row])]

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: transformers would go through all parameters in each pass; see `hardware.flops_per_token`."""
        return 0

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **named)
        self._finite.note(loss)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The score of the held-out text that chooses the best weights."""
        if self.choose_by is None:
            raise RuntimeError("no text was set apart to choose the best weights by")
        metrics = {self._measure: self.choose_by()}
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
            if (head := head_of(self.model)) is not None:
                weights = gather_trained(head, keep=self.args.should_save)
                if self.args.should_save:
                    folder = self._folder.checkpoints / f"checkpoint-{self.state.global_step}"
                    save_head(folder, weights, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_head(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # whose checkpoints hold all that is trained
            load_head(self.model, Path(self.state.best_model_checkpoint))


def schedule_rows(rows: Sequence[Row], settings: AlignSettings) -> list[Row]:
    """The rows of the whole run, in order: a new permutation each epoch, cut to whole steps.

    One list for all epochs, so that the steps are the same whatever the number of processes.
    """
    optimisation = settings.optimisation
    steps = max(1, round(optimisation.epochs * len(rows) / optimisation.rows_per_step))
    total = steps * optimisation.rows_per_step
    generator = np.random.default_rng(settings.seed)
    order: list[int] = []
    while len(order) < total:
        order.extend(generator.permutation(len(rows)).tolist())
    return [rows[index] for index in order[:total]]


def training_arguments(settings: AlignSettings, folder: RunFolder, *, rows: int, processes: int) -> TrainingArguments:
    """Our settings in the Trainer's words.

    Args:
        settings: of the run.
        folder: of the run.
        rows: in the whole schedule.
        processes: that share each step.

    Raises:
        ConfigError: the rows of a step cannot be shared out evenly.
    """
    optimisation = settings.optimisation
    at_once = processes * optimisation.rows_per_pass
    if optimisation.rows_per_step % at_once:
        raise ConfigError(
            f"optimisation.rows_per_step={optimisation.rows_per_step} is not a multiple of {processes} process(es) × "
            f"optimisation.rows_per_pass={optimisation.rows_per_pass}; change one of them"
        )
    steps = rows // optimisation.rows_per_step
    every = settings.evaluation.every
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        run_name=folder.path.name,
        max_steps=steps,
        per_device_train_batch_size=optimisation.rows_per_pass,
        gradient_accumulation_steps=optimisation.rows_per_step // at_once,
        learning_rate=optimisation.learning_rate,
        lr_scheduler_type=optimisation.schedule.value,
        warmup_steps=round(optimisation.warmup * steps),
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show the last finite loss in the place of NaN
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        load_best_model_at_end=bool(every),
        metric_for_best_model=logged_as(settings.metric) if every else None,
        greater_is_better=settings.metric is not Metric.BITS_PER_BYTE,
        save_steps=every or settings.save_every,  # the Trainer saves where it evaluates; `BestWeights` adds save_every
        save_total_limit=3,  # the last one may be torn, and the best is one of them
        seed=settings.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},  # see `join_processes`
        report_to="none",  # see `tracker_callbacks`
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would spread over all GPUs with DataParallel
    return arguments


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes the batch of a pass.

    Attributes:
        objective: what it asks the model about each token.
        width: tokens that each row is filled up to; None for as many as the longest has.
    """

    objective: Mixture
    width: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """One batch.

        Returns:
            what `collate` gives of the tokens that the objective reads, where ``wanted`` may be ``(n, 1 + K)`` with the
            target's likeliest tokens besides; and what the objective needs.
        """
        examples = [example for row in rows for example in row]
        read = [self.objective.reads(example) for example in examples]
        batch = collate(rows, read, shape=None if self.width is None else (len(rows), self.width))
        arrays = self.objective.inputs(examples, read)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if (likeliest := inputs.pop("top_ids", None)) is not None:
            batch["wanted"] = torch.cat([batch["wanted"][:, None], likeliest], dim=1)
        return batch | inputs


@dataclass(frozen=True, eq=False)
class StepCounts:
    """What each optimiser step holds over all processes, known before any of it is read.

    Attributes:
        tokens: ``(steps,)`` int64, those that are not padding.
        units: ``(steps, objectives)`` float64, the divisors of the losses.
    """

    tokens: NDArray[np.int64]
    units: NDArray[np.float64]

    @classmethod
    def of(cls, schedule: Sequence[Row], rows_per_step: int, objective: Mixture) -> StepCounts:
        """Count; a row that comes again in a later epoch is counted once."""
        distinct = {id(row): row for row in schedule}
        tokens = {key: sum(map(len, row)) for key, row in distinct.items()}
        units = {key: objective.units(row) for key, row in distinct.items()}
        steps = len(schedule) // rows_per_step
        counted = schedule[: steps * rows_per_step]
        return cls(
            np.array([tokens[id(row)] for row in counted], dtype=np.int64).reshape(steps, -1).sum(axis=1),
            np.stack([units[id(row)] for row in counted]).reshape(steps, rows_per_step, -1).sum(axis=1),
        )

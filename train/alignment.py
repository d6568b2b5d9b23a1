"""One alignment run, from records to an adapter with its metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.config import dump_config
from terselm.errors import DataFormatError
from terselm.models import load_causal_lm
from terselm.train.config import AlignConfig
from terselm.train.evaluation import compare, score
from terselm.train.hardware import describe_hardware, describe_versions, pick_precision, share_out_cores
from terselm.train.lora import add_adapter, save_adapter
from terselm.train.progress import quieten_libraries, say
from terselm.train.provenance import file_sha256, git_commit
from terselm.train.run_folder import RunFolder, run_key
from terselm.train.scoring import score_instead_of_logits
from terselm.train.texts import Texts, read_texts
from terselm.train.trainer import AlignmentTrainer, schedule_rows, training_arguments

if TYPE_CHECKING:
    from accelerate import PartialState


def align(config: AlignConfig) -> RunFolder:
    """Align ``config.model`` to its records; does nothing if this very run has been finished.

    Every process of a distributed launch calls it; the first one alone writes.

    Raises:
        TerseLMError: a setting, the data, the model or the run folder is at fault; nothing was overwritten.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    started = time.perf_counter()
    quieten_libraries()
    share_out_cores()
    data_sha256 = _data_sha256(Path(config.data.records))
    folder = RunFolder(Path(config.run_dir), run_key(dump_config(config), data_sha256))
    finished = folder.is_finished()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    tell = say if state.is_main_process else _stay_silent
    if finished:
        tell(f"{folder.path} holds this very run, finished; nothing to do")
        return folder
    run = _prepare(config, folder, state)
    checkpoint = _begin(config, folder, state)
    tell(run.introduction())
    before = run.score()
    tell(f"held-out text before: {run.texts.held_out.bits_per_byte(before):.4f} bits per byte")
    if checkpoint is not None:
        tell(f"going on from {checkpoint}")
    run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    training = _describe_training(run.trainer, resumed=checkpoint is not None)
    held_out = compare(run.texts.held_out, before, run.score(), config.seed)
    if state.is_main_process:
        metrics = {"model": config.model, "held_out": held_out, "training": training, **run.circumstances(data_sha256)}
        metrics["seconds"] = time.perf_counter() - started
        folder.finish(metrics, partial(save_adapter, run.model, base=config.model))
        tell(_conclusion(metrics, folder))
    run.trainer.accelerator.end_training()
    return folder


@dataclass(frozen=True, kw_only=True)
class _Run:
    """All that training and scoring need."""

    config: AlignConfig
    state: PartialState
    model: Any
    texts: Texts
    trainer: AlignmentTrainer
    compute: dict[str, Any]

    def score(self) -> NDArray[np.float64]:
        """Nats of the held-out text, ``(prompts,)``."""
        return score(
            self.model,
            self.texts.held_out,
            row_length=self.texts.row_length,
            rows_per_pass=self.config.evaluation.rows_per_pass,
            rank=self.state.process_index,
            processes=self.state.num_processes,
        )

    def circumstances(self, data_sha256: str) -> dict[str, Any]:
        """What the result came from, and the loss by step."""
        return {
            "data": {"records": self.config.data.records, "sha256": data_sha256, **self.texts.describe()},
            "compute": self.compute,
            "versions": describe_versions(),
            "hardware": describe_hardware(),
            "git_commit": git_commit(),
            "loss_history": [entry for entry in self.trainer.state.log_history if "loss" in entry],
        }

    def introduction(self) -> str:
        data, compute = self.texts.describe(), self.compute
        held_out = self.texts.held_out
        lines = [
            f"{self.config.model} on {compute['device']} in {compute['dtype']}, {compute['processes']} process(es), "
            f"{compute['trainable_parameters']:,} trainable parameters",
            f"{data['training_records']:,} records, {data['training_tokens']:,} tokens ({data['counted_tokens']:,} "
            f"counted) in {data['rows']:,} rows, {data['real_token_share']:.1%} of them real; "
            f"{compute['steps']} steps of {self.config.optimisation.rows_per_step} rows",
            f"held out: {len(held_out.prompt_of):,} records to {len(held_out.tokens):,} prompts, "
            f"{int(held_out.tokens.sum()):,} tokens to score",
        ]
        if data["overlong_split"] or data["overlong_dropped"]:
            lines.append(
                f"longer than {self.texts.row_length} tokens: {data['overlong_split']} records split, "
                f"{data['overlong_dropped']} dropped"
            )
        return "\n".join(lines)


def _prepare(config: AlignConfig, folder: RunFolder, state: PartialState) -> _Run:
    """Load, read and build; writes nothing."""
    from accelerate.utils import set_seed

    precision = pick_precision(config.dtype, state.device)
    dtype = str(precision).removeprefix("torch.")
    lm = load_causal_lm(config.model, device=str(state.device), dtype=dtype)
    texts = read_texts(config, lm)
    schedule = schedule_rows(texts.rows, config)
    arguments = training_arguments(config, folder, rows=len(schedule), processes=state.num_processes)
    score_instead_of_logits(lm.model, autocast=None if precision == torch.float32 else precision)
    set_seed(config.seed)  # the adapter's first values
    model = add_adapter(lm.model, config.lora)
    compute = {
        "device": state.device.type,
        "dtype": dtype,
        "processes": state.num_processes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": arguments.max_steps,
    }
    trainer = AlignmentTrainer(model, arguments, schedule, folder)
    return _Run(config=config, state=state, model=model, texts=texts, trainer=trainer, compute=compute)


def _begin(config: AlignConfig, folder: RunFolder, state: PartialState) -> Path | None:
    """The checkpoint to go on from, the same in every process."""
    from accelerate.utils import broadcast_object_list

    state.wait_for_everyone()  # until all have seen that the folder is free
    chosen = [folder.begin(dump_config(config)) if state.is_main_process else None]
    return broadcast_object_list(chosen)[0] if state.num_processes > 1 else chosen[0]


def _describe_training(trainer: AlignmentTrainer, *, resumed: bool) -> dict[str, Any]:
    return {
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "seconds": trainer.progress.seconds,
        "tokens_per_second": trainer.progress.tokens_per_second(trainer.state),
        "resumed": resumed,
    }


def _conclusion(metrics: dict[str, Any], folder: RunFolder) -> str:
    held_out, training = metrics["held_out"], metrics["training"]
    difference = held_out["difference"]
    low, high = difference["bits_per_byte_interval"]
    return (
        f"held-out text after: {held_out['after']['bits_per_byte']:.4f} bits per byte, "
        f"{difference['bits_per_byte']:+.4f} (95% interval {low:+.4f} to {high:+.4f})\n"
        f"{training['tokens_seen']:,} tokens at {training['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['seconds']:.0f} s in all; adapter in {folder.adapter}"
    )


def _data_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None


def _stay_silent(_: str) -> None:
    """What the other processes have to say."""

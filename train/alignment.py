"""One alignment run, from records to an adapter or a model, with its metrics."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.config import dump_config
from terselm.errors import TrainingError
from terselm.models import load_tokenizer
from terselm.train.choices import Method
from terselm.train.config import AlignConfig
from terselm.train.dry_run import estimate
from terselm.train.evaluation import compare
from terselm.train.fitting import fewer_rows, find_fitting, is_out_of_memory
from terselm.train.gathering import gather_trained
from terselm.train.hardware import join_processes, share_out_cores
from terselm.train.progress import quieten_libraries, say
from terselm.train.report.reading import write_texts
from terselm.train.report.report import REPORT, Measurement, report_target, write_report
from terselm.train.report.text import sentence
from terselm.train.run import Run, prepare
from terselm.train.run_folder import ADAPTER, MODEL, RunFolder, run_key
from terselm.train.saving import clear_disk_errors
from terselm.train.small_lm import save_trained
from terselm.train.sources import combined, read_sources
from terselm.train.trainer import AlignmentTrainer

if TYPE_CHECKING:
    from accelerate import PartialState


def align(config: AlignConfig, *, resume: bool = True, dry_run: bool = False) -> RunFolder:
    """Align ``config.model`` to its records; does nothing if this very run has been finished.

    Every process of a distributed launch calls it; the first one alone writes.

    Args:
        config: the run.
        resume: go on from the last whole checkpoint of the run folder, if it holds one; else begin anew.
        dry_run: only say how long it would take and how much memory; nothing is written.

    Raises:
        TerseLMError: a setting, the data, the model or the run folder is at fault; nothing was overwritten.
    """
    quieten_libraries()
    share_out_cores()
    sources = read_sources(config.data)
    data_sha256 = combined(sources)
    key = run_key(dump_config(config), data_sha256)
    folder = RunFolder(Path(config.run_dir), key, MODEL if config.method is Method.FULL else ADAPTER)
    finished = folder.is_finished()
    state = join_processes()
    tell = say if state.is_main_process else _stay_silent
    if dry_run:
        tell(str(estimate(prepare(config, folder, state, sources))))
        return folder
    target = report_target(config)
    if finished:
        tell(f"{folder.path} holds this very run, finished; nothing to do")
        state.wait_for_everyone()  # the first process must not be gone while the others still look for it
        if state.is_main_process and not (folder.path / REPORT).exists():
            _report(folder, target, state)
        return folder
    if target is not None and state.is_main_process:
        load_tokenizer(target)  # better to know now than after the training
    while not _attempt(prepare(config, folder, state, sources), data_sha256, tell, resume=resume):
        tell("out of memory: going on with smaller passes")
        resume = True
    if state.is_main_process:
        _report(folder, target, state)
    return folder


def _report(folder: RunFolder, target: str | None, state: PartialState) -> None:
    """Write the report, and say the part of it that has not been said yet."""
    gc.collect()  # the trained model, in whose place others are read
    report = write_report(folder.path, Measurement(target=target, device=str(state.device)))
    if report["words"] is not None:
        say("\n".join(sentence(name, measure) for name, measure in report["words"]["measures"].items()))
    say(f"report in {folder.path / REPORT}")


def _attempt(run: Run, data_sha256: str, tell: Callable[[str], None], *, resume: bool) -> bool:
    """Train, measure and write; False if there was not enough memory for passes of this size."""
    started = time.perf_counter()
    config, folder = run.config, run.folder
    checkpoint = _begin(run, resume=resume)
    run = _fit(run)
    tell(run.introduction())
    before = run.score(run.reported)
    tell(f"held-out text before: {run.reported.bits_per_byte(before):.4f} bits per byte")
    if checkpoint is not None:
        tell(f"going on from {checkpoint}")
    try:
        run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _take_smaller_passes(run)
        return False
    training = _describe_training(run.trainer, resumed=checkpoint is not None)
    held_out = compare(run.reported, before, run.score(run.reported), config.seed)
    weights = gather_trained(run.model, keep=run.state.is_main_process)
    if run.state.is_main_process:
        metrics: dict[str, Any] = {
            "model": config.model,
            "method": config.method.value,
            "held_out": held_out,
            "training": training,
        }
        metrics |= run.circumstances(data_sha256)
        metrics["seconds"] = time.perf_counter() - started
        held_out_texts = run.reported.prompt_of, run.reported.raw
        with clear_disk_errors(folder.path, "the result could not be written; the checkpoints are kept"):
            write_texts(folder.path, *held_out_texts, most=config.report.texts, seed=config.seed)
        folder.finish(
            metrics, partial(save_trained, run.model, config=config, tokenizer=run.tokenizer, weights=weights)
        )
        tell(_conclusion(metrics, folder))
    run.trainer.accelerator.end_training()
    return True


def _begin(run: Run, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, the same in every process."""
    from accelerate.utils import broadcast_object_list

    run.state.wait_for_everyone()  # until all have seen that the folder is free
    config_yaml = dump_config(run.config)
    chosen = [run.folder.begin(config_yaml, resume=resume) if run.state.is_main_process else None]
    return broadcast_object_list(chosen)[0] if run.state.num_processes > 1 else chosen[0]


def _fit(run: Run) -> Run:
    """The run with passes that fit into memory: as large as they were before it was killed, else found by trying."""
    rows = run.folder.noted_rows_per_pass()
    if rows is None and not run.is_sharded:
        rows = find_fitting(run.trainer, asked=run.rows_per_pass, share=run.share).rows
        if rows < run.rows_per_pass and run.state.is_main_process:
            run.folder.note_rows_per_pass(rows)
    return run if rows in (None, run.rows_per_pass) else run.with_rows_per_pass(rows)


def _take_smaller_passes(run: Run) -> None:
    """Note it for the next attempt.

    Raises:
        TrainingError: there is nothing smaller, or other processes are waiting for this one.
    """
    where = f"out of memory at step {run.trainer.state.global_step + 1} with {run.rows_per_pass} row(s) a pass"
    smaller = next(fewer_rows(run.rows_per_pass - 1, run.share), None)
    if smaller is None:
        raise TrainingError(f"{where}; lower data.max_length, choose a smaller model or set dtype=bfloat16")
    run.folder.note_rows_per_pass(smaller)
    if run.state.num_processes > 1:
        raise TrainingError(
            f"{where}; run the same command: it goes on from the last checkpoint with {smaller}", this_process_only=True
        )


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
        f"{metrics['seconds']:.0f} s in all; result in {folder.result}"
    )


def _stay_silent(_: str) -> None:
    """What the other processes have to say."""

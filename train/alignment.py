"""One alignment run, from its settings to an adapter or a model with its metrics and its report."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.config import dump_config
from terselm.errors import ConfigError, ModelError, TrainingError
from terselm.models import load_tokenizer
from terselm.progress import say
from terselm.train.callbacks import logged_as
from terselm.train.fitting import DryRunEstimate, fewer_rows, find_fitting, is_out_of_memory
from terselm.train.hardware import apply_engine, join_processes, pick_precision, quieten_libraries, share_out_cores
from terselm.train.held_out import HeldOutText, compare_scores, kept_overlap_with_target, score_held_out
from terselm.train.held_out_labels import (
    HeldOutLabels,
    UnitReadings,
    compare_rankers,
    rank_correlation,
    rankers_sentence,
    read_units,
)
from terselm.train.model import gather_trained, load_small_lm, make_trainable, save_trained
from terselm.train.provenance import describe_hardware, describe_versions, git_commit, weights_sha256
from terselm.train.report.measures import sentence
from terselm.train.report.report import (
    REPORT,
    ReportOptions,
    report_target,
    write_alignment_report,
    write_held_out_texts,
)
from terselm.train.run_folder import ADAPTER, MODEL, RunFolder, clear_disk_errors, run_key
from terselm.train.settings import AlignSettings, Metric, TrainingMethod
from terselm.train.surprisals import give_surprisals
from terselm.train.text_cache import RecordSource
from terselm.train.texts import Texts, combined_fingerprint, prepare_texts, read_sources
from terselm.train.trainer import AlignmentTrainer, schedule_rows, training_arguments

if TYPE_CHECKING:
    from accelerate import PartialState


def align(settings: AlignSettings, *, resume: bool = True, dry_run: bool = False) -> RunFolder:
    """Align ``settings.model`` to its records; does nothing if this very run has been finished.

    Every process of a distributed launch calls it; the first one alone writes.

    Args:
        settings: the run.
        resume: go on from the last whole checkpoint of the run folder, if it holds one; else begin anew.
        dry_run: only say how long it would take and how much memory; nothing is written.

    Raises:
        TerseLMError: a setting, the data, the model or the run folder is at fault; nothing was overwritten.
    """
    quieten_libraries()
    share_out_cores()
    sources = read_sources(settings.data)
    data_sha256 = combined_fingerprint(sources)
    key = run_key(dump_config(settings), data_sha256)
    folder = RunFolder(Path(settings.run_dir), key, MODEL if settings.method is TrainingMethod.FULL else ADAPTER)
    finished = folder.is_finished()
    state = join_processes()
    tell: Callable[[str], None] = say if state.is_main_process else lambda _: None
    if dry_run:
        tell(str(_estimate(prepare_run(settings, folder, state, sources))))
        return folder
    target = report_target(settings)
    if finished:
        tell(f"{folder.path} holds this very run, finished; nothing to do")
        state.wait_for_everyone()  # the first process must not be gone while the others still look for it
        if state.is_main_process and not (folder.path / REPORT).exists():
            _report(folder, target, state)
        return folder
    if target is not None and state.is_main_process:
        load_tokenizer(target)  # better to know now than after the training
    while not _attempt(prepare_run(settings, folder, state, sources), data_sha256, tell, resume=resume):
        tell("out of memory: going on with smaller passes")
        resume = True
    if state.is_main_process:
        _report(folder, target, state)
    return folder


def _report(folder: RunFolder, target: str | None, state: PartialState) -> None:
    """Write the report, and say the part of it that has not been said yet."""
    gc.collect()  # the trained model, in whose place others are read
    report = write_alignment_report(folder.path, ReportOptions(target=target, device=str(state.device)))
    if report["words"] is not None:
        say("\n".join(sentence(name, measure) for name, measure in report["words"]["measures"].items()))
    say(f"report in {folder.path / REPORT}")


def _attempt(run: AlignmentRun, data_sha256: str, tell: Callable[[str], None], *, resume: bool) -> bool:
    """Train, measure and write; False if there was not enough memory for passes of this size."""
    started = time.perf_counter()
    settings, folder = run.settings, run.folder
    checkpoint = _begin(run, resume=resume)
    run = _fit(run)
    tell(run.introduction())
    before = run.score(run.reported)
    units_before = run.read_units(run.reported_labels) if run.scores_units else None
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
    trainer = run.trainer
    training = {
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "seconds": trainer.progress.seconds,
        "tokens_per_second": trainer.progress.tokens_per_second(trainer.state),
        "resumed": checkpoint is not None,
    }
    held_out = compare_scores(run.reported, before, run.score(run.reported), settings.seed)
    utility = {}
    if units_before is not None:
        after = run.read_units(run.reported_labels)
        utility = {"utility": compare_rankers(run.reported_labels, units_before, after, settings.seed)}
    weights = gather_trained(run.model, keep=run.state.is_main_process)
    if run.state.is_main_process:
        metrics: dict[str, Any] = {"model": settings.model, "method": settings.method.value}
        metrics |= {"held_out": held_out, **utility, "training": training, **run.circumstances(data_sha256)}
        metrics["seconds"] = time.perf_counter() - started
        held_out_texts = run.reported.prompt_of, run.reported.raw
        with clear_disk_errors(folder.path, "the result could not be written; the checkpoints are kept"):
            write_held_out_texts(folder.path, *held_out_texts, most=settings.report.texts, seed=settings.seed)
        save = partial(save_trained, run.model, settings=settings, tokenizer=run.tokenizer, weights=weights)
        folder.finish(metrics, partial(save, facts=run.head_facts()))
        tell(_conclusion(metrics, folder))
    run.trainer.accelerator.end_training()
    return True


def _begin(run: AlignmentRun, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, the same in every process."""
    from accelerate.utils import broadcast_object_list

    run.state.wait_for_everyone()  # until all have seen that the folder is free
    config_yaml = dump_config(run.settings)
    chosen = [run.folder.begin(config_yaml, resume=resume) if run.state.is_main_process else None]
    return broadcast_object_list(chosen)[0] if run.state.num_processes > 1 else chosen[0]


def _fit(run: AlignmentRun) -> AlignmentRun:
    """The run with passes that fit into memory: as large as they were before it was killed, else found by trying."""
    rows = run.folder.noted_rows_per_pass()
    if rows is None and not run.is_sharded:
        rows = find_fitting(run.trainer, asked=run.rows_per_pass, share=run.share).rows
        if rows < run.rows_per_pass and run.state.is_main_process:
            run.folder.note_rows_per_pass(rows)
    return run if rows in (None, run.rows_per_pass) else run.with_rows_per_pass(rows)


def _take_smaller_passes(run: AlignmentRun) -> None:
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


def _estimate(run: AlignmentRun) -> DryRunEstimate:
    """Try a pass and reckon from it.

    Raises:
        ConfigError: the model would be sharded.
        TrainingError: not even one row fits into memory.
    """
    if run.is_sharded:
        raise ConfigError("--dry-run cannot try a sharded model; use it with one process or with DDP")
    for folder in (run.folder.checkpoints, run.folder.path):  # the Trainer makes them before there is anything in them
        with suppress(OSError):
            folder.rmdir()
    cost = find_fitting(run.trainer, asked=run.rows_per_pass, share=run.share, repeat=True)
    scored_tokens = 2 * run.reported.text.tokens
    if run.choosing is not None:
        scored_tokens += math.ceil(run.compute["steps"] / run.settings.evaluation.every) * run.choosing.text.tokens
    return DryRunEstimate(
        steps=run.compute["steps"],
        passes=run.share // cost.rows,
        cost=cost,
        scored_rows=scored_tokens / run.texts.row_length / run.state.num_processes,
        device=run.compute["device"],
    )


def _conclusion(metrics: dict[str, Any], folder: RunFolder) -> str:
    held_out, training = metrics["held_out"], metrics["training"]
    difference = held_out["difference"]
    low, high = difference["bits_per_byte_interval"]
    utility = f"{rankers_sentence(metrics['utility'])}\n" if "utility" in metrics else ""
    return utility + (
        f"held-out text after: {held_out['after']['bits_per_byte']:.4f} bits per byte, "
        f"{difference['bits_per_byte']:+.4f} (95% interval {low:+.4f} to {high:+.4f})\n"
        f"{training['tokens_seen']:,} tokens at {training['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['seconds']:.0f} s in all; result in {folder.result}"
    )


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """All that training and scoring need.

    Attributes:
        reported: held-out text of the report.
        choosing: held-out text that the best weights are chosen by, if any are.
        reported_labels, choosing_labels: held-out labelled prompts, likewise.
    """

    settings: AlignSettings
    folder: RunFolder
    state: PartialState
    model: Any
    tokenizer: Any
    texts: Texts
    reported: HeldOutText
    choosing: HeldOutText | None
    reported_labels: HeldOutLabels
    choosing_labels: HeldOutLabels | None
    trainer: AlignmentTrainer
    base: dict[str, str]
    compute: dict[str, Any]

    def __post_init__(self) -> None:
        """Let the trainer choose the best weights by the held-out text that was set apart for it."""
        if self.settings.metric is Metric.UTILITY and (labels := self.choosing_labels) is not None:
            self.trainer.choose_by = lambda: rank_correlation(labels, self.read_units(labels).scores)
        elif (chosen := self.choosing) is not None and self.settings.metric is Metric.KEPT_OVERLAP:
            self.trainer.choose_by = lambda: kept_overlap_with_target(self.model, chosen, **self._passes())
        elif chosen is not None:
            self.trainer.choose_by = lambda: chosen.bits_per_byte(self.score(chosen))

    @property
    def rows_per_pass(self) -> int:
        return int(self.trainer.args.per_device_train_batch_size)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parts of the model, so that none can compute by itself."""
        return bool(self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    @property
    def share(self) -> int:
        """Rows of each step that fall to one process."""
        return self.settings.optimisation.rows_per_step // int(self.state.num_processes)

    def score(self, held_out: HeldOutText) -> NDArray[np.float64]:
        """Nats of held-out text, ``(prompts,)``.

        Raises:
            ModelError: they are not finite.
        """
        nats = score_held_out(self.model, held_out, **self._passes())
        if not np.isfinite(nats).all():
            raise ModelError(
                f"{self.settings.model!r} gives held-out text a probability of zero or NaN; its weights may be "
                "damaged, or dtype too narrow for it: try dtype=float32"
            )
        return nats

    @property
    def scores_units(self) -> bool:
        """Whether a head is trained, and there are held-out labels to see what it has learnt."""
        return self.settings.objective.utility > 0 and len(self.reported_labels) > 0

    def read_units(self, labels: HeldOutLabels) -> UnitReadings:
        """Scores and surprisals of the units of held-out labelled prompts."""
        return read_units(self.model, labels, **self._passes())

    def _passes(self) -> dict[str, int]:
        """How held-out text is read, and by which process."""
        return {
            "row_length": self.texts.row_length,
            "rows_per_pass": self.settings.evaluation.rows_per_pass,
            "rank": self.state.process_index,
            "processes": self.state.num_processes,
        }

    def head_facts(self) -> dict[str, str]:
        """What a utility head belongs to, and what it is for."""
        return {"base": self.settings.model, "target": ", ".join(self.texts.label_targets)}

    def with_rows_per_pass(self, rows: int) -> AlignmentRun:
        """The same run in smaller or larger passes."""
        settings = replace(self.settings, optimisation=replace(self.settings.optimisation, rows_per_pass=rows))
        schedule = self.trainer.train_dataset
        arguments = training_arguments(settings, self.folder, rows=len(schedule), processes=self.state.num_processes)
        return replace(self, trainer=AlignmentTrainer(self.model, arguments, schedule, self.folder, settings))

    def circumstances(self, data_sha256: str) -> dict[str, Any]:
        """What the result came from, and the loss by step."""
        history, mixture = self.trainer.state.log_history, self.settings.data.mixture
        sources: dict[str, Any] = {"records": " + ".join(mixture) or self.settings.data.records}
        if mixture:
            sources["mixture"] = mixture
        return {
            "data": {**sources, "sha256": data_sha256, **self.texts.describe()},
            "base": self.base,
            "compute": {**self.compute, "rows_per_pass": self.rows_per_pass},
            "versions": describe_versions(),
            "hardware": describe_hardware(),
            "git_commit": git_commit(),
            "loss_history": [entry for entry in history if "loss" in entry],
            "choice_history": [entry for entry in history if logged_as(self.settings.metric) in entry],
        }

    def introduction(self) -> str:
        data, compute = self.texts.describe(), self.compute
        held_out = self.reported
        lines = [
            f"{self.settings.model} on {compute['device']} in {compute['dtype']}, {compute['processes']} process(es), "
            f"{compute['trainable_parameters']:,} trainable parameters",
            f"{data['training_records']:,} records, {data['training_tokens']:,} tokens ({data['counted_tokens']:,} "
            f"counted) in {data['rows']:,} rows, {data['real_token_share']:.1%} of them real; "
            f"{compute['steps']} steps of {self.settings.optimisation.rows_per_step} rows",
            f"held out: {len(held_out.prompt_of):,} records to {len(held_out.tokens):,} prompts, "
            f"{int(held_out.tokens.sum()):,} tokens to score",
        ]
        if self.rows_per_pass < (planned := self.settings.optimisation.rows_per_pass):
            lines.append(
                f"memory holds {self.rows_per_pass} row(s) a pass instead of {planned}; the steps are the same"
            )
        if data.get("without_order"):
            lines.append(f"{data['without_order']} labelled prompts are left out: their units are all worth the same")
        if data["overlong_split"] or data["overlong_dropped"]:
            lines.append(
                f"longer than {self.texts.row_length} tokens: {data['overlong_split']} records split, "
                f"{data['overlong_dropped']} dropped"
            )
        return "\n".join(lines)


def prepare_run(
    settings: AlignSettings, folder: RunFolder, state: PartialState, sources: list[RecordSource]
) -> AlignmentRun:
    """Load, read and build; writes nothing."""
    from accelerate.utils import set_seed

    precision = pick_precision(settings.dtype, state.device)
    dtype = str(precision).removeprefix("torch.")
    lm = load_small_lm(settings, state.device, precision)
    texts = prepare_texts(settings, lm, sources)
    schedule = schedule_rows(texts.rows, settings)
    arguments = training_arguments(settings, folder, rows=len(schedule), processes=state.num_processes)
    give_surprisals(lm.model, autocast=None if precision == torch.float32 else precision)
    base = {"name": settings.model, "dtype": dtype}
    if settings.method is not TrainingMethod.QLORA:  # rounded weights tell nothing of those that are merged into
        base["weights_sha256"] = weights_sha256(lm.model, precision)
    set_seed(settings.seed)  # the adapter's first values
    model = make_trainable(lm.model, settings)
    apply_engine(lm.model, settings.engine)
    compute = {
        "device": state.device.type,
        "dtype": dtype,
        "processes": state.num_processes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": arguments.max_steps,
    }
    choosing, reported = texts.held_out.halves(settings.seed) if settings.evaluation.every else (None, texts.held_out)
    choosing_labels, reported_labels = None, texts.labels
    if settings.evaluation.every and settings.objective.utility:
        choosing_labels, reported_labels = texts.labels.halves(settings.seed)
    return AlignmentRun(
        settings=settings,
        folder=folder,
        state=state,
        model=model,
        tokenizer=lm.tokenizer,
        texts=texts,
        reported=reported,
        choosing=choosing,
        reported_labels=reported_labels,
        choosing_labels=choosing_labels,
        trainer=AlignmentTrainer(model, arguments, schedule, folder, settings),
        base=base,
        compute=compute,
    )

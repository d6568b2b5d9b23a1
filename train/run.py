"""One run in memory: model, text and trainer, and what can be said of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.errors import ModelError
from terselm.train.callbacks import MEASURE
from terselm.train.choices import Method
from terselm.train.config import AlignConfig
from terselm.train.evaluation import HeldOutText, score
from terselm.train.hardware import describe_hardware, describe_versions, pick_precision
from terselm.train.provenance import git_commit, weights_sha256
from terselm.train.run_folder import RunFolder
from terselm.train.scoring import score_instead_of_logits
from terselm.train.small_lm import load_small_lm, make_trainable
from terselm.train.sources import Source
from terselm.train.speed import tune
from terselm.train.texts import Texts, read_texts
from terselm.train.trainer import AlignmentTrainer, schedule_rows, training_arguments

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that training and scoring need.

    Attributes:
        reported: held-out text of the report.
        choosing: held-out text that the best weights are chosen by, if any are.
    """

    config: AlignConfig
    folder: RunFolder
    state: PartialState
    model: Any
    tokenizer: Any
    texts: Texts
    reported: HeldOutText
    choosing: HeldOutText | None
    trainer: AlignmentTrainer
    base: dict[str, str]
    compute: dict[str, Any]

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
        return self.config.optimisation.rows_per_step // int(self.state.num_processes)

    def score(self, held_out: HeldOutText) -> NDArray[np.float64]:
        """Nats of held-out text, ``(prompts,)``.

        Raises:
            ModelError: they are not finite.
        """
        nats = score(
            self.model,
            held_out,
            row_length=self.texts.row_length,
            rows_per_pass=self.config.evaluation.rows_per_pass,
            rank=self.state.process_index,
            processes=self.state.num_processes,
        )
        if not np.isfinite(nats).all():
            raise ModelError(
                f"{self.config.model!r} gives held-out text a probability of zero or NaN; its weights may be damaged, "
                "or dtype too narrow for it: try dtype=float32"
            )
        return nats

    def with_rows_per_pass(self, rows: int) -> Run:
        """The same run in smaller or larger passes."""
        config = replace(self.config, optimisation=replace(self.config.optimisation, rows_per_pass=rows))
        schedule = self.trainer.train_dataset
        arguments = training_arguments(config, self.folder, rows=len(schedule), processes=self.state.num_processes)
        trainer = AlignmentTrainer(self.model, arguments, schedule, self.folder, config)
        return replace(self, trainer=trainer).choosing_best()

    def choosing_best(self) -> Run:
        """Let the trainer choose the best weights by the held-out text that was set apart for it."""
        if (chosen := self.choosing) is not None:
            self.trainer.choose_by = lambda: chosen.bits_per_byte(self.score(chosen))
        return self

    def circumstances(self, data_sha256: str) -> dict[str, Any]:
        """What the result came from, and the loss by step."""
        history = self.trainer.state.log_history
        return {
            "data": {**self._sources(), "sha256": data_sha256, **self.texts.describe()},
            "base": self.base,
            "compute": {**self.compute, "rows_per_pass": self.rows_per_pass},
            "versions": describe_versions(),
            "hardware": describe_hardware(),
            "git_commit": git_commit(),
            "loss_history": [entry for entry in history if "loss" in entry],
            "choice_history": [entry for entry in history if MEASURE in entry],
        }

    def _sources(self) -> dict[str, Any]:
        mixture = self.config.data.mixture
        return (
            {"records": " + ".join(mixture), "mixture": mixture} if mixture else {"records": self.config.data.records}
        )

    def introduction(self) -> str:
        data, compute = self.texts.describe(), self.compute
        held_out = self.reported
        lines = [
            f"{self.config.model} on {compute['device']} in {compute['dtype']}, {compute['processes']} process(es), "
            f"{compute['trainable_parameters']:,} trainable parameters",
            f"{data['training_records']:,} records, {data['training_tokens']:,} tokens ({data['counted_tokens']:,} "
            f"counted) in {data['rows']:,} rows, {data['real_token_share']:.1%} of them real; "
            f"{compute['steps']} steps of {self.config.optimisation.rows_per_step} rows",
            f"held out: {len(held_out.prompt_of):,} records to {len(held_out.tokens):,} prompts, "
            f"{int(held_out.tokens.sum()):,} tokens to score",
        ]
        if self.rows_per_pass < self.config.optimisation.rows_per_pass:
            lines.append(
                f"memory holds {self.rows_per_pass} row(s) a pass instead of {self.config.optimisation.rows_per_pass}; "
                "the steps are the same"
            )
        if data["overlong_split"] or data["overlong_dropped"]:
            lines.append(
                f"longer than {self.texts.row_length} tokens: {data['overlong_split']} records split, "
                f"{data['overlong_dropped']} dropped"
            )
        return "\n".join(lines)


def prepare(config: AlignConfig, folder: RunFolder, state: PartialState, sources: list[Source]) -> Run:
    """Load, read and build; writes nothing."""
    from accelerate.utils import set_seed

    precision = pick_precision(config.dtype, state.device)
    dtype = str(precision).removeprefix("torch.")
    lm = load_small_lm(config, state.device, precision)
    texts = read_texts(config, lm, sources)
    schedule = schedule_rows(texts.rows, config)
    arguments = training_arguments(config, folder, rows=len(schedule), processes=state.num_processes)
    score_instead_of_logits(lm.model, autocast=None if precision == torch.float32 else precision)
    base = {"name": config.model, "dtype": dtype}
    if config.method is not Method.QLORA:  # rounded weights tell nothing of those that an adapter is merged into
        base["weights_sha256"] = weights_sha256(lm.model, precision)
    set_seed(config.seed)  # the adapter's first values
    model = make_trainable(lm.model, config)
    tune(lm.model, config.engine)
    compute = {
        "device": state.device.type,
        "dtype": dtype,
        "processes": state.num_processes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": arguments.max_steps,
    }
    choosing, reported = None, texts.held_out
    if config.evaluation.every:
        choosing, reported = texts.held_out.halves(config.seed)
    return Run(
        config=config,
        folder=folder,
        state=state,
        model=model,
        tokenizer=lm.tokenizer,
        texts=texts,
        reported=reported,
        choosing=choosing,
        trainer=AlignmentTrainer(model, arguments, schedule, folder, config),
        base=base,
        compute=compute,
    ).choosing_best()

"""One alignment in memory: train, and what the model makes of held-out text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from alignment_quality.texts import HeldOut
from numpy.typing import NDArray

from terselm.models import CausalLM, load_causal_lm
from terselm.train.examples import Example
from terselm.train.hardware import apply_engine
from terselm.train.model import add_adapter
from terselm.train.objectives import Mixture, by_word
from terselm.train.packing import MODEL_INPUTS, pack_examples
from terselm.train.run_folder import RunFolder
from terselm.train.settings import (
    AlignSettings,
    DataSettings,
    EngineSettings,
    LoraSettings,
    LossOn,
    ObjectiveSettings,
    OptimisationSettings,
)
from terselm.train.surprisals import give_surprisals
from terselm.train.trainer import AlignmentTrainer, Collator, schedule_rows, training_arguments

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compared."""

    objective: ObjectiveSettings
    loss_on: LossOn = LossOn.RESPONSE
    text: tuple[str, ...] = ("given",)
    """Kinds of text that are trained on; see `texts.Kind`."""
    rank: int = 32
    all_weights: bool = False
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The same for all variants."""

    tokens: int
    row_length: int = 1024
    rows_per_step: int = 16
    rows_per_pass: int = 16
    compile: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a model makes of held-out texts.

    Attributes:
        words: the surprisal of every word, nats, one array a text.
        nats: ``(texts,)``, of each response.
    """

    words: list[Floats]
    nats: Floats


def align(
    name: str, variant: Variant, budget: Budget, text: Sequence[Example], seed: int
) -> tuple[CausalLM, Any, dict[str, Any]]:
    """The small LM, its model with the adapter on it, both aligned, and what training took."""
    lm = open_small(name, "float32" if variant.all_weights else "auto")
    if variant.loss_on is LossOn.ALL:
        text = [replace(example, counted=np.arange(len(example)) > 0) for example in text]
    rows = pack_examples(text, budget.row_length)
    steps = max(1, budget.tokens // (budget.rows_per_step * budget.row_length))
    config = AlignSettings(
        data=DataSettings(max_length=budget.row_length),
        objective=variant.objective,
        lora=LoraSettings(rank=variant.rank, alpha=2 * variant.rank),
        optimisation=OptimisationSettings(
            epochs=steps * budget.rows_per_step / len(rows),
            rows_per_step=budget.rows_per_step,
            rows_per_pass=budget.rows_per_pass,
            learning_rate=variant.learning_rate,
        ),
        engine=EngineSettings(compile=budget.compile),
        log_every=50,
        save_every=10**9,
        seed=seed,
    )
    set_seed(seed)
    model = lm.model.train() if variant.all_weights else add_adapter(lm.model, config.lora)
    torch.compiler.reset()  # what was compiled for the variant before counts against a limit
    apply_engine(lm.model, config.engine)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch), "benchmark")
        schedule = schedule_rows(rows, config)
        arguments = training_arguments(config, folder, rows=len(schedule), processes=1)
        trainer = AlignmentTrainer(model, arguments, schedule, folder, config)
        trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    took = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": trainer.progress.seconds,
        "loss": history,
    }
    return lm, model, took


def open_small(name: str, dtype: str = "auto") -> CausalLM:
    """The small LM as it is, giving surprisals in place of logits; bfloat16 on a GPU."""
    device = PartialState().device
    half = device.type == "cuda"
    lm = load_causal_lm(
        name, device=str(device), dtype=("bfloat16" if half else "float32") if dtype == "auto" else dtype
    )
    give_surprisals(lm.model, autocast=torch.bfloat16 if half else None)
    return lm


@torch.no_grad()
def read(model: Any, texts: HeldOut, budget: Budget) -> Reading:
    """What the model makes of the texts of a domain."""
    model.eval()
    objective = Mixture.of(ObjectiveSettings(nll=1, matching=1, target="it"))
    collator = Collator(objective=objective, width=budget.row_length)
    device = next(model.parameters()).device
    words, nats = [], []
    for start in range(0, len(texts.examples), budget.rows_per_pass):
        some = texts.examples[start : start + budget.rows_per_pass]
        batch = {name: tensor.to(device) for name, tensor in collator([[text] for text in some]).items()}
        surprisals = model(**{name: batch[name] for name in MODEL_INPUTS})
        counts = [len(text.guide.nats) for text in some if text.guide is not None]
        words += [part.double().cpu().numpy() for part in torch.split(by_word(surprisals, batch), counts)]
        tokens = [int(objective.reads(text).sum()) for text in some]
        nats += [float(part.double().sum()) for part in torch.split(surprisals * batch["counted"], tokens)]
    return Reading(words=words, nats=np.asarray(nats))


def save(lm: CausalLM, model: Any, folder: Path) -> None:
    """The aligned model as a folder that the compressor loads."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.to(torch.bfloat16).save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)

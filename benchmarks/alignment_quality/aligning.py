"""One alignment in memory: train, and the words' surprisals of held-out text before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from numpy.typing import NDArray

from terselm.data.records import Record
from terselm.models import CausalLM, load_causal_lm
from terselm.train.batches import MODEL_INPUTS, Collator
from terselm.train.choices import LossOn, Overlong, Template
from terselm.train.config import (
    AlignConfig,
    DataSettings,
    EngineSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimisationSettings,
)
from terselm.train.examples import Encoding, Example, encode
from terselm.train.guidance import Target
from terselm.train.lora import add_adapter
from terselm.train.objectives import Mixture
from terselm.train.objectives.words import by_word
from terselm.train.packing import pack
from terselm.train.run_folder import RunFolder
from terselm.train.scoring import score_instead_of_logits
from terselm.train.speed import tune
from terselm.train.trainer import AlignmentTrainer, schedule_rows, training_arguments

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compared."""

    objective: ObjectiveSettings
    loss_on: LossOn = LossOn.RESPONSE
    text: str = "given"
    """``given``: the training text; ``generated``: the target's own output to the same prompts."""
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


@dataclass(kw_only=True)
class Bench:
    """The small LM's name, the target, and everything that is encoded once."""

    model: str
    target: CausalLM
    budget: Budget
    generated: list[Record] = field(default_factory=list)
    _encoded: dict[str, list[Example]] = field(default_factory=dict)

    def encode(self, name: str, records: Sequence[Record]) -> list[Example]:
        """With the target's opinion on every word; encoded once by name."""
        if name not in self._encoded:
            small = load_causal_lm(self.model, device="cpu")
            self._encoded[name] = list(encode(records, self._encoding(small)).examples)
        return self._encoded[name]

    def _encoding(self, small: CausalLM) -> Encoding:
        return Encoding(
            tokenizer=small.tokenizer,
            start_id=small.start_id,
            end_id=None,
            template=Template.RAW,
            loss_on=LossOn.RESPONSE,
            max_length=self.budget.row_length,
            overlong=Overlong.SPLIT,
            target=Target(self.target, 0, small.tokenizer),
        )


def align(bench: Bench, variant: Variant, text: Sequence[Example], seed: int) -> tuple[Any, dict[str, Any]]:
    """The aligned model and what training took."""
    device = PartialState().device
    half = device.type == "cuda"
    dtype = "bfloat16" if half and not variant.all_weights else "float32"
    lm = load_causal_lm(bench.model, device=str(device), dtype=dtype)
    score_instead_of_logits(lm.model, autocast=torch.bfloat16 if half else None)
    if variant.loss_on is LossOn.ALL:
        text = [replace(example, counted=np.arange(len(example)) > 0) for example in text]
    rows = pack(text, bench.budget.row_length)
    steps = max(1, bench.budget.tokens // (bench.budget.rows_per_step * bench.budget.row_length))
    config = AlignConfig(
        data=DataSettings(max_length=bench.budget.row_length),
        objective=variant.objective,
        lora=LoraSettings(rank=variant.rank, alpha=2 * variant.rank),
        optimisation=OptimisationSettings(
            epochs=steps * bench.budget.rows_per_step / len(rows),
            rows_per_step=bench.budget.rows_per_step,
            rows_per_pass=bench.budget.rows_per_pass,
            learning_rate=variant.learning_rate,
        ),
        engine=EngineSettings(compile=bench.budget.compile),
        log_every=50,
        save_every=10**9,
        seed=seed,
    )
    set_seed(seed)
    model = lm.model.train() if variant.all_weights else add_adapter(lm.model, config.lora)
    torch.compiler.reset()  # what was compiled for the variant before counts against a limit
    tune(lm.model, config.engine)
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
    return model, took


def base(bench: Bench) -> Any:
    """The small LM as it is."""
    device = PartialState().device
    half = device.type == "cuda"
    lm = load_causal_lm(bench.model, device=str(device), dtype="bfloat16" if half else "float32")
    score_instead_of_logits(lm.model, autocast=torch.bfloat16 if half else None)
    return lm.model


@torch.no_grad()
def words(model: Any, texts: Sequence[Example], budget: Budget) -> list[Floats]:
    """Surprisal of every word under the model, one array a text."""
    model.eval()
    collator = Collator(
        objective=Mixture.of(ObjectiveSettings(nll=0, matching=1, target="it")), width=budget.row_length
    )
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(texts), budget.rows_per_pass):
        some = texts[start : start + budget.rows_per_pass]
        batch = {name: tensor.to(device) for name, tensor in collator([[text] for text in some]).items()}
        surprisals = model(**{name: batch[name] for name in MODEL_INPUTS})
        counts = [len(text.guide.nats) for text in some if text.guide is not None]
        found += [part.double().cpu().numpy() for part in torch.split(by_word(surprisals, batch), counts)]
    return found


def target_words(texts: Sequence[Example]) -> list[Floats]:
    return [text.guide.nats.astype(np.float64) for text in texts if text.guide is not None]

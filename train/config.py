"""Every setting of an alignment run, with its unit; see ``configs/align/`` for whole examples."""

from __future__ import annotations

from dataclasses import dataclass, field

from terselm.errors import ConfigError
from terselm.train.choices import Initialisation, LossOn, Method, Overlong, Precision, Schedule, Template, Tracker


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learnt from, and what is held out."""

    records: str = "data/sample/records.jsonl"
    """The target's output: a JSON Lines, Parquet, JSON or CSV file, a folder of a data set, or ``hub:OWNER/NAME``."""
    mixture: dict[str, float] = field(default_factory=dict)
    """In place of ``records``: sources, and how often an epoch sees each of their records. 2 is twice; 0.5 is half of
    them, drawn once."""
    max_length: int = 1024
    """Tokens in a packed row, the start token of each record included."""
    overlong: Overlong = Overlong.SPLIT
    """What becomes of a record longer than ``max_length``."""

    def __post_init__(self) -> None:
        _refuse(
            (not self.records.strip(), "data.records is empty; expected a file, a folder or hub:OWNER/NAME"),
            *(
                (not 0 < times < 1000, f"data.mixture gives {name!r} the weight {times}; expected 0 to 1000, not 0")
                for name, times in self.mixture.items()
            ),
            (self.max_length < 8, f"data.max_length is {self.max_length}; expected at least 8 tokens"),
        )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on every linear layer but the output head (arXiv:2106.09685)."""

    rank: int = 16
    """r of the paper."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero, in [0, 1)."""
    rank_stabilised: bool = False
    """The update is scaled by alpha / √rank instead (arXiv:2312.03732), for ranks far above 16."""
    weight_decomposed: bool = False
    """DoRA (arXiv:2402.09353): the length of each row of weights is learnt apart from its direction; slower."""
    initialisation: Initialisation = Initialisation.ZERO
    """First values."""

    def __post_init__(self) -> None:
        _refuse(
            (self.rank < 1, f"lora.rank is {self.rank}; expected at least 1"),
            (not self.alpha > 0, f"lora.alpha is {self.alpha}; expected more than 0"),
            (not 0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; expected at least 0 and below 1"),
            (
                self.weight_decomposed and self.changes_base,
                f"lora.weight_decomposed and lora.initialisation={self.initialisation} both change what the base "
                "stands for; choose one of them",
            ),
        )

    @property
    def changes_base(self) -> bool:
        """Whether the first values of the adapter are taken away from the weights of the base."""
        return self.initialisation in (Initialisation.PISSA, Initialisation.OLORA)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What is minimised: a weighted sum, each part a mean over its own units."""

    nll: float = 1.0
    """Weight of −log p of the counted tokens: all that can be learnt from text alone."""
    matching: float = 0.0
    """Weight of surprisal matching: smooth-L1 between the surprisals of words under small LM and target."""
    ranking: float = 0.0
    """Weight of ranking the words that the target would keep above those that it would drop."""
    divergence: float = 0.0
    """Weight of the KL divergence from the target's likeliest tokens; small LM and target share a vocabulary."""
    target: str = ""
    """The target LLM if it can be loaded here (an alias, a folder or a hub id): it reads the texts before training."""
    log_probabilities: str = ""
    """Parquet file of the target's log-probabilities of the records' texts, where it cannot be loaded."""
    top_k: int = 32
    """Likeliest tokens that ``divergence`` compares."""
    turning_point: float = 1.0
    """Nats at which ``matching`` turns from squared to absolute error."""
    near_threshold: float = 0.0
    """Extra weight of the words that the target would hardly keep or hardly drop, in ``matching``."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("nll", "matching", "ranking", "divergence")}
        asks = [f"objective.{name}" for name in ("matching", "ranking", "divergence") if weights[name] > 0]
        _refuse(
            *((weight < 0, f"objective.{name} is {weight}; expected at least 0") for name, weight in weights.items()),
            (not any(weights.values()), "all weights of objective are 0; expected one above 0"),
            (
                bool(asks) and bool(self.target) == bool(self.log_probabilities),
                f"{', '.join(asks)} compares with the target; set objective.target to a model that can be loaded here, "
                "or objective.log_probabilities to a file of what it thinks",
            ),
            (self.top_k < 1, f"objective.top_k is {self.top_k}; expected at least 1"),
            (not self.turning_point > 0, f"objective.turning_point is {self.turning_point}; expected more than 0"),
            (self.near_threshold < 0, f"objective.near_threshold is {self.near_threshold}; expected at least 0"),
        )

    @property
    def compares(self) -> bool:
        """Whether the target's opinion on each text is needed."""
        return self.matching > 0 or self.ranking > 0 or self.divergence > 0


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings:
    """AdamW and its schedule."""

    epochs: float = 1.0
    """Passes over the training rows; rounded to whole steps, at least one."""
    rows_per_step: int = 8
    """Packed rows in one optimiser step, over all processes."""
    rows_per_pass: int = 1
    """Packed rows that one process takes through the model at once."""
    learning_rate: float = 2e-4
    """Its peak."""
    schedule: Schedule = Schedule.COSINE
    """The learning rate after warm-up."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises to its peak, in [0, 1]."""
    weight_decay: float = 0.0
    """AdamW's, per unit of learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this Euclidean norm; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        _refuse(
            (not self.epochs > 0, f"optimisation.epochs is {self.epochs}; expected more than 0"),
            (self.rows_per_step < 1, f"optimisation.rows_per_step is {self.rows_per_step}; expected at least 1"),
            (self.rows_per_pass < 1, f"optimisation.rows_per_pass is {self.rows_per_pass}; expected at least 1"),
            (
                not 0 < self.learning_rate < 1,
                f"optimisation.learning_rate is {self.learning_rate}; expected more than 0 and below 1",
            ),
            (not 0 <= self.warmup <= 1, f"optimisation.warmup is {self.warmup}; expected a share in [0, 1]"),
            (self.weight_decay < 0, f"optimisation.weight_decay is {self.weight_decay}; expected at least 0"),
            (self.max_grad_norm < 0, f"optimisation.max_grad_norm is {self.max_grad_norm}; expected at least 0"),
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How fast, and in how much memory; changes no result but by rounding."""

    compile: bool = False
    """Compile the decoder layers: ten to twenty seconds at the start, on GPUs alone; twice as fast after that."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass: a third slower, in a fraction of the memory."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Held-out text, scored before and after."""

    held_out: float = 0.1
    """Expected share of the prompts that is never trained on, in (0, 1)."""
    rows_per_pass: int = 4
    """Packed rows that one process scores at once."""
    every: int = 0
    """Optimiser steps between two scorings that choose the best weights; 0 keeps the last. Half of the held-out
    prompts then choose, and only the other half is reported on."""
    patience: int = 0
    """Scorings in a row without a new best after which training ends; 0 never ends early."""

    def __post_init__(self) -> None:
        _refuse(
            (
                not 0 < self.held_out < 1,
                f"evaluation.held_out is {self.held_out}; expected a share above 0 and below 1",
            ),
            (self.rows_per_pass < 1, f"evaluation.rows_per_pass is {self.rows_per_pass}; expected at least 1"),
            (self.every < 0, f"evaluation.every is {self.every}; expected a number of steps, or 0"),
            (self.patience < 0, f"evaluation.patience is {self.patience}; expected a number of scorings, or 0"),
            (self.patience > 0 and not self.every, "evaluation.patience needs evaluation.every; set it to some steps"),
        )


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the report compares with, besides bits per byte."""

    target: str = ""
    """The target LLM, if it can be loaded here: an alias, a folder or a hub id; else empty."""
    texts: int = 200
    """Held-out texts whose words are compared with the target's, at most."""

    def __post_init__(self) -> None:
        _refuse((self.texts < 1, f"report.texts is {self.texts}; expected at least 1"))


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """One alignment run."""

    model: str = "smollm2-135m"
    """The small LM: an alias, a folder or a hub id."""
    run_dir: str = "runs/align"
    """Folder for the adapter or the model, the metrics and the checkpoints."""
    method: Method = Method.LORA
    """What is trained; ``lora`` holds the settings of the adapters."""
    data: DataSettings = field(default_factory=DataSettings)
    template: Template = Template.RAW
    """How a record becomes text."""
    loss_on: LossOn = LossOn.RESPONSE
    """Which tokens the loss counts; held-out text is always scored on the response."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    tracker: Tracker = Tracker.AUTO
    """Where the loss and the scores are sent while the run goes on."""
    dtype: Precision = Precision.AUTO
    """Number format of the frozen weights and the matrix products."""
    seed: int = 0
    """Of the held-out split, the order of the rows, and the adapter's first values."""
    log_every: int = 5
    """Optimiser steps between two entries of the loss history."""
    save_every: int = 50
    """Optimiser steps between two checkpoints."""

    def __post_init__(self) -> None:
        _refuse(
            (not self.model.strip(), "model is empty; expected an alias, a folder or a hub id"),
            (not self.run_dir.strip(), "run_dir is empty; expected a folder"),
            (
                self.method is Method.QLORA and self.lora.changes_base,
                f"lora.initialisation={self.lora.initialisation} decomposes weights, which method=qlora rounds to 4 "
                "bits; choose zero, gaussian or orthogonal",
            ),
            (self.seed < 0, f"seed is {self.seed}; expected at least 0"),
            (self.log_every < 1, f"log_every is {self.log_every}; expected at least 1 step"),
            (self.save_every < 1, f"save_every is {self.save_every}; expected at least 1 step"),
        )


def _refuse(*checks: tuple[bool, str]) -> None:
    """Raise one ConfigError that reports every check whose condition holds."""
    if problems := [message for wrong, message in checks if wrong]:
        raise ConfigError("; ".join(problems))

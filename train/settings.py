"""Every setting of an alignment run, with its unit and what it can be; ``configs/align/`` has whole examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from terselm.config import refuse

_Bound = tuple[Callable[[float], bool], str]
_FROM_0: _Bound = (lambda value: value >= 0, "at least 0")
_FROM_1: _Bound = (lambda value: value >= 1, "at least 1")
_ABOVE_0: _Bound = (lambda value: value > 0, "more than 0")
_BELOW_1: _Bound = (lambda value: 0 < value < 1, "more than 0 and below 1")
_SHARE: _Bound = (lambda value: 0 <= value <= 1, "a share in [0, 1]")


class Template(StrEnum):
    """How a record becomes text."""

    RAW = "raw"
    """The messages and the response, with blank lines between: what the compressor reads."""
    ALPACA = "alpaca"
    """The instruction template of the LLMLingua paper."""
    CHAT = "chat"
    """The small LM's own chat template, each message as a turn: what the assistant says is learnt, in every turn."""


class LossOn(StrEnum):
    """Which tokens the loss counts."""

    RESPONSE = "response"
    ALL = "all"


class Overlong(StrEnum):
    """What becomes of a record longer than a row."""

    SPLIT = "split"
    """Cut into pieces that are read one by one; a piece without a counted token is left out."""
    DROP = "drop"
    """Left out."""


class TrainingMethod(StrEnum):
    """What is trained."""

    LORA = "lora"
    """An adapter on frozen weights."""
    QLORA = "qlora"
    """An adapter on frozen weights of 4 bits (arXiv:2305.14314), by bitsandbytes: a fraction of the memory, slower."""
    FULL = "full"
    """All weights, in float32; products as ``dtype`` says."""


class Initialisation(StrEnum):
    """First values of an adapter."""

    ZERO = "zero"
    """A as Kaiming, B zero: the model begins as its base."""
    GAUSSIAN = "gaussian"
    """A normal, B zero."""
    ORTHOGONAL = "orthogonal"
    """A and B orthogonal to each other, so that B·A is zero."""
    PISSA = "pissa"
    """The principal singular vectors of the weights, which keep the rest (arXiv:2404.02948)."""
    OLORA = "olora"
    """A QR decomposition of the weights, which keep the rest (arXiv:2406.01775)."""


class Precision(StrEnum):
    """Number format of the frozen weights and the matrix products; the adapter and the loss are float32."""

    AUTO = "auto"
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Tracker(StrEnum):
    """Where the loss and the scores are sent while a run goes on."""

    AUTO = "auto"
    """TensorBoard if it is installed, else none."""
    NONE = "none"
    TENSORBOARD = "tensorboard"
    """Files in ``tensorboard/`` of the run folder."""
    WANDB = "wandb"
    MLFLOW = "mlflow"
    TRACKIO = "trackio"


class Metric(StrEnum):
    """What the best weights are chosen by."""

    AUTO = "auto"
    """``utility`` where that is trained, else ``bits_per_byte``."""
    BITS_PER_BYTE = "bits_per_byte"
    KEPT_OVERLAP = "kept_overlap"
    """How many of the words that the target would keep the small LM keeps: the mean at 2, 5 and 10×."""
    UTILITY = "utility"
    """Rank correlation of the scores of units with their utility, in held-out labelled prompts."""


class Schedule(StrEnum):
    """The learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant_with_warmup"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learnt from, and what is held out.

    Attributes:
        records: the target's output, or labelled prompts: a JSON Lines, Parquet, JSON or CSV file, a folder of a data
            set, or ``hub:OWNER/NAME``.
        mixture: in place of ``records``: sources, and how often an epoch sees each of their records. 2 is twice;
            0.5 is half of them, drawn once.
        max_length: tokens in a packed row, the start token of each record included.
        overlong: what becomes of a record longer than ``max_length``.
    """

    records: str = "data/sample/records.jsonl"
    mixture: dict[str, float] = field(default_factory=dict)
    max_length: int = 1024
    overlong: Overlong = Overlong.SPLIT

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
    """Low-rank adapters on every linear layer but the output head (arXiv:2106.09685).

    Attributes:
        rank: r of the paper.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the adapter's inputs set to zero, in [0, 1).
        rank_stabilised: the update is scaled by alpha / √rank instead (arXiv:2312.03732), for ranks far above 16.
        weight_decomposed: DoRA (arXiv:2402.09353): the length of each row of weights is learnt apart from its
            direction; slower.
        initialisation: first values.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    weight_decomposed: bool = False
    initialisation: Initialisation = Initialisation.ZERO

    def __post_init__(self) -> None:
        _refuse(
            *_out_of_bounds("lora.", self, rank=_FROM_1, alpha=_ABOVE_0),
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
    """What is minimised: a weighted sum, each part a mean over its own units.

    Attributes:
        nll: weight of −log p of the counted tokens: all that can be learnt from text alone.
        matching: weight of surprisal matching: smooth-L1 between the surprisals of words under small LM and target.
        ranking: weight of ranking the words that the target would keep above those that it would drop.
        divergence: weight of the KL divergence from the target's likeliest tokens; small LM and target share a
            vocabulary.
        utility: weight of ordering the units of labelled prompts by their use for the target's answer.
        question_dropped: share of the labelled prompts that are read without their question.
        target: the target LLM if it can be loaded here (an alias, a folder or a hub id): it reads the texts before
            training. Labels have to be of this target, if it is named.
        log_probabilities: parquet file of the target's log-probabilities of the records' texts, where it cannot be
            loaded.
        top_k: likeliest tokens that ``divergence`` compares.
        turning_point: nats at which ``matching`` turns from squared to absolute error.
        near_threshold: extra weight of the words that the target would hardly keep or hardly drop, in ``matching``.
    """

    nll: float = 1.0
    matching: float = 0.0
    ranking: float = 0.0
    divergence: float = 0.0
    utility: float = 0.0
    question_dropped: float = 0.1
    target: str = ""
    log_probabilities: str = ""
    top_k: int = 32
    turning_point: float = 1.0
    near_threshold: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("nll", "matching", "ranking", "divergence", "utility")}
        asks = [f"objective.{name}" for name in ("matching", "ranking", "divergence") if weights[name] > 0]
        _refuse(
            *_out_of_bounds("objective.", self, **dict.fromkeys(weights, _FROM_0)),
            (not any(weights.values()), "all weights of objective are 0; expected one above 0"),
            (
                bool(asks) and bool(self.target) == bool(self.log_probabilities),
                f"{', '.join(asks)} compares with the target; set objective.target to a model that can be loaded here, "
                "or objective.log_probabilities to a file of what it thinks",
            ),
            *_out_of_bounds("objective.", self, question_dropped=_SHARE, top_k=_FROM_1),
            *_out_of_bounds("objective.", self, turning_point=_ABOVE_0, near_threshold=_FROM_0),
        )

    @property
    def compares(self) -> bool:
        """Whether the target's opinion on each text is needed."""
        return self.matching > 0 or self.ranking > 0 or self.divergence > 0


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings:
    """AdamW and its schedule.

    Attributes:
        epochs: passes over the training rows; rounded to whole steps, at least one.
        rows_per_step: packed rows in one optimiser step, over all processes.
        rows_per_pass: packed rows that one process takes through the model at once.
        learning_rate: its peak.
        head_learning_rate: the peak of the utility head's.
        schedule: the learning rate after warm-up.
        warmup: share of the steps in which the learning rate rises to its peak, in [0, 1].
        weight_decay: AdamW's, per unit of learning rate.
        max_grad_norm: gradients are scaled down to this Euclidean norm; 0 leaves them as they are.
    """

    epochs: float = 1.0
    rows_per_step: int = 8
    rows_per_pass: int = 1
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _refuse(
            *_out_of_bounds("optimisation.", self, epochs=_ABOVE_0, rows_per_step=_FROM_1, rows_per_pass=_FROM_1),
            *_out_of_bounds("optimisation.", self, learning_rate=_BELOW_1, head_learning_rate=_BELOW_1),
            *_out_of_bounds("optimisation.", self, warmup=_SHARE, weight_decay=_FROM_0, max_grad_norm=_FROM_0),
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How fast, and in how much memory; changes no result but by rounding.

    Attributes:
        compile: compile the decoder layers: ten to twenty seconds at the start, on GPUs alone; twice as fast after
            that.
        recompute: recompute each layer's activations in the backward pass: a third slower, in a fraction of the
            memory.
    """

    compile: bool = False
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Held-out text, scored before and after.

    Attributes:
        held_out: expected share of the prompts that is never trained on, in (0, 1).
        rows_per_pass: packed rows that one process scores at once.
        every: optimiser steps between two scorings that choose the best weights; 0 keeps the last. Half of the
            held-out prompts then choose, and only the other half is reported on.
        metric: what they choose by.
        patience: scorings in a row without a new best after which training ends; 0 never ends early.
    """

    held_out: float = 0.1
    rows_per_pass: int = 4
    every: int = 0
    metric: Metric = Metric.AUTO
    patience: int = 0

    def __post_init__(self) -> None:
        _refuse(
            *_out_of_bounds("evaluation.", self, held_out=_BELOW_1, rows_per_pass=_FROM_1),
            (self.every < 0, f"evaluation.every is {self.every}; expected a number of steps, or 0"),
            (self.patience < 0, f"evaluation.patience is {self.patience}; expected a number of scorings, or 0"),
            (self.patience > 0 and not self.every, "evaluation.patience needs evaluation.every; set it to some steps"),
        )


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the report compares with, besides bits per byte.

    Attributes:
        target: the target LLM, if it can be loaded here: an alias, a folder or a hub id; else empty.
        texts: held-out texts whose words are compared with the target's, at most.
    """

    target: str = ""
    texts: int = 200

    def __post_init__(self) -> None:
        _refuse(*_out_of_bounds("report.", self, texts=_FROM_1))


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """One alignment run.

    Attributes:
        model: the small LM: an alias, a folder or a hub id.
        run_dir: folder for the adapter or the model, the metrics and the checkpoints.
        method: what is trained; ``lora`` holds the settings of the adapters.
        template: how a record becomes text.
        loss_on: which tokens the loss counts; held-out text is always scored on the response. In a chat, ``response``
            is what the assistant says in all turns, with the tokens that end them.
        tracker: where the loss and the scores are sent while the run goes on.
        dtype: number format of the frozen weights and the matrix products.
        seed: of the held-out split, the order of the rows, and the adapter's first values.
        log_every: optimiser steps between two entries of the loss history.
        save_every: optimiser steps between two checkpoints.
    """

    model: str = "smollm2-135m"
    run_dir: str = "runs/align"
    method: TrainingMethod = TrainingMethod.LORA
    data: DataSettings = field(default_factory=DataSettings)
    template: Template = Template.RAW
    loss_on: LossOn = LossOn.RESPONSE
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    tracker: Tracker = Tracker.AUTO
    dtype: Precision = Precision.AUTO
    seed: int = 0
    log_every: int = 5
    save_every: int = 50

    def __post_init__(self) -> None:
        _refuse(
            (not self.model.strip(), "model is empty; expected an alias, a folder or a hub id"),
            (not self.run_dir.strip(), "run_dir is empty; expected a folder"),
            (
                self.method is TrainingMethod.QLORA and self.lora.changes_base,
                f"lora.initialisation={self.lora.initialisation} decomposes weights, which method=qlora rounds to 4 "
                "bits; choose zero, gaussian or orthogonal",
            ),
            (
                self.evaluation.metric is Metric.KEPT_OVERLAP and not self.objective.compares,
                "evaluation.metric=kept_overlap compares with the target; give objective.matching a weight",
            ),
            (
                self.evaluation.metric is Metric.UTILITY and not self.objective.utility,
                "evaluation.metric=utility needs scores of units; give objective.utility a weight",
            ),
            *_out_of_bounds("", self, seed=_FROM_0, log_every=_FROM_1, save_every=_FROM_1),
        )

    @property
    def metric(self) -> Metric:
        """What the best weights are chosen by."""
        if self.evaluation.metric is not Metric.AUTO:
            return self.evaluation.metric
        return Metric.UTILITY if self.objective.utility else Metric.BITS_PER_BYTE


def _out_of_bounds(prefix: str, settings: object, **bounds: _Bound) -> Iterator[tuple[bool, str]]:
    """A check of each of these numbers."""
    for name, (holds, expected) in bounds.items():
        value = getattr(settings, name)
        yield not holds(value), f"{prefix}{name} is {value}; expected {expected}"


def _refuse(*checks: tuple[bool, str]) -> None:
    """One error for all checks whose condition holds."""
    refuse(fault for wrong, fault in checks if wrong)

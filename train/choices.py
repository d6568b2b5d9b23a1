"""What a setting of an alignment run can be."""

from __future__ import annotations

from enum import StrEnum


class Template(StrEnum):
    """How a record becomes text."""

    RAW = "raw"
    """The messages and the response, with blank lines between: what the compressor reads."""
    ALPACA = "alpaca"
    """The instruction template of the LLMLingua paper."""


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


class Method(StrEnum):
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


class Schedule(StrEnum):
    """The learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant_with_warmup"

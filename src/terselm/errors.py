"""Every error that TerseLM raises on purpose.

Each message is one sentence (or a few short ones) that says what was given, what was expected, and what to do.
"""

from __future__ import annotations

from pathlib import Path


class TerseLMError(Exception):
    """Base of all errors that are the caller's to mend; the command line turns it into exit status 2."""


class ConfigError(TerseLMError):
    """A setting is unknown, of the wrong type, or out of range."""


class PromptError(TerseLMError):
    """The prompt cannot be compressed as given (empty, or not valid Unicode)."""


class BudgetError(TerseLMError):
    """The budget cannot be met.

    Attributes:
        smallest: the smallest budget that could work, in the caller's tokens; None where the fault is of another kind.
    """

    def __init__(self, message: str, *, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class ContextLengthError(TerseLMError):
    """A text or a segment does not fit into the model's window."""


class DataFormatError(TerseLMError):
    """A line of a data file is not what its format says.

    Attributes:
        path: the file.
        line: 1-based line number; None where the whole file is at fault.
    """

    def __init__(self, path: Path | str, line: int | None, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line is not None else f"{path}: {message}")
        self.path = Path(path)
        self.line = line


class ModelError(TerseLMError):
    """A model cannot be found or loaded."""


class CheckpointError(ModelError):
    """A run folder, an adapter or a published checkpoint is missing, torn, or in the way."""


class TrainingError(TerseLMError):
    """Training cannot go on; what was saved before is kept.

    Attributes:
        this_process_only: the other processes of the launch did not meet it.
    """

    def __init__(self, message: str, *, this_process_only: bool = False) -> None:
        super().__init__(message)
        self.this_process_only = this_process_only


class TargetLLMError(TerseLMError):
    """The target LLM could not answer."""

"""One sentence for a disk that is full, whichever library met it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from terselm.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIAL_BYTES = 1 << 20


@contextmanager
def clear_disk_errors(folder: Path, consequence: str) -> Iterator[None]:
    """Turn the errors of a disk that is full or not writable into a `CheckpointError`; others pass.

    Args:
        folder: what is written to.
        consequence: what is lost and what is not.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _explain(folder, error, consequence) from None
    except (RuntimeError, SafetensorError) as error:  # torch.save and safetensors do not say why
        if (reason := _trial(folder)) is None:
            raise
        raise _explain(folder, reason, consequence) from error


def _trial(folder: Path) -> OSError | None:
    """What goes wrong when something is written there now."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _explain(folder: Path, error: OSError, consequence: str) -> CheckpointError:
    reason = (error.strerror or str(error)).lower()
    remedy = "free some space" if error.errno in _FULL else "see to it"
    return CheckpointError(f"cannot write to {folder}: {reason}; {consequence}; {remedy} and run the same command")

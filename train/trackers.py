"""Send the loss and the scores to a tracker while a run goes on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from terselm.errors import ConfigError
from terselm.train.choices import Tracker

_INSTALL = {Tracker.TENSORBOARD: "terselm[train]"}


def tracker_callbacks(asked: Tracker, run: Path) -> list[Any]:
    """The Trainer's callbacks that report to a tracker.

    Args:
        asked: by the config.
        run: folder of the run; TensorBoard's files go into ``tensorboard/`` there, the others have their own settings
            in the environment (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, …).

    Raises:
        ConfigError: its package is not installed.
    """
    tracker = asked
    if asked is Tracker.AUTO:
        tracker = Tracker.TENSORBOARD if find_spec("tensorboard") else Tracker.NONE
    if tracker is Tracker.NONE:
        return []
    if find_spec(tracker.value) is None:
        package = _INSTALL.get(tracker, tracker.value)
        raise ConfigError(f"tracker={tracker} needs the package {tracker}; run: pip install '{package}'")
    from transformers.integrations import get_reporting_integration_callbacks

    (kind,) = get_reporting_integration_callbacks([tracker.value])
    callback = kind()
    if tracker is Tracker.TENSORBOARD:
        callback.logging_dir = str(run / "tensorboard")
    return [callback]

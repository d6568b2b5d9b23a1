"""The ``terselm`` command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import logging
import os
import sys

from terselm.cli import compress, data, evaluate, models, records, serve, train  # noqa: F401 (each adds its commands)
from terselm.cli.app import app
from terselm.errors import TerseLMError


def main() -> None:
    """Run the command line; the user's mistakes end with one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "transformers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except TerseLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

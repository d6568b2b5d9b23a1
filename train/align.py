"""Entry point: ``accelerate launch train/align.py --config configs/align/smollm2-135m.yaml [key=value …]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from terselm.config import load_config
from terselm.errors import ConfigError, TerseLMError
from terselm.train.config import AlignConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one alignment; the exit status, 2 for the user's mistake."""
    parser = argparse.ArgumentParser(description="Align a small LM to a target LLM's own output.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file, such as configs/align/smollm2-135m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before those of the file")
    options = parser.parse_args(arguments)
    try:
        config = load_config(AlignConfig, options.config, options.overrides)
        try:
            from terselm.train.alignment import align
        except ModuleNotFoundError as error:
            raise ConfigError(f"training needs {error.name}; run: pip install 'terselm[train]'") from None
        align(config)
    except TerseLMError as error:
        if os.environ.get("RANK", "0") == "0":  # every process of a launch meets the same mistake
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the last whole checkpoint of run_dir, if there is one (the default), or begin anew",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say how many steps, how long and how much memory")
    options = parser.parse_args(arguments)
    try:
        config = load_config(AlignConfig, options.config, options.overrides)
        try:
            from terselm.train.alignment import align
        except ModuleNotFoundError as error:
            raise ConfigError(f"training needs {error.name}; run: pip install 'terselm[train]'") from None
        align(config, resume=options.resume, dry_run=options.dry_run)
    except TerseLMError as error:
        # Every process of a launch meets the same mistake; one is enough to say so.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "this_process_only", False):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

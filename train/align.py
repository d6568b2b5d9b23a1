"""Entry point: ``accelerate launch train/align.py --config configs/align/smollm2-135m.yaml [key=value …]``.

``terselm align`` is the same command, for one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from terselm.errors import ConfigError, TerseLMError


def align(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="YAML file, such as configs/align/smollm2-135m.yaml, and settings that go before those of the file.",
            show_default=False,
        ),
    ] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="YAML file, in place of CONFIG.", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last whole checkpoint of run_dir, if there is one, or begin anew.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many steps, how long, how much memory.")] = (
        False
    ),
) -> None:
    """Align a small LM to a target LLM's own output."""
    overrides = list(words or ())
    if config is None and overrides and "=" not in overrides[0]:
        config = Path(overrides.pop(0))
    raise typer.Exit(_run(config, overrides, resume=resume, dry_run=dry_run))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one alignment; the exit status, 2 for the user's mistake."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(align)
    try:
        app(args=arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _run(config: Path | None, overrides: Sequence[str], *, resume: bool, dry_run: bool) -> int:
    from terselm.config import load_config
    from terselm.train.settings import AlignSettings

    try:
        if config is None:
            raise ConfigError("no config file is named; expected one such as configs/align/smollm2-135m.yaml")
        settings = load_config(AlignSettings, config, overrides)
        try:
            from terselm.train.alignment import align as align_small_lm
        except ModuleNotFoundError as error:
            raise ConfigError(f"training needs {error.name}; run: pip install 'terselm[train]'") from None
        align_small_lm(settings, resume=resume, dry_run=dry_run)
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

"""The command line's application, and what its commands share."""

from __future__ import annotations

import typer

from terselm.errors import ConfigError

app = typer.Typer(
    help="Shorten prompts for a large target LLM with a small LM that was aligned to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def need(extra: str, module: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise ConfigError(f"this command needs {module}; run: pip install 'terselm[{extra}]'")


def quieten_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

"""The ``terselm`` command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from terselm.errors import TerseLMError

app = typer.Typer(
    help="Shorten prompts for a large target LLM with a small LM that was aligned to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; the user's mistakes end with one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "transformers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # transformers has a bar that `quieten_transformers` does not reach; tqdm reads this
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except TerseLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def quieten_transformers() -> None:
    """Let the command's own lines alone be seen."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@app.command()
def convert(name: Annotated[str, typer.Argument(help="Alias of a model, such as smollm2-135m.")]) -> None:
    """Convert an alias's weights into the cache and print the folder."""
    from terselm.models import convert_alias

    quieten_transformers()
    print(convert_alias(name))


for _room in ("compress", "data", "evaluate", "train"):
    import_module(f"{__name__}.{_room}")  # adds its commands to ``app``

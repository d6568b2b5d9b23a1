"""Commands on data: ``collect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terselm.cli.app import app, quieten_transformers


@app.command()
def collect(
    instructions: Annotated[Path, typer.Option(help="JSONL file of instructions.")],
    out: Annotated[Path, typer.Option(help="JSONL file of records to write.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with collection settings.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
) -> None:
    """Ask a local target LLM and write what it answers."""
    from terselm.config import load_config
    from terselm.data.collect import collect_local
    from terselm.data.instructions import read_instructions
    from terselm.data.requests import CollectSettings

    settings = load_config(CollectSettings, config, overrides or [])
    quieten_transformers()
    print(collect_local(list(read_instructions(instructions)), out, settings))

"""Commands on models: ``convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from terselm.cli.app import app, quieten_transformers


@app.command()
def convert(name: Annotated[str, typer.Argument(help="Alias of a model, such as smollm2-135m.")]) -> None:
    """Convert an alias's weights into the cache and print the folder."""
    from terselm.models import convert_alias

    quieten_transformers()
    print(convert_alias(name))

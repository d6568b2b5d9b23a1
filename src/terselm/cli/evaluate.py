"""Commands that measure: ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terselm.cli.app import app, need, quieten_transformers


@app.command()
def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any other setting.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; run again, it goes on where it stopped.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with evaluation settings.")] = None,
    suite: Annotated[str | None, typer.Option(help="gsm8k, bbh, nq, sharegpt, arxiv, or prompts (your own).")] = None,
    target: Annotated[str | None, typer.Option(help="The model that reads the prompts.")] = None,
    methods: Annotated[str | None, typer.Option(help="Such as 'terselm terselm:k=1.2 truncate', with blanks.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Such as '1-shot half-shot 300 0.2', with blanks.")] = None,
) -> None:
    """Measure what a target makes of compressed prompts, and print the table."""
    need("evaluate", "matplotlib")
    from terselm.compress.evaluation.evaluate import evaluate as run
    from terselm.compress.evaluation.settings import EvaluateSettings
    from terselm.config import load_config

    given = [f"suite.name={suite}"] if suite else []
    given += [f"target.model={target}"] if target else []
    given += [_listed("methods", methods)] if methods else []
    given += [_listed("budgets", budgets)] if budgets else []
    settings = load_config(EvaluateSettings, config, [*given, *(overrides or [])])
    quieten_transformers()
    print(run(settings, out)[1])


def _listed(key: str, words: str) -> str:
    return f"{key}=[{','.join(repr(word) for word in words.split())}]"

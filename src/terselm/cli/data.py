"""The command ``collect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from terselm.cli import app, need, quieten_transformers
from terselm.errors import ConfigError

if TYPE_CHECKING:
    from terselm.data.collection.settings import CollectSettings

_Out = Annotated[Path, typer.Option(help="File of records to write (JSONL); with --score-only, Parquet.")]
_Source = Annotated[
    str | None,
    typer.Option(help="Instructions: JSONL, JSON, CSV, Parquet, a data set's folder, or hub:OWNER/NAME."),
]


@app.command()
def collect(
    out: _Out,
    instructions: _Source = None,
    endpoint: Annotated[str | None, typer.Option(help="https://…/v1, or local:MODEL.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, as the endpoint calls it.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with collection settings.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the endpoint's key, else $OPENAI_API_KEY.")] = None,
    prices: Annotated[Path | None, typer.Option(help="YAML table of prices for a million tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Never spend more, over all runs.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Never send more, over all runs.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what is still to be used; ask nothing.")] = False,
    pilot: Annotated[int, typer.Option(help="With --estimate: ask so many first, and learn from them.")] = 0,
    status: Annotated[bool, typer.Option("--status", help="Say what the ledger holds; ask nothing.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="Through the endpoint's batch interface.")] = False,
    score_only: Annotated[bool, typer.Option("--score-only", help="Score texts instead of asking.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
) -> None:
    """Ask a target LLM and write what it answers; go on where a killed run stopped."""
    from terselm.data.collection.collect import Options

    if status:
        _print(_status(out))
        return
    settings = _settings(config, {"endpoint": endpoint, "model": model}, overrides or [])
    if pilot and not estimate:
        raise ConfigError("--pilot is for --estimate; leave it out, or add that")
    if instructions is None:
        raise ConfigError("no instructions; name a file or a data set with --instructions")
    options = Options(
        key_file=key_file,
        prices=prices,
        max_cost=max_cost,
        max_requests=max_requests,
        retry_failed=retry_failed,
        batch=batch,
    )
    if score_only:
        from terselm.data.collection.score_only import score_only as score

        _print(asdict(score(instructions, out, settings, options)))
        return
    loaded = _load(instructions)
    if estimate:
        from terselm.data.collection.estimate import estimate as guess

        _print(asdict(guess(loaded, out, settings, options, pilot=pilot)))
        return
    from terselm.data.collection.collect import collect as run

    _print(asdict(run(loaded, out, settings, options)))


def _settings(config: Path | None, named: dict[str, str | None], overrides: list[str]) -> CollectSettings:
    from terselm.config import load_config
    from terselm.data.collection.settings import CollectSettings

    given = [f"{name}={value}" for name, value in named.items() if value is not None]
    settings = load_config(CollectSettings, config, [*given, *overrides])
    if settings.is_local:
        quieten_transformers()
    else:
        need("collect", "openai")
    return settings


def _load(source: str) -> Any:
    import logging

    from terselm.data.instructions import load_instructions

    loaded = load_instructions(source)
    if loaded.duplicates:
        logging.getLogger(__name__).info("left out %s instructions that came before", f"{loaded.duplicates:,}")
    return loaded.instructions


def _status(out: Path) -> dict[str, Any]:
    from terselm.data.collection.ledger import ledger_of
    from terselm.data.collection.status import status

    return status(ledger_of(out))


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

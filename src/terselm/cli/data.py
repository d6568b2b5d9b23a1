"""``terselm collect`` asks a target LLM; ``terselm collection`` says how a collection stands, and what it will take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from terselm.cli import app, quieten_transformers
from terselm.errors import ConfigError
from terselm.extras import need

if TYPE_CHECKING:
    from terselm.data.collection.settings import CollectSettings, Options

_collection = typer.Typer(help="See how a collection stands, estimate it, or score texts.", no_args_is_help=True)
app.add_typer(_collection, name="collection")
_Out = Annotated[Path, typer.Option(help="File of records to write (JSONL).")]
_Source = Annotated[
    str | None,
    typer.Option(help="Instructions: JSONL, JSON, CSV, Parquet, a data set's folder, or hub:OWNER/NAME."),
]
_Endpoint = Annotated[str | None, typer.Option(help="https://…/v1, or local:MODEL.")]
_Model = Annotated[str | None, typer.Option(help="The model, as the endpoint calls it.")]
_Config = Annotated[Path | None, typer.Option(help="YAML file with collection settings.")]
_KeyFile = Annotated[Path | None, typer.Option(help="File with the endpoint's key, else $OPENAI_API_KEY.")]
_Prices = Annotated[Path | None, typer.Option(help="YAML table of prices for a million tokens.")]
_MaxCost = Annotated[float | None, typer.Option(help="Never spend more, over all runs.")]
_MaxRequests = Annotated[int | None, typer.Option(help="Never send more, over all runs.")]
_RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good.")]
_Batch = Annotated[bool, typer.Option("--batch", help="Through the endpoint's batch interface.")]
_Pilot = Annotated[int, typer.Option(help="Ask so many first, and learn from them; they are paid for, and count.")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")]


@app.command()
def collect(
    out: _Out,
    instructions: _Source = None,
    endpoint: _Endpoint = None,
    model: _Model = None,
    config: _Config = None,
    key_file: _KeyFile = None,
    prices: _Prices = None,
    max_cost: _MaxCost = None,
    max_requests: _MaxRequests = None,
    batch: _Batch = False,
    retry_failed: _RetryFailed = False,
    estimate: Annotated[bool, typer.Option("--estimate", hidden=True)] = False,
    pilot: Annotated[int, typer.Option(hidden=True)] = 0,
    status: Annotated[bool, typer.Option("--status", hidden=True)] = False,
    score_only: Annotated[bool, typer.Option("--score-only", hidden=True)] = False,
    overrides: _Overrides = None,
) -> None:
    """Ask a target LLM and write what it answers; go on where a killed run stopped."""
    from terselm.data.collection.settings import Options

    if status:
        _moved("--status", "status")
        _status(out)
        return None
    settings = _settings(config, {"endpoint": endpoint, "model": model}, overrides or [])
    if pilot and not estimate:
        raise ConfigError("--pilot is for terselm collection estimate; leave it out, or run that")
    options = Options(
        key_file=key_file,
        prices=prices,
        max_cost=max_cost,
        max_requests=max_requests,
        retry_failed=retry_failed,
        batch=batch,
    )
    if score_only:
        _moved("--score-only", "score")
        _score(instructions, out, settings, options)
        return None
    if estimate:
        _moved("--estimate", "estimate")
        _estimate(instructions, out, settings, options, pilot)
        return None
    from terselm.data.collection.collect import collect as run

    return _print(asdict(run(_load(instructions), out, settings, options)))


@_collection.command("status")
def collection_status(out: Annotated[Path, typer.Option(help="The collection's file of records.")]) -> None:
    """Show requests by state, attempts by outcome, tokens, cost and failures; another process may be at work."""
    _status(out)


@_collection.command("estimate")
def collection_estimate(
    out: _Out,
    instructions: _Source = None,
    endpoint: _Endpoint = None,
    model: _Model = None,
    config: _Config = None,
    key_file: _KeyFile = None,
    prices: _Prices = None,
    max_cost: _MaxCost = None,
    max_requests: _MaxRequests = None,
    batch: _Batch = False,
    pilot: _Pilot = 0,
    overrides: _Overrides = None,
) -> None:
    """Say what the requests that are still to be asked will use: tokens and cost, as expected and at most."""
    from terselm.data.collection.settings import Options

    settings = _settings(config, {"endpoint": endpoint, "model": model}, overrides or [])
    options = Options(key_file=key_file, prices=prices, max_cost=max_cost, max_requests=max_requests, batch=batch)
    _estimate(instructions, out, settings, options, pilot)


@_collection.command("score")
def collection_score(
    out: Annotated[Path, typer.Option(help="File of log-probabilities to write (Parquet).")],
    instructions: Annotated[str | None, typer.Option(help="Rows with text, or records: as terselm collect.")] = None,
    endpoint: _Endpoint = None,
    model: _Model = None,
    config: _Config = None,
    key_file: _KeyFile = None,
    prices: _Prices = None,
    max_cost: _MaxCost = None,
    max_requests: _MaxRequests = None,
    retry_failed: _RetryFailed = False,
    overrides: _Overrides = None,
) -> None:
    """Write the log-probabilities of given texts, without asking for answers."""
    from terselm.data.collection.settings import Options

    settings = _settings(config, {"endpoint": endpoint, "model": model}, overrides or [])
    options = Options(
        key_file=key_file, prices=prices, max_cost=max_cost, max_requests=max_requests, retry_failed=retry_failed
    )
    _score(instructions, out, settings, options)


def _moved(flag: str, command: str) -> None:
    from terselm.progress import say

    say(f"terselm collect {flag} is now terselm collection {command}; the flag will go in a later version")


def _status(out: Path) -> None:
    from terselm.data.collection.ledger import ledger_of, status

    _print(status(ledger_of(out)))


def _estimate(source: str | None, out: Path, settings: CollectSettings, options: Options, pilot: int) -> None:
    from terselm.data.collection.estimate import estimate

    _print(asdict(estimate(_load(source), out, settings, options, pilot=pilot)))


def _score(source: str | None, out: Path, settings: CollectSettings, options: Options) -> None:
    from terselm.data.collection.score_only import score_only

    _print(asdict(score_only(_named(source), out, settings, options)))


def _settings(config: Path | None, named: dict[str, str | None], overrides: list[str]) -> CollectSettings:
    from terselm.config import load_config
    from terselm.data.collection.settings import CollectSettings

    named_settings = [f"{name}={value}" for name, value in named.items() if value is not None]
    settings = load_config(CollectSettings, config, [*named_settings, *overrides])
    if settings.is_local:
        quieten_transformers()
    else:
        need("openai", "collect")
    return settings


def _named(source: str | None) -> str:
    if source is None:
        raise ConfigError("no instructions; name a file or a data set with --instructions")
    return source


def _load(source: str | None) -> Any:
    import logging

    from terselm.data.instructions import load_instructions

    loaded = load_instructions(_named(source))
    if loaded.duplicates:
        logging.getLogger(__name__).info("left out %s instructions that came before", f"{loaded.duplicates:,}")
    return loaded.instructions


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

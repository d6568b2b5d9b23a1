"""Commands on data: ``collect`` asks a target LLM, ``collection`` says how that stands, ``data`` is about files."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from terselm.cli import app, quieten_transformers
from terselm.errors import ConfigError
from terselm.extras import need

if TYPE_CHECKING:
    from terselm.data.collection.label_plan import PromptToLabel
    from terselm.data.collection.settings import CollectSettings, Options

_log = logging.getLogger(__name__)
_collection = typer.Typer(help="See how a collection stands, estimate it, or score texts.", no_args_is_help=True)
app.add_typer(_collection, name="collection")
_data = typer.Typer(help="Look at, check and convert files of records and instructions.", no_args_is_help=True)
app.add_typer(_data, name="data")
_Records = Annotated[Path, typer.Argument(help="Records: ours, alpaca, sharegpt, messages or prompt/completion.")]
_NewFile = Annotated[Path, typer.Option(help="File to write; it must not exist.")]
_Out = Annotated[Path, typer.Option(help="File of records to write (JSONL).")]
_Source = Annotated[
    str | None, typer.Option(help="Instructions or prompts: JSONL, JSON, CSV, Parquet, a folder, or hub:OWNER/NAME.")
]
_Endpoint = Annotated[str | None, typer.Option(help="https://…/v1, or local:MODEL.")]
_Model = Annotated[str | None, typer.Option(help="The model, as the endpoint calls it.")]
_Chat = Annotated[
    str | None, typer.Option(help="Local target through its chat template: auto (where it has one), always, never.")
]
_Config = Annotated[Path | None, typer.Option(help="YAML file with collection settings.")]
_KeyFile = Annotated[Path | None, typer.Option(help="File with the endpoint's key, else $OPENAI_API_KEY.")]
_Prices = Annotated[Path | None, typer.Option(help="YAML table of prices for a million tokens.")]
_MaxCost = Annotated[float | None, typer.Option(help="Never spend more, over all runs.")]
_MaxRequests = Annotated[int | None, typer.Option(help="Never send more, over all runs.")]
_RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good.")]
_Batch = Annotated[bool, typer.Option("--batch", help="Through the endpoint's batch interface.")]
_Utility = Annotated[
    bool, typer.Option("--utility", help="Label prompts: how much each sentence or line helps the target to answer.")
]
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
    chat: _Chat = None,
    utility: _Utility = False,
    estimate: Annotated[bool, typer.Option("--estimate", hidden=True)] = False,
    pilot: Annotated[int, typer.Option(hidden=True)] = 0,
    status: Annotated[bool, typer.Option("--status", hidden=True)] = False,
    score_only: Annotated[bool, typer.Option("--score-only", hidden=True)] = False,
    overrides: _Overrides = None,
) -> None:
    """Ask a target LLM and write what it answers; go on where a killed run stopped."""
    whom = endpoint, model, config
    if status:
        _moved("--status", "status")
        collection_status(out)
    elif pilot and not estimate:
        raise ConfigError("--pilot is for terselm collection estimate; leave it out, or run that")
    elif score_only:
        _moved("--score-only", "score")
        collection_score(out, instructions, *whom, key_file, prices, max_cost, max_requests, retry_failed, overrides)
    elif estimate:
        _moved("--estimate", "estimate")
        collection_estimate(
            out, instructions, *whom, key_file, prices, max_cost, max_requests, batch, pilot, chat, utility, overrides
        )
    else:
        settings = _settings(*whom, overrides, chat)
        options = _options(key_file, prices, max_cost, max_requests, batch=batch, retry_failed=retry_failed)
        if utility:
            from terselm.data.collection.labels import collect_labels

            _print(asdict(collect_labels(_prompts(instructions), out, settings, options)))
            return
        from terselm.data.collection.collect import collect as run

        _print(asdict(run(_load(instructions), out, settings, options)))


@_collection.command("status")
def collection_status(out: Annotated[Path, typer.Option(help="The collection's file of records.")]) -> None:
    """Show requests by state, attempts by outcome, tokens, cost and failures; another process may be at work."""
    from terselm.data.collection.ledger import ledger_of, status

    _print(status(ledger_of(out)))


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
    chat: _Chat = None,
    utility: _Utility = False,
    overrides: _Overrides = None,
) -> None:
    """Say what the requests that are still to be asked will use: tokens and cost, as expected and at most."""
    settings = _settings(endpoint, model, config, overrides, chat)
    options = _options(key_file, prices, max_cost, max_requests, batch=batch)
    if utility:
        from terselm.data.collection.label_estimate import estimate_labels

        _print(asdict(estimate_labels(_prompts(instructions), out, settings, options, pilot=pilot)))
        return
    from terselm.data.collection.estimate import estimate

    _print(asdict(estimate(_load(instructions), out, settings, options, pilot=pilot)))


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
    settings = _settings(endpoint, model, config, overrides)
    options = _options(key_file, prices, max_cost, max_requests, retry_failed=retry_failed)
    from terselm.data.collection.score_only import score_only

    _print(asdict(score_only(_named(instructions), out, settings, options)))


@_data.command()
def stats(records: _Records) -> None:
    """Count records, prompts, tokens, models and lengths."""
    from terselm.data.records import read_records, statistics

    _print(asdict(statistics(read_records(records))))


@_data.command()
def validate(records: _Records) -> None:
    """Read every line; the first that is wrong is named, with status 2."""
    from terselm.data.records import read_records

    print(f"{sum(1 for _ in read_records(records)):,} records, all well-formed")


@_data.command()
def convert(records: _Records, out: _NewFile) -> None:
    """Write records of any format in our own, as JSON Lines."""
    from terselm.data.records import read_records, write_records

    _new(out)
    write_records(out, read_records(records))


@_data.command()
def split(
    records: _Records,
    out: Annotated[Path, typer.Option(help="For the records that are kept.")],
    held_out: Annotated[Path, typer.Option(help="For the records that are held out.")],
    share: Annotated[float, typer.Option(help="Of the prompts that are held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
) -> None:
    """Split by instruction: all answers to one prompt land on the same side."""
    from terselm.data.records import read_records, split_by_instruction, write_records

    _new(out, held_out)
    sides = split_by_instruction(read_records(records), share, seed)
    for path, side in zip((out, held_out), sides, strict=True):
        write_records(path, side)
    print(f"{len(sides[0]):,} records in {out}, {len(sides[1]):,} in {held_out}")


@_data.command()
def instructions(
    source: Annotated[str, typer.Argument(help="What terselm collect takes as instructions.")],
    out: _NewFile,
    near_duplicates: Annotated[
        float | None, typer.Option(help="Leave out what is as similar to an earlier one, in (0, 1); 0.8 is usual.")
    ] = None,
    benchmark: Annotated[
        list[Path] | None, typer.Option(help="Leave out what shares 13 words in a row with this file. May be repeated.")
    ] = None,
) -> None:
    """Read instructions from any source, take out what must not be asked, and write them in our own form."""
    from terselm.data.instructions import (
        load_instructions,
        without_near_duplicates,
        without_overlap,
        write_instructions,
    )

    _new(out)
    loaded = load_instructions(source)
    kept, counts = loaded.instructions, {"duplicates": loaded.duplicates}
    if near_duplicates is not None:
        kept, counts["near_duplicates"] = without_near_duplicates(kept, near_duplicates)
    if benchmark:
        kept, counts["overlapping"] = without_overlap(kept, benchmark)
    if not kept:
        raise ConfigError(f"nothing is left of {source}: {counts}")
    write_instructions(out, kept)
    _print({"instructions": len(kept), **counts})


@_data.command()
def suite(
    name: Annotated[str, typer.Argument(help="Of terselm evaluate: nq, tools, dialogue, gsm8k, …")],
    out: _NewFile,
    questions: Annotated[int, typer.Option(help="How many; of tools, for each kind.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed, other questions.")] = 0,
    rows: Annotated[str, typer.Option(help="Rows of the data to use, such as 1000:2000.")] = "",
    data: Annotated[Path | None, typer.Option(help="The suite's file, where it needs one.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its other settings: documents=20 …")
    ] = None,
) -> None:
    """Write a suite's prompts with their answers, one a row, as terselm collect --utility takes them."""
    from terselm.config import load_config
    from terselm.data.rows import dump_object
    from terselm.evaluate.settings import SuiteSettings
    from terselm.evaluate.suites import load_suite, rows_of
    from terselm.files import atomic_file

    _new(out)
    options = {"name": name, "questions": questions, "seed": seed, "rows": rows and repr(rows), "data": data}
    named = [f"{key}={value}" for key, value in options.items() if value not in (None, "")]
    settings = load_config(SuiteSettings, None, [*named, *(overrides or [])])
    count = 0
    with atomic_file(out) as file:
        for row in rows_of(load_suite(settings)):
            file.write(dump_object(row) + "\n")
            count += 1
    _print({"prompts": count, "file": str(out)})


def _new(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists; name another file, or move it away")


def _moved(flag: str, command: str) -> None:
    from terselm.progress import say

    say(f"terselm collect {flag} is now terselm collection {command}; the flag will go in a later version")


def _options(
    key_file: Path | None, prices: Path | None, max_cost: float | None, max_requests: int | None, **others: bool
) -> Options:
    from terselm.data.collection.settings import Options

    return Options(key_file=key_file, prices=prices, max_cost=max_cost, max_requests=max_requests, **others)


def _settings(
    endpoint: str | None,
    model: str | None,
    config: Path | None,
    overrides: list[str] | None,
    chat: str | None = None,
) -> CollectSettings:
    from terselm.config import load_config
    from terselm.data.collection.settings import CollectSettings

    options = {"endpoint": endpoint, "model": model, "chat": chat}
    named = [f"{name}={value}" for name, value in options.items() if value is not None]
    settings = load_config(CollectSettings, config, [*named, *(overrides or [])])
    if settings.is_local:
        quieten_transformers()
    else:
        need("openai", "collect")
    return settings


def _named(source: str | None) -> str:
    if source is None:
        raise ConfigError("no instructions; name a file or a data set with --instructions")
    return source


def _prompts(source: str | None) -> list[PromptToLabel]:
    from terselm.compress.label_units import read_prompts_to_label

    return read_prompts_to_label(_named(source))


def _load(source: str | None) -> Any:
    from terselm.data.instructions import load_instructions

    loaded = load_instructions(_named(source))
    if loaded.duplicates:
        _log.info("left out %s instructions that came before", f"{loaded.duplicates:,}")
    return loaded.instructions


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

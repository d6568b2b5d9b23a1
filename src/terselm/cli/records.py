"""``terselm data``: what can be done to files of records and of instructions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from terselm.cli import app
from terselm.errors import ConfigError

_data = typer.Typer(help="Look at, check and convert files of records and instructions.", no_args_is_help=True)
app.add_typer(_data, name="data")
_Records = Annotated[Path, typer.Argument(help="Records: ours, alpaca, sharegpt, messages or prompt/completion.")]
_Out = Annotated[Path, typer.Option(help="File to write; it must not exist.")]


@_data.command()
def stats(records: _Records) -> None:
    """Count records, prompts, tokens, models and lengths."""
    from terselm.data.records import read_records, statistics

    print(json.dumps(asdict(statistics(read_records(records))), indent=2, ensure_ascii=False))


@_data.command()
def validate(records: _Records) -> None:
    """Read every line; the first that is wrong is named, with status 2."""
    from terselm.data.records import read_records

    print(f"{sum(1 for _ in read_records(records)):,} records, all well-formed")


@_data.command()
def convert(records: _Records, out: _Out) -> None:
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
    out: _Out,
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
    print(json.dumps({"instructions": len(kept), **counts}, indent=2))


def _new(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists; name another file, or move it away")

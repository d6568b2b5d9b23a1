"""The frame of every benchmark: its command line, the circumstances of its result, the file it writes, how it fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from terselm.errors import TerseLMError
from terselm.files import atomic_file

RESULTS = Path(__file__).parent / "results"


def parser(
    description: str | None, *, out: Path | None = None, required: bool = False, what: str = "JSON file to write"
) -> argparse.ArgumentParser:
    """A command line with ``--out``.

    Args:
        description: the script's docstring, which is shown as it is.
        out: where the result goes by default; None: nowhere, if `required` does not say that it must be named.
        what: help for ``--out``.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = f"{what}; default benchmarks/results/{out.name}" if out else what
    made.add_argument("--out", type=Path, default=out, required=required, metavar="PATH", help=what)
    return made


def circumstances(*packages: str) -> dict[str, Any]:
    """Date, commit, versions and hardware; asked for before the measurement, they are those at its beginning.

    Args:
        packages: installed ones whose versions matter besides those that matter to all.
    """
    from terselm.train.provenance import describe_hardware, describe_versions, git_commit

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": describe_versions() | {package: version(package) for package in packages},
        "hardware": describe_hardware(),
    }


def write_result(path: Path | None, result: Any, *, indent: int = 2) -> None:
    """As JSON, whole or not at all; nothing, if there is no path."""
    if path is not None:
        with atomic_file(path) as file:
            json.dump(result, file, indent=indent)
            file.write("\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script and exit with what it returns; a mistake of the user is one sentence and status 2."""
    try:
        status = main()
    except TerseLMError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)

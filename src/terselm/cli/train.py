"""Commands on finished runs: ``report``, ``publish``, ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terselm.cli.app import app, need, quieten_transformers
from terselm.errors import ConfigError


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="Number format of the stored weights: float32 or bfloat16.")] = "float32",
) -> None:
    """Merge a run's adapter into its base model and write a checkpoint that stands by itself."""
    need("train", "peft")
    from terselm.train.config import Precision
    from terselm.train.publish import publish as publish_run

    try:
        precision = Precision(dtype)
    except ValueError:
        raise ConfigError(f"unknown dtype {dtype!r}; expected float32 or bfloat16") from None
    quieten_transformers()
    print(publish_run(run, to, dtype=precision).path)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    target: Annotated[
        str | None, typer.Option(help="Local target LLM to compare words with; default: the run's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="Number format of the models: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Say how much more alike a small LM and its target have become; writes report.json and report.png."""
    need("train", "peft")
    from terselm.train.report.report import Measurement, write_report
    from terselm.train.report.text import summary

    quieten_transformers()
    print(summary(write_report(run, Measurement(target=target, device=device, dtype=dtype))))

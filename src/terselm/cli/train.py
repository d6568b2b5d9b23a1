"""Commands on finished runs: ``report``, ``publish``, ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terselm.cli import app, need, quieten_transformers
from terselm.errors import ConfigError


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to: Annotated[str, typer.Option(help="Folder to make, which must not exist, or hub:ORGANISATION/NAME.")],
    *,
    dtype: Annotated[str, typer.Option(help="Number format of the stored weights: float32 or bfloat16.")] = "float32",
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Leave the base out.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new repository on the hub.")] = False,
    tag: Annotated[
        str | None, typer.Option(help="Of the commit on the hub; default: from the adapter's digest.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base model and write a checkpoint that stands by itself.

    On the hub: one commit and one tag; the token comes from HF_TOKEN.
    """
    need("train", "peft")
    from terselm.train.choices import Precision
    from terselm.train.hub import PREFIX, HubPlace
    from terselm.train.publish import Form, publish_to_hub
    from terselm.train.publish import publish as publish_run

    if dtype not in (Precision.FLOAT32, Precision.BFLOAT16):
        raise ConfigError(f"unknown dtype {dtype!r}; expected float32 or bfloat16")
    form = Form(dtype=Precision(dtype), adapter_only=adapter_only)
    quieten_transformers()
    if to.startswith(PREFIX):
        place = HubPlace(repo=to.removeprefix(PREFIX), tag=tag, private=not public)
        print(publish_to_hub(run, place, form))
        return
    if public or tag is not None:
        raise ConfigError("--public and --tag are for the hub; publish with --to hub:ORGANISATION/NAME")
    print(publish_run(run, Path(to), form).path)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A published folder, or a download of one.")]) -> None:
    """Recompute the checksums of a published folder and compare its logits in a fresh process."""
    from terselm.train.verify import verify as verify_folder

    quieten_transformers()
    difference = verify_folder(folder)
    print(f"{folder} is as it was published; its logits differ by {difference:.1g} of their spread")


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

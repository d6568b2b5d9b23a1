"""Commands that measure: ``evaluate`` and ``tune``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from terselm.cli import app, quieten_transformers
from terselm.extras import need

if TYPE_CHECKING:
    from terselm.models.chat import ChatMode

_log = logging.getLogger(__name__)


@app.command()
def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any other setting.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; run again, it goes on where it stopped.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with evaluation settings.")] = None,
    suite: Annotated[str | None, typer.Option(help="nq, gsm8k, tools, prompts (your own), …")] = None,
    target: Annotated[str | None, typer.Option(help="The model that reads the prompts.")] = None,
    methods: Annotated[str | None, typer.Option(help="Such as 'terselm terselm:k=1.2 truncate', with blanks.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Such as '1-shot half-shot 300 0.2', with blanks.")] = None,
) -> None:
    """Measure what a target makes of compressed prompts, and print the table."""
    need("matplotlib", "evaluate")
    from terselm.config import load_config
    from terselm.evaluate.settings import EvaluateSettings

    options = [f"suite.name={suite}"] if suite else []
    options += [f"target.model={target}"] if target else []
    options += [_listed("methods", methods)] if methods else []
    options += [_listed("budgets", budgets)] if budgets else []
    settings = load_config(EvaluateSettings, config, [*options, *(overrides or [])])
    from terselm.evaluate.run import evaluate as run

    quieten_transformers()
    print(run(settings, out)[1])


@app.command()
def tune(
    prompts: Annotated[Path, typer.Argument(help="JSON Lines: instruction, demonstrations, question, answer.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; run again, it goes on where it stopped.")],
    target: Annotated[
        str, typer.Option(help="The local model that will read the prompts, or one that is like it.")
    ] = "qwen2.5-coder-1.5b",
    chat: Annotated[
        str, typer.Option(help="Whether it reads them through its chat template: auto, always or never.")
    ] = "auto",
    model: Annotated[str, typer.Option(help="The small LM.")] = "smollm2-135m",
    budget: Annotated[str, typer.Option(help="Such as 300, 0.2 or 1-shot: the best settings at it.")] = "",
    quality: Annotated[float, typer.Option(help="Share of the gain to keep: the smallest budget for it.")] = 0.0,
    minutes: Annotated[float, typer.Option(help="After these, no new settings are tried.")] = 10.0,
    questions: Annotated[int, typer.Option(help="At most so many of the prompts.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
) -> None:
    """Find the settings that keep most of what your prompts are worth to your target; print their file."""
    need("matplotlib", "evaluate")
    from terselm.evaluate.settings import TargetSettings, TuneSettings

    settings = TuneSettings(
        prompts=prompts,
        target=TargetSettings(model=target, device=device, chat=cast("ChatMode", chat)),  # which checks it
        model=model,
        budget=budget,
        quality=quality,
        minutes=minutes,
        questions=questions,
        device=device,
    )
    from terselm.evaluate.tune import tune as search

    quieten_transformers()
    tuned = search(settings, out)
    _log.info(tuned.table)
    print(out / "compress.yaml")


def _listed(key: str, words: str) -> str:
    return f"{key}=[{','.join(repr(word) for word in words.split())}]"

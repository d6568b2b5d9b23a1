"""Commands that compress: ``compress``, ``compress-file`` and ``serve``."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from terselm.cli import app, quieten_transformers
from terselm.errors import ConfigError, DataFormatError, PromptError
from terselm.extras import need

if TYPE_CHECKING:
    from terselm.compress.prompt import Keep

_log = logging.getLogger(__name__)

_Model = Annotated[str, typer.Option(help="The small LM: alias, model folder, run folder, adapter folder or hub id.")]
_Counter = Annotated[
    str | None, typer.Option(help="Tokenizer that budgets are counted in: cl100k_base, gpt-4o, a model name.")
]
_Config = Annotated[Path | None, typer.Option(help="YAML file with compression settings.")]
_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, ahead of those of the file: rank_by=bm25, ranker=minilm-l6; may be repeated."
    ),
]
_Keep = Annotated[list[str] | None, typer.Option(help="Literal text that must survive; may be repeated.")]
_KeepRegex = Annotated[list[str] | None, typer.Option(help="The same as a regular expression.")]
_KeepPreset = Annotated[list[str] | None, typer.Option(help="numbers, urls or code_fences.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or int8 (CPU).")]


@app.command()
def compress(
    text: Annotated[Path | None, typer.Argument(help="A text without parts; '-' is standard input.")] = None,
    *,
    prompt: Annotated[
        Path | None, typer.Option(help="JSON file with instruction, demonstrations and question.")
    ] = None,
    instruction: Annotated[Path | None, typer.Option(help="File with the instruction; '-' is standard input.")] = None,
    demonstration: Annotated[
        list[Path] | None, typer.Option(help="File with one demonstration or document; may be repeated.")
    ] = None,
    question: Annotated[Path | None, typer.Option(help="File with the question; '-' is standard input.")] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            help="What will be asked, so that the answer stays: documents are ranked for it; it is not printed."
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens allowed.")] = None,
    rate: Annotated[float | None, typer.Option(help="Fraction of the tokens to keep, in (0, 1].")] = None,
    counter: _Counter = None,
    model: _Model = "smollm2-135m",
    config: _Config = None,
    changes: _Set = None,
    keep: _Keep = None,
    keep_regex: _KeepRegex = None,
    keep_preset: _KeepPreset = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result with its figures as JSON.")] = False,
    tokens: Annotated[bool, typer.Option(help="With --json: the decision on every token.")] = False,
) -> None:
    """Compress a prompt and print it."""
    parts = _parts(text, prompt, instruction, demonstration or [], question)
    protected = _protected(keep or [], keep_regex or [], keep_preset or [])
    from terselm.compress.length import Length
    from terselm.compress.prompt import Prompt
    from terselm.compress.settings import CompressionSettings
    from terselm.config import load_config

    asked = Prompt(**parts, ranked_for=ask or "")
    if not asked.pieces():  # before a model is loaded
        raise PromptError("the prompt is empty; give an instruction, demonstrations or a question")
    length = Length(budget=budget, rate=rate)
    settings = load_config(CompressionSettings, config, changes or []) if config is not None or changes else None
    from terselm.compress.compressor import PromptCompressor

    quieten_transformers()
    compressor = PromptCompressor.from_pretrained(model, device=device, dtype=dtype, settings=settings)
    result = compressor.compress_batch([asked], lengths=[length], keep=protected, counter=counter)[0]
    print(json.dumps(result.to_dict(tokens=tokens), ensure_ascii=False, indent=2) if as_json else result.text)


@app.command("compress-file")
def compress_file(
    source: Annotated[Path, typer.Argument(help="Prompts, one a row: .jsonl or .parquet.")],
    out: Annotated[Path, typer.Argument(help="File to make: .jsonl or .parquet.")],
    *,
    budget: Annotated[int | None, typer.Option(help="Tokens allowed; a row's own budget or rate goes first.")] = None,
    rate: Annotated[float | None, typer.Option(help="Fraction of the tokens to keep, in (0, 1].")] = None,
    counter: _Counter = None,
    model: _Model = "smollm2-135m",
    config: _Config = None,
    changes: _Set = None,
    keep: _Keep = None,
    keep_regex: _KeepRegex = None,
    keep_preset: _KeepPreset = None,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    batch_size: Annotated[int, typer.Option(help="Rows compressed, and committed to disk, together.")] = 64,
) -> None:
    """Compress a file of prompts.

    Killed, it goes on where it stopped when run again; several GPUs share the rows under
    `accelerate launch --no_python terselm compress-file …`.
    """
    protected = _protected(keep or [], keep_regex or [], keep_preset or [])
    from terselm.compress.bulk import BulkSettings
    from terselm.compress.bulk import compress_file as compress_rows
    from terselm.compress.compressor import PromptCompressor
    from terselm.compress.settings import CompressionSettings
    from terselm.config import load_config
    from terselm.models.process import current_process
    from terselm.train.hardware import share_out_cores

    settings = BulkSettings(
        model=model,
        dtype=dtype,
        budget=budget,
        rate=rate,
        keep=protected,
        counter=counter,
        compression=load_config(CompressionSettings, config, changes or []),
        batch_size=batch_size,
    )

    def load() -> PromptCompressor:
        quieten_transformers()
        share_out_cores()
        own = current_process().claim_device(device)
        return PromptCompressor.from_pretrained(model, device=own, dtype=dtype, settings=settings.compression)

    if (summary := compress_rows(source, out, load, settings)) is not None:
        _log.info(summary)
        print(out)


@app.command()
def serve(
    model: _Model = "smollm2-135m",
    config: _Config = None,
    changes: _Set = None,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no access control.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8008,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests compressed together.")] = 64,
) -> None:
    """Answer POST /compress; see /docs there."""
    need("fastapi", "serve")
    need("uvicorn", "serve")
    import uvicorn

    from terselm.compress.compressor import PromptCompressor
    from terselm.compress.serving import make_app
    from terselm.compress.settings import CompressionSettings
    from terselm.config import load_config

    settings = load_config(CompressionSettings, config, changes or [])
    quieten_transformers()
    compressor = PromptCompressor.from_pretrained(model, device=device, dtype=dtype, settings=settings)
    compressor.warm_up()
    uvicorn.run(make_app(compressor, most=batch_size), host=host, port=port, log_level="info")


def _parts(
    text: Path | None, prompt: Path | None, instruction: Path | None, demonstrations: list[Path], question: Path | None
) -> dict[str, Any]:
    """The parts of the prompt, from exactly one of: a text, a JSON file, files by part."""
    by_part = bool(instruction or demonstrations or question)
    if (text is not None) + (prompt is not None) + by_part > 1:
        raise ConfigError("give a text, or --prompt, or the parts by file; not several of these")
    if prompt is not None:
        return _read_prompt(prompt)
    if by_part:
        return {
            "instruction": _read(instruction) if instruction else "",
            "demonstrations": [_read(path) for path in demonstrations],
            "question": _read(question) if question else "",
        }
    return {"demonstrations": [_read(text or Path("-"))]}


def _read(path: Path) -> str:
    try:
        # newlines are the user's: no translation
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataFormatError(path, None, f"not UTF-8 (byte {error.start}); convert it first") from None


def _read_prompt(path: Path) -> dict[str, Any]:
    from terselm.compress.prompt import PROMPT_KEYS

    try:
        values = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataFormatError(path, error.lineno, f"broken JSON: {error.msg}") from None
    if not isinstance(values, dict) or not values.keys() <= set(PROMPT_KEYS):
        raise DataFormatError(path, None, f"expected a JSON object with some of the keys {', '.join(PROMPT_KEYS)}")
    return values


def _protected(literals: list[str], regexes: list[str], presets: list[str]) -> list[Keep]:
    from terselm.compress.prompt import Preset

    keep: list[Keep] = list(literals)
    for regex in regexes:
        try:
            keep.append(re.compile(regex))
        except re.error as error:
            raise ConfigError(f"--keep-regex {regex!r} is not a regular expression: {error}") from None
    for preset in presets:
        try:
            keep.append(Preset(preset))
        except ValueError:
            raise ConfigError(f"unknown preset {preset!r}; expected one of {', '.join(Preset)}") from None
    return keep

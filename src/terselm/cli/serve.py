"""``terselm serve``: the compressor as an HTTP service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from terselm.cli.app import app, need


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="The small LM: alias, folder, run folder, adapter folder or hub id.")] = (
        "smollm2-135m"
    ),
    config: Annotated[Path | None, typer.Option(help="YAML file with compression settings.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no access control.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8008,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or int8 (CPU).")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests compressed together.")] = 64,
) -> None:
    """Answer POST /compress; see /docs there."""
    need("serve", "fastapi")
    need("serve", "uvicorn")
    import uvicorn

    from terselm.compress.compressor import PromptCompressor
    from terselm.compress.serving import make_app
    from terselm.compress.settings import CompressionSettings
    from terselm.config import load_config

    settings = load_config(CompressionSettings, config)
    compressor = PromptCompressor.from_pretrained(model, device=device, dtype=dtype, settings=settings)
    compressor.warm_up()
    uvicorn.run(make_app(compressor, most=batch_size), host=host, port=port, log_level="info")

"""Against `transformers serve` on loopback, with real weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from endpoints import gather, settings

from terselm.data.collection.collect import Options, collect
from terselm.data.collection.ledger import ledger_of
from terselm.data.collection.status import status
from terselm.data.instructions import read_instructions
from terselm.models.aliases import convert_alias

pytestmark = [pytest.mark.model, pytest.mark.slow]
SAMPLE = Path(__file__).parents[2] / "data" / "sample" / "instructions.jsonl"
SERVE = """
import sys
from transformers.cli.transformers import main
main()
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(endpoint, model)"""
    model = str(convert_alias("smollm2-135m"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    command = [sys.executable, "-c", SERVE, "serve", model, *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            for _ in range(240):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", model
        finally:
            process.kill()
            process.wait()


def test_twelve_instructions(tmp_path: Path, served: tuple[str, str]) -> None:
    endpoint, model = served
    ask = [one for one in read_instructions(SAMPLE) if one.category in ("reasoning", "classification")][:12]
    out = tmp_path / "r.jsonl"
    given = settings(endpoint, model=model, max_new_tokens=16, limits={"timeout": 300.0})
    summary, records = gather(ask[:4], out, given)
    assert (summary.records, summary.waiting) == (4, 0)
    summary, records = gather(ask, out, given)
    assert (summary.records, summary.reused, summary.without_record) == (12, 4, {})
    for record in records:
        made = record.generation
        assert made is not None
        assert made.usage.prompt_tokens > 10
        assert 0 < made.usage.completion_tokens <= 16
        assert made.finish_reason in ("stop", "length")
    assert status(ledger_of(out))["attempts"]["answered"] == 12
    assert collect(ask, out, given, Options()).reused == 12

"""What the tests of endpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faulty_server import answer_to

from terselm.data.collection.collect import CollectSummary, collect
from terselm.data.collection.settings import CollectSettings, LimitSettings, Options
from terselm.data.instructions import Instruction
from terselm.data.records import Message, Record, Role, read_records

KEY = "sk-test-0123456789abcdef"


def instructions(count: int, text: str = "Question number {}?") -> list[Instruction]:
    return [Instruction(id=f"i{n}", messages=(Message(role=Role.USER, content=text.format(n)),)) for n in range(count)]


def settings(endpoint: str, **changes: Any) -> CollectSettings:
    limits = {"concurrency": 8, "timeout": 5.0, "backoff": 0.01, "retries": 8, "batch_poll": 0.05}
    limits |= changes.pop("limits", {})
    plain: dict[str, Any] = {"endpoint": endpoint, "model": "m", "max_new_tokens": 20}
    return CollectSettings(**plain | changes, limits=LimitSettings(**limits))


def gather(
    ask: Sequence[Instruction], out: Path, given: CollectSettings, **options: Any
) -> tuple[CollectSummary, list[Record]]:
    summary = collect(ask, out, given, Options(**options))
    return summary, list(read_records(out))


def assert_right(records: Sequence[Record]) -> None:
    assert all(record.response == answer_to(record.messages[-1].content) for record in records)

"""The parent's end of a side."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from terselm.evaluate.peer import PeerProcess

_BENCHMARKS = Path(__file__).parents[1]


class SideProcess(PeerProcess):
    """A side (``own`` or ``peer``) in a process of its own; ends with the ``with`` block."""

    def __init__(self, side: str, python: Path, folder: Path, device: str, dtype: str) -> None:
        own_path = os.environ.get("PYTHONPATH", "") if side == "own" else ""
        super().__init__(
            f"the process of the {side} side",
            [python, "-m", f"against_llmlingua.{side}", device, folder, dtype],
            {"PYTHONPATH": os.pathsep.join(filter(None, [str(_BENCHMARKS), own_path]))},
        )

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

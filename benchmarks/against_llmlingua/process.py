"""The parent's end of a side: starts it, asks, reads the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from terselm.errors import TerseLMError

_BENCHMARKS = Path(__file__).parents[1]


class SideProcess:
    """A side (``own`` or ``peer``) in a process of its own; ends with the ``with`` block."""

    def __init__(self, side: str, python: Path, folder: Path, device: str, dtype: str) -> None:
        self.side = side
        own_path = os.environ.get("PYTHONPATH", "") if side == "own" else ""
        self._process = subprocess.Popen(
            [python, "-m", f"against_llmlingua.{side}", device, folder, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(_BENCHMARKS), own_path])),
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            TerseLMError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise TerseLMError(f"the process of the {self.side} side ended with status {status}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

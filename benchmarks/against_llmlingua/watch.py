"""What passes through a model, and the memory at its peak. Knows torch and the standard library alone."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


class Watch:
    """Counts the forward passes of a model, the tokens in them (padding included), and the memory above its weights.

    A pass that is recorded as a CUDA graph runs no Python when it is replayed; it is counted by what was recorded.
    """

    def __init__(self, model: Any) -> None:
        self._cuda = model.device.type == "cuda"
        self._base: int | None = None
        self._seen: list[int] = []  # tokens of each pass
        self._recording: list[int] = []
        self._body = model.base_model
        self._hook = self._body.register_forward_pre_hook(self._see, with_kwargs=True)
        if self._cuda:
            self._see_graphs(torch.cuda.CUDAGraph)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave the model alone, for one that is being compiled."""
        self._hook.remove()
        yield
        self._hook = self._body.register_forward_pre_hook(self._see, with_kwargs=True)

    def remember_base(self) -> None:
        """Count from here the memory that compression takes. The weights must have been used once."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            self._base = torch.cuda.memory_allocated()
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._base = _status("VmRSS")

    def start(self) -> None:
        """Forget what was seen."""
        self._seen.clear()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def stop(self) -> dict[str, int | None]:
        """Passes, tokens and peak memory since `start`; None for what this system does not tell."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return {
            "passes": len(self._seen),
            "forwarded": sum(self._seen),
            "peak_bytes": None if peak is None or self._base is None else peak - self._base,
        }

    def _see(self, module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = (named["input_ids"] if "input_ids" in named else positional[0]).numel()
        recording = self._cuda and torch.cuda.is_current_stream_capturing()
        (self._recording if recording else self._seen).append(tokens)

    def _see_graphs(self, graph_class: Any) -> None:
        """Have every CUDA graph tell when it is recorded and replayed."""
        capture_begin, capture_end, replay = graph_class.capture_begin, graph_class.capture_end, graph_class.replay
        recorded: dict[int, list[int]] = {}

        def begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            self._recording.clear()
            capture_begin(graph, *args, **kwargs)

        def end(graph: Any) -> None:
            capture_end(graph)
            recorded[id(graph)] = self._recording.copy()

        def play(graph: Any) -> None:
            replay(graph)
            self._seen.extend(recorded.get(id(graph), ()))

        graph_class.capture_begin, graph_class.capture_end, graph_class.replay = begin, end, play


def _status(name: str) -> int | None:
    """A line of this process's memory in Linux's account, bytes; None on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None

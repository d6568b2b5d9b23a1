"""Tell the user how far training is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Loss, tokens per second and time left; silent on all processes but the first."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._started = 0.0
        self._first_step = 0
        self._first_tokens = 0
        self._last = (0.0, 0)

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._started

    def tokens_per_second(self, state: Any) -> float:
        """Real tokens, since training began or went on."""
        return float((state.num_input_tokens_seen - self._first_tokens) / self.seconds)

    def recent_tokens_per_second(self, state: Any) -> float:
        """Real tokens since this was last asked, without what only the start of training costs."""
        seconds, tokens = self.seconds, state.num_input_tokens_seen
        (before, seen), self._last = self._last, (seconds, tokens)
        return float((tokens - seen) / (seconds - before))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()
        self._first_step = state.global_step
        self._first_tokens = state.num_input_tokens_seen
        self._last = (0.0, self._first_tokens)
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="aligning", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the last step, whatever log_every is
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        rate = self.tokens_per_second(state)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s")
            return
        done = state.global_step - self._first_step
        left = self.seconds / done * (state.max_steps - state.global_step)
        say(
            f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.3f}, {rate:,.0f} tokens/s"
            f"{_share_of_peak(logs)}, {duration(left)} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def _share_of_peak(logs: dict[str, float]) -> str:
    return f", MFU {logs['mfu']:.1%}" if "mfu" in logs else ""


def say(line: str) -> None:
    """Print one line for the user; stdout is kept for results."""
    print(line, file=sys.stderr, flush=True)


def quieten_libraries() -> None:
    """No bars and no deprecation notices of libraries between our lines; their errors remain."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, says what it has found
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch\.distributed)\b"
    )


def duration(seconds: float) -> str:
    """Such as ``40 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, over = divmod(minutes, 60)
    if hours:
        return f"{hours} h {over:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

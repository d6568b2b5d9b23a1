"""What is measured, in which order. The sides take turns, so that whatever else the machine does hits both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from against_llmlingua.process import SideProcess, log
from against_llmlingua.prompts import Prompt, PromptMaker, whole_text
from terselm.errors import ConfigError, TerseLMError

_PROBE = "Natalia sold 48 clips in April, and half as many in May: how many did she sell in these two months?"
_MOST_DIFFERENCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5, "int8": 4.0}  # of a −log p, nats


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        budget: tokens that a compressed prompt may have.
        warm_ups: runs of each kind before the timed ones; enough for what is set up at the first sight of a shape.
        repeats: prompts timed one at a time, cold and warm.
        batch: prompts in a batch.
        batch_repeats: batches timed.

    Raises:
        ConfigError: a number below 1.
    """

    budget: int
    warm_ups: int
    repeats: int
    batch: int
    batch_repeats: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


class Comparison:
    """Measures two sides on the same prompts.

    Args:
        sides: by name; the first is the one whose model gives the ceiling.
        encode: tokens of a text under the model that both sides share.
    """

    def __init__(
        self, sides: dict[str, SideProcess], maker: PromptMaker, encode: Callable[[str], list[int]], plan: Plan
    ) -> None:
        self._sides = sides
        self._maker = maker
        self._encode = encode
        self._plan = plan
        self._turn = 0

    def run(self) -> dict[str, Any]:
        """Every measurement, as plain values for JSON."""
        described = {name: side.ask(do="describe") for name, side in self._sides.items()}
        difference = self._check_same_model(described)
        single, first = self._single()
        batch, ceiling, lengths = self._batch()
        return {
            "prompts": {**single.pop("prompts"), "batch": self._plan.batch, "batch_tokens": median(lengths)},
            "largest_difference_of_weights_nats": difference,
            "ceiling": ceiling,
            "sides": {
                name: {
                    **described[name],
                    "first_call_seconds": first[name],
                    **{kind: measured[name] for kind, measured in single.items()},
                    "batch": batch[name],
                }
                for name in self._sides
            },
        }

    def _check_same_model(self, described: dict[str, Any]) -> float:
        """The largest difference of a −log p between the sides.

        Raises:
            TerseLMError: the tokens differ, or the difference is not rounding.
        """
        one, other = (side.ask(do="probe", text=_PROBE) for side in self._sides.values())
        difference: float = max(abs(a - b) for a, b in zip(one["nll"], other["nll"], strict=False))
        most = max(_MOST_DIFFERENCE[side["dtype"]] for side in described.values())
        if one["ids"] != other["ids"] or not difference <= most:
            raise TerseLMError(f"the sides do not run the same model: surprisals differ by {difference:.3g} nats")
        return difference

    def _single(self) -> tuple[dict[str, Any], dict[str, float]]:
        """One prompt at a time, cold and warm; and what the first call of each side took."""
        budget = self._plan.budget
        skipped = self._plan.warm_ups
        prompts = [self._maker.prompt() for _ in range(skipped + self._plan.repeats)]
        cold, warm = [], []
        for i, prompt in enumerate(prompts, start=1 - skipped):
            cold.append(self._logged("cold", i, self._in_turns([prompt])))
            warm.append(self._logged("warm", i, self._in_turns([self._with_new_question(prompt)])))
        first = {name: answer["seconds"] for name, answer in cold[0].items()}
        timed = prompts[skipped:]
        sizes = [len(self._encode(whole_text(prompt))) for prompt in timed]
        return {
            "prompts": {
                "tokens": median(sizes),
                "fewest_tokens": min(sizes),
                "most_tokens": max(sizes),
                "demonstrations": median(len(prompt["demonstrations"]) for prompt in timed),
                "budget": budget,
            },
            "cold": self._summaries(cold[skipped:]),
            "warm": self._summaries(warm[skipped:]),
        }, first

    def _batch(self) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
        """Many prompts at once, and the ceiling on the same ones."""
        batches = [[self._maker.prompt() for _ in range(self._plan.batch)] for _ in range(1 + self._plan.batch_repeats)]
        rows = [[self._encode(whole_text(prompt)) for prompt in batch] for batch in batches]
        lengths = [len(row) for batch in rows for row in batch]
        self._in_turns(batches[0])
        self._score(rows[0], min(lengths))
        runs, scored = [], []
        for i in range(self._plan.batch_repeats):
            runs.append(self._logged("batch", i + 1, self._in_turns(batches[i + 1])))
            scored.append(self._score(rows[i + 1], min(lengths)))
        ceiling = [answer["tokens"] / answer["seconds"] for answer in scored]
        tokens = [sum(map(len, batch)) for batch in rows[1:]]
        summaries = self._summaries(runs)
        for name, summary in summaries.items():
            rates = [size / run[name]["seconds"] for size, run in zip(tokens, runs, strict=True)]
            summary["tokens_per_second"] = median(rates)
            summary["share_of_ceiling"] = median(rate / most for rate, most in zip(rates, ceiling, strict=True))
        return summaries, {"tokens_per_second": median(ceiling), "all_tokens_per_second": ceiling}, lengths

    def _in_turns(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Both sides on the same prompts; the one that begins changes from time to time."""
        self._turn += 1
        names = list(self._sides)[:: 1 if self._turn % 2 else -1]
        return {name: self._sides[name].ask(do="compress", prompts=prompts, budget=self._plan.budget) for name in names}

    def _summaries(self, runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _summary([run[name] for run in runs]) for name in self._sides}

    def _score(self, rows: Sequence[Sequence[int]], length: int) -> dict[str, Any]:
        return next(iter(self._sides.values())).ask(do="score", rows=rows, length=length)

    def _with_new_question(self, prompt: Prompt) -> Prompt:
        return Prompt(
            instruction=prompt["instruction"],
            demonstrations=prompt["demonstrations"],
            question=self._maker.question(),
        )

    def _logged(self, kind: str, repeat: int, run: dict[str, Any]) -> dict[str, Any]:
        times = ", ".join(f"{name} {run[name]['seconds']:.3f} s" for name in self._sides)
        log(f"{kind} {repeat}: {times}" if repeat > 0 else f"{kind}, warming up: {times}")
        return run


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        **{name: median(run[name] for run in runs) for name in ("seconds", "processor_seconds", "passes", "forwarded")},
        "all_seconds": [round(run["seconds"], 4) for run in runs],
        "compressed_tokens": median(tokens for run in runs for tokens in run["tokens"]),
        "most_compressed_tokens": max(tokens for run in runs for tokens in run["tokens"]),
        "peak_bytes": max(peaks, default=None),
    }

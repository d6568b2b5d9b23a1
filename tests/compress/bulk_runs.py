"""Bulk files and runs of them, in this process and in others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import random_lm

from terselm.compress.bulk import BulkSettings, BulkSummary, compress_file
from terselm.compress.compressor import PromptCompressor
from terselm.compress.prompt import Prompt
from terselm.models import CausalLM

Json = dict[str, Any]

_TEXT = "the cat sat on a mat and 12 dogs that chased it slept; how many apples 我们 naïve 👍 x = y + 1"
_MIDDLE = " § § §"  # in no other prompt than the one in the middle


def settings(**changes: Any) -> BulkSettings:
    plain: Json = {"model": "random", "rate": 0.4, "batch_size": 7}
    return BulkSettings(**plain | changes)


def compressor() -> PromptCompressor:
    return PromptCompressor(random_lm())


def never() -> PromptCompressor:
    raise AssertionError("there is nothing to compress")


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Different prompts, of one to some hundred tokens."""
    chance = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(chance.choices(_TEXT.split(), k=chance.randint(1, most)))

    return [
        Prompt(
            instruction=text(5),
            demonstrations=[text(30) for _ in range(chance.randint(0, 3))],
            question=text(8) + _MIDDLE * (number == count // 2),
        )
        for number in range(count)
    ]


def as_parts(prompt: Prompt) -> Json:
    parts = {"instruction": prompt.instruction, "demonstrations": prompt.demonstrations, "question": prompt.question}
    return json.loads(json.dumps(parts))  # type: ignore[no-any-return]


def rows_of(count: int, seed: int = 0) -> list[Json]:
    return [{"id": f"r{n}"} | as_parts(prompt) for n, prompt in enumerate(prompts(count, seed))]


def write_rows(path: Path, rows: Iterable[Json]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bulk(source: Path, out: Path, factory: Callable[[], PromptCompressor] = compressor, **changes: Any) -> BulkSummary:
    """A run in the first process."""
    summary = compress_file(source, out, factory, settings(**changes))
    assert summary is not None
    return summary


def expected(compressed: Sequence[tuple[Prompt, Json]], **asked: Any) -> list[Json]:
    """The results of prompts that are compressed one at a time; a prompt's own budget or rate goes first."""
    alone = compressor()
    values = []
    for prompt, own in compressed:
        result = alone.compress_batch([prompt], **(own or asked))[0]
        values.append(
            {
                "compressed": result.text,
                "original_tokens": result.original_tokens,
                "compressed_tokens": result.compressed_tokens,
                "ratio": round(result.original_tokens / result.compressed_tokens, 4),
                "selected": list(result.selected),
            }
        )
    return values


class Died(RuntimeError):
    """What the model of a test raises when it breaks."""


def breaking(*, for_ever: bool) -> PromptCompressor:
    """A compressor whose model fails as it reads the prompt in the middle: for ever, as a GPU does, or each time."""
    lm = random_lm()
    model = type(lm.model)(lm.model.config)
    model.load_state_dict(lm.model.state_dict())
    token = lm.tokenizer(_MIDDLE)["input_ids"][-1]
    dead = False

    def fail(module: Any, positional: Any, named: Json) -> None:
        nonlocal dead
        met = bool((named["input_ids"] == token).any())
        dead = dead or (met and for_ever)
        if met or dead:
            raise Died("the GPU has\nfallen off the bus")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    return PromptCompressor(CausalLM(model=model.eval(), tokenizer=lm.tokenizer, name="random"))


def broken_off(source: Path, out: Path, **changes: Any) -> int:
    """Begin a run that dies on the way; how many rows it got done."""
    with pytest.raises(Died):
        compress_file(source, out, lambda: breaking(for_ever=True), settings(**changes))
    done = len(read_rows(journal_of(out))) - 1
    assert 0 < done < len(read_rows(source))
    assert not out.exists()
    return done


def journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")

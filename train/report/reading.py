"""The held-out text of a run, and its words as models read them: with the compressor's own engine."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.compress.counter import plain_backend
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.errors import CheckpointError
from terselm.files import atomic_file
from terselm.models import load_causal_lm
from terselm.statistics import word_spans, word_surprisals
from terselm.train.report.metrics import LEAST_WORDS, Floats

HELD_OUT = "held_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """One held-out text, prompt and response, as the compressor would read it.

    Attributes:
        prompt: number of the prompt that it answers.
    """

    prompt: int
    text: str

    @property
    def has_enough_words(self) -> bool:
        return len(word_spans(self.text)) >= LEAST_WORDS


def write_texts(run: Path, prompt_of: NDArray[np.int64], texts: Sequence[str], *, most: int, seed: int) -> None:
    """Note what the report reads, drawn at random where there is more; a run can be reported on without its data."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(texts))[:most])
    with atomic_file(run / HELD_OUT) as file:
        for index in drawn:
            line = {"prompt": int(prompt_of[index]), "text": texts[index]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_texts(run: Path) -> list[ReportText]:
    """What `write_texts` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = run / HELD_OUT
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [ReportText(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path} is missing or damaged; run the alignment again to report on it") from None


def read_words(names: Sequence[str], texts: Sequence[str], *, device: str, dtype: str) -> Iterator[list[Floats]]:
    """Surprisal of each word of each text, in nats, under each model; one model is in memory at a time.

    Raises:
        ModelError: a model cannot be loaded.
    """
    for name in names:
        lm = load_causal_lm(name, device=device, dtype=dtype)
        encodings = plain_backend(lm.tokenizer).encode_batch(list(texts), add_special_tokens=False)
        found = SurprisalEngine(lm).score_texts([np.array(encoding.ids, dtype=np.int64) for encoding in encodings])
        yield [
            word_surprisals(text, encoding.offsets, values)
            for text, encoding, values in zip(texts, encodings, found, strict=True)
        ]
        del lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

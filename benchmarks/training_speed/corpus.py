"""The same token ids for both sides: gpt4_instructions, read by our pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from terselm.data.records import read_records
from terselm.train.config import LossOn, Overlong, Template
from terselm.train.examples import Encoding, Example, encode


def examples(records: Path, tokenizer: Any, *, row_length: int, vocabulary: int) -> list[Example]:
    """Every record as token ids below ``vocabulary``; only responses are counted."""
    encoding = Encoding(
        tokenizer=tokenizer,
        start_id=tokenizer.bos_token_id,
        end_id=tokenizer.eos_token_id,
        template=Template.RAW,
        loss_on=LossOn.RESPONSE,
        max_length=row_length,
        overlong=Overlong.SPLIT,
    )
    encoded = encode(list(read_records(records)), encoding)
    return [replace(example, ids=example.ids % vocabulary) for example in encoded.examples]


def write(path: Path, found: list[Example]) -> None:
    """As JSON Lines that TRL's side reads without our code."""
    with path.open("w", encoding="utf-8") as file:
        for example in found:
            mask = np.asarray(example.counted, dtype=int)
            file.write(json.dumps({"input_ids": example.ids.tolist(), "completion_mask": mask.tolist()}) + "\n")

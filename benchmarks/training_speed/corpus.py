"""The same token ids for both sides: gpt4_instructions, read by our pipeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from terselm.data.records import read_records
from terselm.train.examples import Encoding, Example, encode_records
from terselm.train.settings import LossOn, Overlong, Template


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
    encoded = encode_records(list(read_records(records)), encoding)
    return [replace(example, ids=example.ids % vocabulary) for example in encoded.examples]


def wait_for_turn() -> None:
    """Until the process before this one has left the GPU: its parent then writes a line."""
    sys.stdin.readline()

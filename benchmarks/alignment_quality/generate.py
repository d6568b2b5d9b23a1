"""The target's own output: what it writes after the prompts that are trained on, sampled at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from terselm.data.records import Generation, Record, Usage
from terselm.models import CausalLM
from terselm.train.templates import SEPARATOR

_AT_ONCE = 256


@torch.inference_mode()
def generate(target: CausalLM, records: Sequence[Record], tokens: int, seed: int) -> list[Record]:
    """The same prompts with the target's responses, of at most so many tokens; blank ones are left out."""
    torch.manual_seed(seed)
    tokenizer: Any = target.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = []
    ordered = sorted(records, key=lambda record: len(record.messages[0].content))
    for start in range(0, len(ordered), _AT_ONCE):
        some = ordered[start : start + _AT_ONCE]
        prompts = [record.messages[0].content[:2000] + SEPARATOR for record in some]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(target.model.device)
        output = target.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        made = Generation(
            model=target.name,
            parameters={"temperature": 1.0, "max_new_tokens": tokens},
            created="2026-01-01",
            finish_reason="length",
            usage=Usage(prompt_tokens=0, completion_tokens=tokens),
        )
        for record, answer in zip(some, answers, strict=True):
            text = answer.replace("\ufffd", "").strip()
            if text:
                found.append(replace(record, id=f"{record.id}-generated", response=text, generation=made))
    return found

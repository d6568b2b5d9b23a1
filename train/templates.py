"""Render a record as the text that the small LM reads."""

from __future__ import annotations

from dataclasses import dataclass

from terselm.data.records import Record
from terselm.train.choices import Template

SEPARATOR = "\n\n"  # what the compressor puts between the parts of a prompt

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class RenderedRecord:
    """Everything before the response, and the response."""

    prompt: str
    response: str


def render(record: Record, template: Template) -> RenderedRecord:
    """The text of a record; the prompt holds whatever stands between it and the response.

    Source: the Alpaca template is ``prompt_no_input`` of github.com/tatsu-lab/stanford_alpaca.
    """
    prompt = SEPARATOR.join(message.content for message in record.messages)
    match template:
        case Template.RAW:
            return RenderedRecord(prompt + SEPARATOR, record.response)
        case Template.ALPACA:
            return RenderedRecord(_ALPACA.format(instruction=prompt), record.response)

"""From an answer to what the ledger says of it: a record, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from terselm import __version__
from terselm.data.collection.plan import Request
from terselm.data.faults import Fault, cut_loop, find_fault
from terselm.data.formats import record_to_object
from terselm.data.generate import Answer
from terselm.data.rows import Json
from terselm.data.schema import Generation, Record


def judge(request: Request, answer: Answer, last: bool) -> tuple[Answer, Fault | None]:
    """A local target's answer as it is to be kept, and its fault; ``last``: it will not be drawn again.

    A loop is cut after its first cycle if the answer is the last; what is left has no fault then.
    """
    prompt = "\n\n".join(message.content for message in request.instruction.messages)
    template = request.template.text if request.template else ""
    unfinished = answer.finish_reason == "length"
    fault = find_fault(answer.text, prompt, template, unfinished=unfinished)
    if fault is Fault.LOOP and last:
        answer = replace(answer, text=cut_loop(answer.text, unfinished=unfinished), finish_reason="loop")
        fault = find_fault(answer.text, prompt, template)
    return answer, fault


def make_record(request: Request, response: str, **made: Any) -> Json:
    """The record of an answer; ``made`` is what `Generation` holds besides what the request says."""
    record = Record(
        id=request.id,
        category=request.instruction.category,
        messages=request.instruction.messages,
        response=response,
        generation=Generation(
            model=request.model,
            parameters=request.parameters,
            sample=request.sample,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **made,
        ),
    )
    return record_to_object(record)


def versions(*packages: str) -> dict[str, str]:
    """Of TerseLM and of the packages that make answers."""
    from importlib.metadata import version

    return {"terselm": __version__} | {package: version(package) for package in packages}

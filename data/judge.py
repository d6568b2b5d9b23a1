"""From an answer to what the journal says of it: a record, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from terselm import __version__
from terselm.data.faults import Fault, cut_loop, find_fault
from terselm.data.formats import record_to_object
from terselm.data.generate import Answer
from terselm.data.jsonl import Json
from terselm.data.requests import Request
from terselm.data.schema import Generation, Record, Usage


def judge(request: Request, answer: Answer, model: str, attempt: int, last: bool) -> Json | None:
    """The journal's entry for an answer: a record or why there is none; None if it should be asked for again."""
    prompt = "\n\n".join(message.content for message in request.instruction.messages)
    template = request.template.text if request.template else ""
    unfinished = answer.finish_reason == "length"
    fault = find_fault(answer.text, prompt, template, unfinished=unfinished)
    if fault is not None and not last:
        return None
    if fault is Fault.LOOP:
        answer = replace(answer, text=cut_loop(answer.text, unfinished=unfinished), finish_reason="loop")
        fault = find_fault(answer.text, prompt, template)
    if fault is not None:
        return {"id": request.id, "dropped": fault.value}
    return record_to_object(_record(request, answer, model, attempt))


def _record(request: Request, answer: Answer, model: str, attempt: int) -> Record:
    import transformers

    return Record(
        id=request.id,
        category=request.instruction.category,
        messages=request.instruction.messages,
        response=answer.text,
        generation=Generation(
            model=model,
            parameters=request.parameters,
            sample=request.sample,
            attempts=attempt,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            finish_reason=answer.finish_reason,
            usage=Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens),
            versions={"terselm": __version__, "transformers": transformers.__version__},
        ),
    )

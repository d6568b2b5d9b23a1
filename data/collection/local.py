"""Ask a target that runs in this process, batch by batch, with the same ledger as for an endpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from terselm.data.collection.entries import ANSWERED, Intent, Outcome, State
from terselm.data.collection.judge import judge, make_record, versions
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.memory import BatchSize
from terselm.data.collection.plan import Request, render
from terselm.data.collection.progress import Progress
from terselm.data.collection.settings import CollectSettings
from terselm.data.generate import Answer, Limits, Query, encode
from terselm.data.schema import Usage
from terselm.models import CausalLM


def answer_all(
    lm: CausalLM, ledger: Ledger, pending: Sequence[Request], settings: CollectSettings, progress: Progress
) -> None:
    """Generate until each request has a record or is dropped; every batch is committed before the next begins.

    A sampled answer with a fault (see `faults`) is drawn again with the next seed, once all others have been drawn.
    One that still loops after the last draw is cut after its first cycle; with another fault, it is dropped. A greedy
    answer has but one draw.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window; before anything is generated.
        ConfigError: the model needs a template.
        TargetLLMError: there is not memory enough for a single answer.
    """
    limits = Limits(max_new_tokens=settings.max_new_tokens, top_p=settings.top_p, top_k=settings.top_k)
    prompts = {request.id: render(request, lm.tokenizer) for request in pending}
    lengths = {name: len(encode(lm, prompt, settings.max_new_tokens)) for name, prompt in prompts.items()}
    attempts, draws = Counter(ledger.attempts()), Counter(ledger.attempts([ANSWERED]))
    size = BatchSize(lm, settings.batch_size)
    made_by = versions("transformers")
    while pending:
        again: list[Request] = []
        for batch in _batches(pending, lengths, size, settings.max_new_tokens):
            attempts.update(request.id for request in batch)
            draws.update(request.id for request in batch)
            ledger.begin(Intent(request=request.id, number=attempts[request.id]) for request in batch)
            answers = size.generate([_query(r, prompts[r.id], draws[r.id]) for r in batch], limits)
            outcomes = []
            for request, answer in zip(batch, answers, strict=True):
                last = draws[request.id] >= settings.attempts or request.temperature == 0
                outcome = _outcome(request, answer, attempts[request.id], draws[request.id], last, made_by)
                outcomes.append(outcome)
                if outcome.state is State.WAITING:
                    again.append(request)
            ledger.finish(outcomes)
            for outcome in outcomes:
                progress.update(outcome)
        pending = again


def _outcome(request: Request, answer: Answer, number: int, draw: int, last: bool, made_by: dict[str, str]) -> Outcome:
    kept, fault = judge(request, answer, last)
    record = None
    if fault is None:
        record = make_record(
            request,
            kept.text,
            attempts=draw,
            finish_reason=kept.finish_reason,
            usage=Usage(prompt_tokens=kept.prompt_tokens, completion_tokens=kept.completion_tokens),
            versions=made_by,
        )
    state = State.DONE if fault is None else State.DROPPED if last else State.WAITING
    return Outcome(
        request=request.id,
        number=number,
        outcome=ANSWERED,
        raw=json.dumps(asdict(answer), ensure_ascii=False).encode(),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        state=state,
        reason=fault,
        record=record,
    )


def _batches(
    pending: Sequence[Request], lengths: Mapping[str, int], size: BatchSize, new_tokens: int
) -> Iterator[list[Request]]:
    """Longest prompts first; a prompt of less than half the tokens of a batch's first goes into the next batch."""
    batch: list[Request] = []
    most = 0
    for request in sorted(pending, key=lambda request: (-lengths[request.id], request.id)):
        if batch and (len(batch) >= most or 2 * lengths[request.id] < lengths[batch[0].id]):
            yield batch
            batch = []
        if not batch:
            most = size.rows(lengths[request.id] + new_tokens)
        batch.append(request)
    yield batch


def _query(request: Request, prompt: str, draw: int) -> Query:
    return Query(
        prompt=prompt,
        temperature=request.temperature,
        seed=request.seed + draw - 1,
        stop=tuple(request.template.stop) if request.template else (),
    )

"""Ask a local target LLM for its answers, and lose none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from terselm.data.faults import Fault
from terselm.data.formats import Format, Reader
from terselm.data.generate import Limits, Query, encode, generate
from terselm.data.instructions import Instruction
from terselm.data.journal import Journal, locked
from terselm.data.jsonl import Json
from terselm.data.judge import judge
from terselm.data.records import read_records, write_records
from terselm.data.requests import CollectSettings, PromptTemplate, Request, plan_requests, render
from terselm.data.schema import Record
from terselm.errors import ConfigError, DataFormatError, TargetLLMError
from terselm.files import remove_partials
from terselm.models import CausalLM, load_causal_lm

__all__ = ["CollectSettings", "CollectSummary", "Dropped", "PromptTemplate", "collect_local"]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """An answer that was not fit to keep, however often it was asked for."""

    instruction: str
    temperature: float
    fault: Fault


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection did.

    Attributes:
        records: in the file now.
        reused: of these, how many were there before, in the file or in the journal of a run that was cut short.
        retried: records that took more than one attempt.
        cut: records that were cut where they began to loop.
        dropped: requests without a record.
        prompt_tokens, completion_tokens: of the records, as the target counts.
    """

    records: int
    reused: int
    retried: int
    cut: int
    dropped: tuple[Dropped, ...]
    prompt_tokens: int
    completion_tokens: int


def collect_local(
    instructions: Sequence[Instruction], out: Path, settings: CollectSettings, lm: CausalLM | None = None
) -> CollectSummary:
    """Generate the target's answers to all instructions and write them to ``out`` as records.

    Each batch is committed to a journal beside ``out`` before the next begins, so a run that was killed goes on where
    it stopped. Answers that ``out`` or the journal hold already are not generated again. A sampled answer with a
    fault (see `faults`) is drawn again with the next seed. One that still loops after the last attempt is cut after
    its first cycle; with another fault, it is dropped. A greedy answer has but one attempt.

    Args:
        instructions: what to ask.
        out: the records file; appears or changes only when all is done.
        settings: whom to ask, and how.
        lm: the target, where it is loaded already; it must be that of ``settings.model``.

    Raises:
        ConfigError: ``out`` holds records that these instructions and settings do not make; another process is
            writing it; or the model needs a template.
        ContextLengthError: a prompt and its answer do not fit into the model's window.
        DataFormatError: ``out`` or its journal is damaged.
        ModelError: the model cannot be loaded.
        TargetLLMError: no answer was fit to keep.
    """
    requests = plan_requests(instructions, settings)
    with locked(out):
        remove_partials(out)
        state = _State(done=_finished(out, {request.id for request in requests}))
        with Journal(out.with_name(out.name + ".journal")) as journal:
            state.restore(journal)
            reused = sum(request.id in state.done for request in requests)
            pending = [request for request in requests if request.id not in state.done | state.dropped]
            if pending:
                lm = lm or load_causal_lm(settings.model, device=settings.device, dtype=settings.dtype)
                for entry in _answer_all(lm, pending, settings, journal):
                    state.note(entry)
            records = [state.done[request.id] for request in requests if request.id in state.done]
            if not records:
                raise TargetLLMError(
                    f"none of the {len(requests)} answers of {settings.model} was fit to keep; {journal.path} says "
                    "why: try another prompt template, or a higher temperature"
                )
            write_records(out, records)
            journal.remove()
    return _summary(requests, state, reused)


@dataclass(frozen=True, kw_only=True)
class _State:
    """What became of the requests so far, by id; ids that no request bears do no harm."""

    done: dict[str, Record]
    dropped: dict[str, Fault] = field(default_factory=dict)

    def restore(self, journal: Journal) -> None:
        for number, entry in enumerate(journal.entries, start=1):
            try:
                self.note(entry)
            except (KeyError, ValueError) as error:
                raise DataFormatError(journal.path, number, f"not an entry of a journal: {error}") from None

    def note(self, entry: Json) -> None:
        if "dropped" in entry:
            self.dropped[entry["id"]] = Fault(entry["dropped"])
        else:
            record = Reader(Format.RECORDS).record(entry)
            self.done[record.id] = record


def _answer_all(
    lm: CausalLM, pending: Sequence[Request], settings: CollectSettings, journal: Journal
) -> Iterator[Json]:
    """Generate what is pending, attempt by attempt; yield what was committed."""
    limits = Limits(max_new_tokens=settings.max_new_tokens, top_p=settings.top_p, top_k=settings.top_k)
    prompts = {request.id: render(request, lm.tokenizer) for request in pending}
    lengths = {name: len(encode(lm, prompt, settings.max_new_tokens)) for name, prompt in prompts.items()}
    with tqdm(total=len(pending), desc=f"Asking {lm.name}", unit="answer", disable=None) as bar:
        for attempt in range(1, settings.attempts + 1):
            again = []
            for batch in _batches(pending, lengths, settings.batch_size):
                answers = generate(lm, [_query(request, prompts[request.id], attempt) for request in batch], limits)
                committed = []
                for request, answer in zip(batch, answers, strict=True):
                    last = attempt == settings.attempts or request.temperature == 0
                    entry = judge(request, answer, settings.model, attempt, last)
                    if entry is None:
                        again.append(request)
                    else:
                        committed.append(entry)
                journal.append(committed)
                yield from committed
                bar.update(len(committed))
                bar.set_postfix_str(f"{len(again)} to ask again", refresh=False)
            if not (pending := again):
                return


def _batches(pending: Sequence[Request], lengths: Mapping[str, int], size: int) -> Iterator[list[Request]]:
    """Longest prompts first; a prompt of less than half the tokens of a batch's first goes into the next batch."""
    batch: list[Request] = []
    for request in sorted(pending, key=lambda request: (-lengths[request.id], request.id)):
        if batch and (len(batch) == size or 2 * lengths[request.id] < lengths[batch[0].id]):
            yield batch
            batch = []
        batch.append(request)
    yield batch


def _query(request: Request, prompt: str, attempt: int) -> Query:
    return Query(
        prompt=prompt,
        temperature=request.temperature,
        seed=request.seed + attempt - 1,
        stop=tuple(request.template.stop) if request.template else (),
    )


def _finished(out: Path, wanted: set[str]) -> dict[str, Record]:
    """Records that a finished collection left in ``out``."""
    if not out.exists():
        return {}
    done = {record.id: record for record in read_records(out, Format.RECORDS)}
    if strangers := done.keys() - wanted:
        raise ConfigError(
            f"{out} holds {len(strangers)} records of other instructions or settings, which would be lost; "
            "name another file, or move this one away"
        )
    return done


def _summary(requests: Sequence[Request], state: _State, reused: int) -> CollectSummary:
    made = [
        record.generation
        for request in requests
        if (record := state.done.get(request.id)) is not None and record.generation is not None
    ]
    dropped = [
        Dropped(instruction=request.instruction.id, temperature=request.temperature, fault=state.dropped[request.id])
        for request in requests
        if request.id in state.dropped
    ]
    return CollectSummary(
        records=len(made),
        reused=reused,
        retried=sum(generation.attempts > 1 for generation in made),
        cut=sum(generation.finish_reason == "loop" for generation in made),
        dropped=tuple(dropped),
        prompt_tokens=sum(generation.usage.prompt_tokens for generation in made),
        completion_tokens=sum(generation.usage.completion_tokens for generation in made),
    )

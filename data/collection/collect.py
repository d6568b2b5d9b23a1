"""Collect a target LLM's answers: plan, ask what is not answered yet, write the files, sum up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.data.collection.ledger import Ledger, State, ledger_of
from terselm.data.collection.outcome import CollectionProgress
from terselm.data.collection.plan import Request, asked, plan_requests
from terselm.data.collection.settings import CollectSettings, Options
from terselm.data.formats import Format, record_to_object
from terselm.data.instructions import Instruction
from terselm.data.rows import Json, dump_object
from terselm.errors import ConfigError, TargetLLMError
from terselm.files import atomic_file, lock_of, locked, remove_partials
from terselm.models.chat import ChatMode, uses_chat
from terselm.models.process import Process, current_process

if TYPE_CHECKING:
    from terselm.models import CausalLM

__all__ = ["CollectSummary", "Options", "ask", "collect", "open_ledger", "open_run", "plan_collection", "still_waiting"]
_ALONE = Process()


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What a collection has come to.

    Attributes:
        records: in the file now.
        reused: of these, how many were there before this run.
        waiting: requests that are still to be asked.
        without_record: requests that will have no record, by reason.
        retried: records of a local target that took more than one draw.
        cut: records that were cut where they began to loop.
        prompt_tokens, completion_tokens: of the records, as the target counts.
        cost: of everything in the ledger, by the price table.
        stopped: why this run ended before everything was asked; None if it did not.
        files: what was written.
    """

    records: int
    reused: int
    waiting: int
    without_record: Mapping[str, int]
    retried: int
    cut: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    stopped: str | None
    files: tuple[str, ...]


def collect(
    instructions: Sequence[Instruction],
    out: Path,
    settings: CollectSettings,
    options: Options | None = None,
    lm: CausalLM | None = None,
) -> CollectSummary:
    """Ask the target for all that is not answered yet, and write the answers to ``out`` as records.

    Everything is committed to a ledger beside ``out`` first, so a run that was killed goes on where it stopped, and a
    changed setting asks again only for what it changes. ``accelerate launch`` spreads a local target over several
    GPUs: each process takes its share, and the last one to finish writes the files.

    Args:
        instructions: what to ask.
        out: the records file; it appears or changes at the end of the run.
        settings: whom to ask, and how.
        options: of this run; an endpoint's key, its prices, and where to stop.
        lm: a local target that is loaded already.

    Raises:
        ConfigError: a setting is wrong; ``out`` holds records that would be lost; another process is writing it.
        ContextLengthError: a prompt and its answer do not fit into a local model's window.
        DataFormatError: ``out`` or its ledger is damaged.
        ModelError: a local model cannot be loaded.
        TargetLLMError: there is no answer at all, or the ledger cannot be written.
    """
    options = options or Options()
    process = current_process() if settings.is_local else _ALONE
    requests = plan_collection(instructions, out, settings, lm)
    with open_run(out, requests, process) as ledger:
        if options.retry_failed:
            ledger.retry([State.FAILED])
        before = ledger.states()
        stopped = ask(ledger, requests, settings, options, process, lm)
        files = export_all(ledger, requests, out, settings, process)
        if str(out) not in files and process.count == 1:
            raise TargetLLMError(_why_nothing(ledger, requests, settings, stopped))
        reused = sum(before[request.id] is State.DONE for request in requests)
        return _summary(ledger, requests, reused=reused, stopped=stopped, files=files)


def plan_collection(
    instructions: Sequence[Instruction], out: Path, settings: CollectSettings, lm: CausalLM | None = None
) -> list[Request]:
    """All requests. Where ``settings.chat`` leaves the form of the prompts open, it is that in which ``out`` was begun.

    So a collection never holds prompts of two forms because a default has changed.

    Args:
        lm: a local target that is loaded already.

    Raises:
        ConfigError: as `plan_requests`; or ``chat`` is ``always``, and the target has no chat template.
        DataFormatError: ``out`` or its ledger is damaged.
        ModelError: the target's tokenizer cannot be loaded.
    """
    if not settings.is_local or settings.chat == ChatMode.NEVER:
        return plan_requests(instructions, settings)
    forms = {chat: plan_requests(instructions, settings, chat=chat) for chat in (False, True)}
    known = _known(out)
    begun = [chat for chat, requests in forms.items() if any(request.id in known for request in requests)]
    if settings.chat == ChatMode.ALWAYS and True in begun:
        return forms[True]
    if settings.chat == ChatMode.AUTO and len(begun) == 1:
        return forms[begun[0]]
    from terselm.models import load_tokenizer

    tokenizer = load_tokenizer(settings.local_name) if lm is None else lm.tokenizer
    return forms[uses_chat(tokenizer, settings.chat, settings.local_name)]


def _known(out: Path) -> set[str]:
    """The requests in the ledger of ``out``, else those whose records it holds."""
    known: set[str] = set()
    if ledger_of(out).is_file():
        with Ledger(ledger_of(out)) as ledger:
            known.update(ledger.states())
    if not known and out.is_file():
        from terselm.data.records import read_records

        known.update(record.id for record in read_records(out, Format.RECORDS))
    return known


@contextmanager
def open_run(out: Path, requests: Sequence[Request], process: Process = _ALONE) -> Iterator[Ledger]:
    """The ledger of ``out`` (see `open_ledger`), with the records that are in ``out`` already.

    Raises:
        ConfigError: another process is writing it; it holds records that would be lost.
        DataFormatError: it or its ledger is damaged.
    """
    with open_ledger(out, ((request.id, asked(request)) for request in requests), process) as ledger:
        take_in(out, ledger, requests)
        yield ledger


@contextmanager
def open_ledger(out: Path, rows: Iterable[tuple[str, Json]], process: Process = _ALONE) -> Iterator[Ledger]:
    """The ledger of ``out``, for this process alone or for those of one launch.

    Args:
        rows: (id, what is asked) of each request of this run; they are noted. Attempts that a kill cut off are closed.

    Raises:
        ConfigError: another process is writing it.
        DataFormatError: it is damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(locked(_of_rank(out, process.index)))
        for lock in out.parent.glob(f".{out.name}.rank*.lock"):  # of a launch that has more processes than this one
            rank = int(lock.name.removeprefix(f".{out.name}.rank").removesuffix(".lock"))
            if rank >= process.count:
                stack.enter_context(locked(_of_rank(out, rank)))
        if process.index == 0:
            remove_partials(out)
        ledger = stack.enter_context(Ledger(ledger_of(out)))
        noted = dict(rows)
        ledger.add(noted.items())
        ledger.close_interrupted({name for name in noted if _is_of(process, name)} if process.count > 1 else None)
        yield ledger


def _of_rank(out: Path, rank: int) -> Path:
    return out if rank == 0 else out.with_name(f"{out.name}.rank{rank}")


def _is_of(process: Process, request: str) -> bool:
    """Each process of a launch asks its share of the requests."""
    return int(request, 16) % process.count == process.index


def still_waiting(ledger: Ledger, requests: Sequence[Request]) -> list[Request]:
    """Those that have neither an answer nor a reason why there is none."""
    states = ledger.states()
    return [request for request in requests if states[request.id] is State.WAITING]


def ask(
    ledger: Ledger,
    requests: Sequence[Request],
    settings: CollectSettings,
    options: Options,
    process: Process = _ALONE,
    lm: CausalLM | None = None,
) -> str | None:
    """Ask for those of the requests that are waiting; return why it stopped before all were asked, if it did."""
    mine = [request for request in requests if _is_of(process, request.id)]
    pending = still_waiting(ledger, mine)
    with CollectionProgress(len(pending), f"Asking {settings.target}") as progress:
        if settings.is_local:
            from terselm.data.collection.local import answer_all, score_records

            @cache  # loaded once, and only where it is needed
            def load() -> CausalLM:
                from terselm.models import load_causal_lm

                device = process.claim_device(settings.device)
                return lm or load_causal_lm(settings.local_name, device=device, dtype=settings.dtype)

            if pending:
                answer_all(load(), ledger, pending, settings, progress)
            if settings.logprobs.keep:
                score_records(load, ledger, mine, settings.logprobs.top_k)
            return None
        from terselm.data.collection.remote import Remote, answer_task, ask_all

        remote = Remote(settings, options)
        if pending and options.batch:
            from terselm.data.collection.batch import ask_in_batches

            return ask_in_batches(remote, ledger, pending, progress)
        tasks = [answer_task(request, settings) for request in pending]
        return ask_all(remote, ledger, tasks, progress) if tasks else None


def _why_nothing(ledger: Ledger, requests: Sequence[Request], settings: CollectSettings, stopped: str | None) -> str:
    """Say why there is no record at all."""
    if stopped:
        return f"there is no answer of {settings.target} yet: {stopped}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in _reasons(ledger, requests).items())
    hint = "try another prompt template, or a higher temperature"
    if not settings.is_local:
        hint = "the failures file and terselm collection status say more"
    return f"none of the {len(requests)} answers of {settings.target} was fit to keep ({reasons}); {hint}"


def _reasons(ledger: Ledger, requests: Sequence[Request]) -> dict[str, int]:
    planned = {request.id for request in requests}
    return dict(Counter(lost.reason for name, lost in ledger.without_record().items() if name in planned))


def _summary(
    ledger: Ledger, requests: Sequence[Request], *, reused: int, stopped: str | None, files: tuple[str, ...]
) -> CollectSummary:
    """Count what these requests have come to; ``reused`` of their records were there before."""
    states = ledger.states()
    made = [
        record["generation"]
        for request in requests
        if states[request.id] is State.DONE and (record := ledger.record(request.id)) is not None
    ]
    return CollectSummary(
        records=len(made),
        reused=reused,
        waiting=sum(states[request.id] is State.WAITING for request in requests),
        without_record=_reasons(ledger, requests),
        retried=sum(generation["attempts"] > 1 for generation in made),
        cut=sum(generation["finish_reason"] == "loop" for generation in made),
        prompt_tokens=sum(generation["usage"]["prompt_tokens"] for generation in made),
        completion_tokens=sum(generation["usage"]["completion_tokens"] for generation in made),
        cost=round(ledger.used()[0], 6),
        stopped=stopped,
        files=files,
    )


def failures_of(out: Path) -> Path:
    """Where requests without a record are listed."""
    return out.with_name(f"{out.stem}.failures.jsonl")


def logprobs_of(out: Path) -> Path:
    """Where the log-probabilities are."""
    return out.with_name(f"{out.stem}.logprobs.parquet")


def take_in(out: Path, ledger: Ledger, requests: Sequence[Request]) -> None:
    """Take the records that ``out`` holds into the ledger, so that writing the file anew loses none.

    Raises:
        ConfigError: it holds records that these instructions and settings do not make, and the ledger does not know.
        DataFormatError: it is damaged.
    """
    if not out.exists():
        return
    from terselm.data.records import read_records

    planned = {request.id for request in requests}
    states = ledger.states()
    strangers = 0
    for record in read_records(out, Format.RECORDS):
        if record.id in states and (states[record.id] is State.DONE or record.id not in planned):
            continue
        if record.id in planned and record.generation is not None:
            ledger.adopt(record.id, record_to_object(record))
        else:
            strangers += 1
    if strangers:
        raise ConfigError(
            f"{out} holds {strangers} records of other instructions or settings, which would be lost; "
            "name another file, or move this one away"
        )


def export_records(ledger: Ledger, requests: Iterable[Request], out: Path) -> int:
    """Write the records that there are, in the order of the requests; return how many. None are written as no file."""
    done = {name for name, state in ledger.states().items() if state is State.DONE}
    names = [request.id for request in requests if request.id in done]
    if names:
        with atomic_file(out) as file:
            for name in names:
                file.write(dump_object(ledger.record(name) or {}) + "\n")
    return len(names)


def export_failures(ledger: Ledger, requests: Sequence[Request], out: Path) -> int:
    """List the requests that will have no record, each with its reason; no file where there are none."""
    path = failures_of(out)
    without_record = ledger.without_record()
    lost = [request for request in requests if request.id in without_record]
    if not lost:
        path.unlink(missing_ok=True)
        return 0
    with atomic_file(path) as file:
        for request in lost:
            line = {"id": request.id, "instruction": request.instruction.id, "temperature": request.temperature}
            file.write(dump_object(line | asdict(without_record[request.id])) + "\n")
    return len(lost)


def export_all(
    ledger: Ledger, requests: Sequence[Request], out: Path, settings: CollectSettings, process: Process
) -> tuple[str, ...]:
    """Write the files; of several processes, the last one to finish does."""
    from filelock import FileLock

    if process.count > 1 and not _all_done(ledger, requests, settings):
        return ()
    files = []
    lock = lock_of(out.with_name(f"{out.name}.export"))
    with FileLock(lock):  # two that finish at once write the same
        if export_records(ledger, requests, out):
            files.append(out)
        if export_failures(ledger, requests, out):
            files.append(failures_of(out))
        if files[:1] == [out] and settings.logprobs.keep:
            from terselm.data.collection.scores import export_logprobs

            export_logprobs(ledger, requests, logprobs_of(out), settings)
            files.append(logprobs_of(out))
    with suppress(OSError):
        lock.unlink()
    return tuple(map(str, files))


def _all_done(ledger: Ledger, requests: Sequence[Request], settings: CollectSettings) -> bool:
    from terselm.data.collection.scores import unscored

    states = ledger.states()
    if any(states[request.id] is State.WAITING for request in requests):
        return False
    names = [request.id for request in requests]
    return not (settings.logprobs.keep and unscored(ledger, names, settings.logprobs.top_k))

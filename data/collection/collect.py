"""Collect a target LLM's answers: plan, ask what is not answered yet, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.data.collection.entries import State
from terselm.data.collection.export import export_all, take_in
from terselm.data.collection.ledger import Ledger, ledger_of
from terselm.data.collection.money import FREE, read_price
from terselm.data.collection.plan import Request, asked, plan_requests
from terselm.data.collection.progress import Progress
from terselm.data.collection.settings import CollectSettings
from terselm.data.collection.summary import CollectSummary, summarise, why_nothing
from terselm.data.instructions import Instruction
from terselm.data.journal import locked
from terselm.errors import ConfigError, TargetLLMError
from terselm.files import remove_partials
from terselm.models.process import Process, current_process

if TYPE_CHECKING:
    from terselm.data.collection.remote import Remote
    from terselm.models import CausalLM

__all__ = ["CollectSummary", "Options", "ask", "collect", "open_ledger", "register", "still_waiting"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run, beside the settings that say what is asked.

    Raises:
        ConfigError: a negative limit, or a limit on costs without prices.
    """

    key_file: Path | None = None
    """Holds the endpoint's key; else the environment does."""
    prices: Path | None = None
    """Price table in YAML; without it, costs are 0."""
    max_cost: float | None = None
    """Hard stop, in the currency of the price table, over all runs on the same ledger."""
    max_requests: int | None = None
    """Hard stop on requests sent, those that failed included, over all runs on the same ledger."""
    retry_failed: bool = False
    """Ask again what failed for good in an earlier run."""
    batch: bool = False
    """Through the endpoint's batch interface."""

    def __post_init__(self) -> None:
        for name in ("max_cost", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; expected 0 or more")
        if self.max_cost is not None and self.prices is None:
            raise ConfigError("max_cost needs a price table; give one with prices")


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
    process = current_process() if settings.is_local else Process()
    requests = plan_requests(instructions, settings)
    with open_ledger(out, process) as ledger:
        register(ledger, requests, out)
        if options.retry_failed:
            ledger.retry([State.FAILED])
        before = ledger.states()
        stopped = ask(ledger, requests, settings, options, process, lm)
        files = export_all(ledger, requests, out, settings, process)
        if str(out) not in files and process.count == 1:
            raise TargetLLMError(why_nothing(ledger, requests, settings, stopped))
        reused = sum(before[request.id] is State.DONE for request in requests)
        return summarise(ledger, requests, reused=reused, stopped=stopped, files=files)


def register(ledger: Ledger, requests: Sequence[Request], out: Path) -> None:
    """Note what is asked, with the records that are there already.

    Raises:
        ConfigError: ``out`` holds records that would be lost.
        DataFormatError: it is damaged.
    """
    ledger.add((request.id, asked(request)) for request in requests)
    take_in(out, ledger, requests)


def still_waiting(ledger: Ledger, requests: Sequence[Request]) -> list[Request]:
    """Those that have neither an answer nor a reason why there is none."""
    states = ledger.states()
    return [request for request in requests if states[request.id] is State.WAITING]


def ask(
    ledger: Ledger,
    requests: Sequence[Request],
    settings: CollectSettings,
    options: Options,
    process: Process | None = None,
    lm: CausalLM | None = None,
) -> str | None:
    """Ask for those of the requests that are waiting; return why it stopped before all were asked, if it did."""
    process = process or Process()
    mine = [request for request in requests if int(request.id, 16) % process.count == process.index]
    ledger.close_interrupted({request.id for request in mine} if process.count > 1 else None)
    pending = still_waiting(ledger, mine)
    with Progress(len(pending), f"Asking {settings.target}") as progress:
        if settings.is_local:
            _ask_local(mine, pending, ledger, settings, progress, lm, process)
            return None
        return _ask_remote(pending, ledger, settings, options, progress)


@contextmanager
def open_ledger(out: Path, process: Process | None = None) -> Iterator[Ledger]:
    """The ledger of ``out``, for this process alone or for those of one launch.

    Raises:
        ConfigError: another process is writing it.
        DataFormatError: it is damaged.
    """
    process = process or Process()
    with ExitStack() as stack:
        stack.enter_context(locked(_of_rank(out, process.index)))
        for lock in out.parent.glob(f".{out.name}.rank*.lock"):  # of a launch that has more processes than this one
            rank = int(lock.name.removeprefix(f".{out.name}.rank").removesuffix(".lock"))
            if rank >= process.count:
                stack.enter_context(locked(_of_rank(out, rank)))
        if process.index == 0:
            remove_partials(out)
        yield stack.enter_context(Ledger(ledger_of(out)))


def _of_rank(out: Path, rank: int) -> Path:
    return out if rank == 0 else out.with_name(f"{out.name}.rank{rank}")


def remote_of(settings: CollectSettings, options: Options) -> Remote:
    """The endpoint, its key and its prices.

    Raises:
        ConfigError: the key or the price table cannot be read.
    """
    from terselm.data.collection.client import read_key
    from terselm.data.collection.remote import Remote

    return Remote(
        settings=settings,
        key=read_key(settings, options.key_file),
        price=read_price(options.prices, settings.target) if options.prices else FREE,
        max_cost=options.max_cost,
        max_requests=options.max_requests,
    )


def _ask_remote(
    pending: Sequence[Request],
    ledger: Ledger,
    settings: CollectSettings,
    options: Options,
    progress: Progress,
) -> str | None:
    from terselm.data.collection.judge import versions
    from terselm.data.collection.remote import ask_all
    from terselm.data.collection.tasks import AnswerTask

    remote = remote_of(settings, options)
    if not pending:
        return None
    if options.batch:
        from terselm.data.collection.batch import ask_in_batches

        return ask_in_batches(remote, ledger, pending, progress)
    made_by = versions("openai")
    tasks = [AnswerTask(request=request, settings=settings, versions=made_by) for request in pending]
    return ask_all(remote, ledger, tasks, progress)


def _ask_local(
    mine: Sequence[Request],
    pending: Sequence[Request],
    ledger: Ledger,
    settings: CollectSettings,
    progress: Progress,
    lm: CausalLM | None,
    process: Process,
) -> None:
    from terselm.data.collection.local import answer_all
    from terselm.data.collection.scores import score_records
    from terselm.models import load_causal_lm

    def load() -> CausalLM:
        device = process.claim_device(settings.device)
        return lm or load_causal_lm(settings.local_name, device=device, dtype=settings.dtype)

    if pending:
        lm = load()
        answer_all(lm, ledger, pending, settings, progress)
    if settings.logprobs.keep:
        score_records(load, ledger, [request.id for request in mine], settings.logprobs.top_k)

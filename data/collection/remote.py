"""Ask an endpoint for all that is waiting, many requests at a time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from terselm.data.collection.admission import Admission, PromptSizes, SpendingLimit, SpentError, StoppedError
from terselm.data.collection.endpoint import Client, no_answer, pause_after, read_key
from terselm.data.collection.ledger import Intent, Ledger, Outcome
from terselm.data.collection.outcome import (
    AskError,
    CollectionProgress,
    Failure,
    FailureCause,
    Then,
    answered,
    failed,
    scored,
)
from terselm.data.collection.plan import Request, remote_body
from terselm.data.collection.settings import Api, CollectSettings, Options, Price, PromptScores, read_price
from terselm.data.schema import Message, PlainText, Role
from terselm.errors import TerseLMError
from terselm.extras import first_line

_DEAD = 20
"""Requests given up in a row after which the endpoint is taken for dead; those that were not sent stay waiting."""


class Remote:
    """An endpoint, its key, and what asking it may cost.

    Raises:
        ConfigError: the key or the price table cannot be read.
    """

    def __init__(self, settings: CollectSettings, options: Options) -> None:
        self.settings, self._options = settings, options
        self.key = read_key(settings, options.key_file)
        self.price = read_price(options.prices, settings.target)

    def spending(self, ledger: Ledger) -> SpendingLimit:
        """What may still be spent."""
        return SpendingLimit(self._options.max_cost, self._options.max_requests, ledger)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to ask, whose row in the ledger has the name ``id``.

    Attributes:
        messages: the prompt.
        plain: through ``/completions``.
        most_tokens: of the completion.
        body: gives what is sent.
        outcome: what a response to an attempt means, at a price; ValueError where it cannot be read.
    """

    id: str
    messages: Sequence[Message]
    plain: bool
    most_tokens: int
    body: Callable[[], dict[str, Any]]
    outcome: Callable[[Intent, bytes, Price], Outcome]


def answer_task(request: Request, settings: CollectSettings) -> Task:
    """An answer to a request."""
    return Task(
        id=request.id,
        messages=request.instruction.messages,
        plain=settings.api is Api.COMPLETIONS,
        most_tokens=settings.max_new_tokens,
        body=partial(remote_body, request, settings.api),
        outcome=partial(answered, request),
    )


def score_task(name: str, text: PlainText, settings: CollectSettings) -> Task:
    """The log-probabilities of a text."""
    top_k = settings.logprobs.top_k
    body: dict[str, Any] = {"model": settings.model, "prompt": text.text, **settings.extra_body}
    if settings.logprobs.of_texts is PromptScores.ECHO:
        body |= {"echo": True, "max_tokens": 0, "logprobs": max(1, top_k)}
    else:
        body |= {"prompt_logprobs": top_k, "max_tokens": 1}
    messages = [Message(role=Role.USER, content=text.text)] if text.text.strip() else []
    outcome = partial(scored, text, settings.logprobs)
    return Task(id=name, messages=messages, plain=True, most_tokens=1, body=lambda: body, outcome=outcome)


def intent_of(task: Task, number: int, sizes: PromptSizes, price: Price) -> Intent:
    """An attempt at a task, with what it could use at most."""
    prompt = sizes.bound(task.messages)
    cost = price.cost(prompt, task.most_tokens)
    return Intent(request=task.id, number=number, bound_tokens=prompt + task.most_tokens, bound_cost=cost)


def ask_all(remote: Remote, ledger: Ledger, tasks: Sequence[Task], progress: CollectionProgress) -> str | None:
    """Ask until each request is answered or given up; return why it stopped before that, if it did.

    An interrupt (Ctrl-C, SIGTERM) sends nothing more and waits for the answers that are on their way.

    Raises:
        ConfigError: `openai` is missing, or a request is larger than the token limit.
        TargetLLMError: the ledger cannot be written.
    """

    async def ask() -> str | None:
        return await _RemoteRun(remote, ledger, progress).ask(tasks)

    return asyncio.run(ask())


class _RemoteRun:
    """The state of one run; it lives in one event loop."""

    def __init__(self, remote: Remote, ledger: Ledger, progress: CollectionProgress) -> None:
        self.remote, self.limits, self.ledger, self.progress = remote, remote.settings.limits, ledger, progress
        self.gate = Admission(self.limits, remote.spending(ledger), ledger)
        self.commits = _Commits(ledger)
        self.sizes = PromptSizes()
        self.attempts = ledger.attempts()
        self.error: TerseLMError | None = None
        self.given_up = 0  # in a row

    async def ask(self, tasks: Sequence[Task]) -> str | None:
        queue = iter(tasks)
        async with Client(self.remote.settings, self.remote.key) as client:
            try:
                with on_interrupt(lambda: self.gate.stop("interrupted")):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.limits.concurrency, len(tasks))):
                            group.create_task(self._work(client, queue))
            finally:
                await self.commits.close()
        if self.error is not None:
            raise self.error
        return self.gate.why

    async def _work(self, client: Client, queue: Iterator[Task]) -> None:
        for task in queue:
            try:
                await self._until_answered(client, task)
            except SpentError as spent:  # what others have set aside may still be sent
                self.gate.why = self.gate.why or str(spent)
                return
            except StoppedError:
                return
            except TerseLMError as error:  # a ledger that cannot be written, a request that never fits
                self.error = self.error or error
                self.gate.stop(str(error))
            if self.gate.is_stopped:
                return

    async def _until_answered(self, client: Client, task: Task) -> None:
        """Attempt a task until it is answered, fails for good, or has failed as often as the limits allow."""
        for failures in range(1, self.limits.retries + 2):
            last = failures > self.limits.retries
            failure = await self._attempt(client, task, last)
            if failure is None or failure.then is not Then.RETRY or last:
                return
            await self.gate.sleep(pause_after(failures, failure, self.limits))

    async def _attempt(self, client: Client, task: Task, last: bool) -> Failure | None:
        """Send a request once, commit what came of it, and return its failure where that was no answer."""
        intent = intent_of(task, self.attempts.get(task.id, 0) + 1, self.sizes, self.remote.price)
        async with self.gate.ticket(intent) as ticket:
            await self.commits.commit(lambda: self.ledger.begin([intent]))
            self.attempts[task.id] = intent.number
            self.gate.sending(ticket)
            with self.progress.in_flight():
                outcome, failure = await self._send(client, task, intent, last)
            await self.commits.commit(lambda: self.ledger.finish([outcome]))
            self.gate.settle(ticket, outcome, failure)
        self.sizes.learn(task.messages, outcome.prompt_tokens or 0)
        self.progress.update(outcome)
        if failure is None:
            self.given_up = 0
            return None
        self.given_up += failure.then is Then.RETRY and last
        if failure.then is Then.STOP:
            self.gate.stop(f"the endpoint refuses every request ({failure.message})")
        elif self.given_up >= _DEAD:
            self.gate.stop(f"the endpoint answered none of {_DEAD} requests in a row ({failure.message})")
        return failure

    async def _send(self, client: Client, task: Task, intent: Intent, last: bool) -> tuple[Outcome, Failure | None]:
        raw = None
        try:
            raw = await client.ask(task.body(), plain=task.plain)
            return task.outcome(intent, raw, self.remote.price), None
        except AskError as error:
            failure = error.failure
        except ValueError as error:
            failure = no_answer(FailureCause.MALFORMED, self.remote.key.mask(first_line(error)))
        return failed(intent, failure, raw, last=last), failure


class _Commits:
    """Many commits as one: each waits for the disk, and a disk is slow.

    Gathers the changes that arrive while the last group is being written, and commits them together.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[Callable[[], None], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def commit(self, change: Callable[[], None]) -> None:
        """Return once the change is on disk; it will get there even if the caller is cancelled.

        Raises:
            TargetLLMError: it cannot be written.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())
        await future

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._task is not None:
            await self._task

    async def _write(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            error: BaseException | None = None
            try:
                await asyncio.to_thread(self._apply, [change for change, _ in group])
            except Exception as raised:
                error = raised
            for _, future in group:
                if future.done():  # its caller was cancelled
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _apply(self, changes: list[Callable[[], None]]) -> None:
        with self._ledger.transaction():
            for change in changes:
                change()


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on the first Ctrl-C or SIGTERM; a second one is Python's. For use within an event loop."""
    loop = asyncio.get_running_loop()
    caught: list[signal.Signals] = []

    def release() -> None:
        while caught:
            loop.remove_signal_handler(caught.pop())

    def interrupted() -> None:
        release()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            loop.add_signal_handler(number, interrupted)
            caught.append(number)
    try:
        yield
    finally:
        release()

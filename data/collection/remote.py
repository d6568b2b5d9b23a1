"""Ask an endpoint for all that is waiting, many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from terselm.data.collection.admission import Admission, StoppedError
from terselm.data.collection.client import AskError, Client, Key
from terselm.data.collection.commits import Commits
from terselm.data.collection.entries import Intent, Outcome
from terselm.data.collection.failures import Failure, Reason, Then, no_answer
from terselm.data.collection.interrupts import on_interrupt
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.money import FREE, Price, SpentError
from terselm.data.collection.progress import Progress
from terselm.data.collection.settings import CollectSettings
from terselm.data.collection.sizes import PromptSizes
from terselm.data.collection.tasks import Task
from terselm.data.collection.verdicts import failed
from terselm.errors import ConfigError, TerseLMError

if TYPE_CHECKING:
    from tenacity import RetryCallState

_DEAD = 20
"""Requests given up in a row after which the endpoint is taken for dead; those that were not sent stay waiting."""
_LONGEST_WISH = 3600.0
"""Seconds; an endpoint that asks to wait longer is asked again after this."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """An endpoint, and what asking it may cost."""

    settings: CollectSettings
    key: Key
    price: Price = FREE
    max_cost: float | None = None
    max_requests: int | None = None


def ask_all(remote: Remote, ledger: Ledger, tasks: Sequence[Task], progress: Progress) -> str | None:
    """Ask until each request is answered or given up; return why it stopped before that, if it did.

    An interrupt (Ctrl-C, SIGTERM) sends nothing more and waits for the answers that are on their way.

    Raises:
        ConfigError: `openai` or `tenacity` is missing, or a request is larger than the token limit.
        TargetLLMError: the ledger cannot be written.
    """
    try:
        import tenacity  # noqa: F401
    except ImportError:
        raise ConfigError("endpoints need the tenacity package; run: pip install 'terselm[collect]'") from None

    async def ask() -> str | None:
        return await _Run(remote, ledger, progress).ask(tasks)

    return asyncio.run(ask())


class _Run:
    """The state of one run; it lives in one event loop."""

    def __init__(self, remote: Remote, ledger: Ledger, progress: Progress) -> None:
        self.remote, self.settings, self.ledger, self.progress = remote, remote.settings, ledger, progress
        self.gate = Admission(remote.settings.limits, ledger, (remote.max_cost, remote.max_requests))
        self.commits = Commits(ledger)
        self.sizes = PromptSizes()
        self.attempts = ledger.attempts()
        self.error: TerseLMError | None = None
        self.given_up = 0  # in a row

    async def ask(self, tasks: Sequence[Task]) -> str | None:
        queue = iter(tasks)
        async with Client(self.settings, self.remote.key) as client:
            try:
                with on_interrupt(lambda: self.gate.stop("interrupted")):
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.settings.limits.concurrency, len(tasks))):
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
        import tenacity

        tries = self.settings.limits.retries + 1
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(tries),
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, AskError) and e.failure.then is Then.RETRY),
            wait=self._pause,
            sleep=self.gate.sleep,
            reraise=True,
        )
        with suppress(AskError):  # the ledger has it
            async for attempt in retrying:
                with attempt:
                    await self._attempt(client, task, last=attempt.retry_state.attempt_number == tries)

    async def _attempt(self, client: Client, task: Task, last: bool) -> None:
        """Send a request once, commit what came of it, and raise AskError where that was no answer."""
        intent = self._intent(task)
        async with self.gate.ticket(intent) as ticket:
            await self.commits.commit(lambda: self.ledger.begin([intent]))
            self.attempts[task.id] = intent.number
            self.gate.sending(ticket)
            with self.progress.in_flight():
                outcome, failure = await self._send(client, task, intent, last)
            await self.commits.commit(lambda: self.ledger.finish([outcome]))
            self.gate.settle(ticket, outcome, failure)
        task.learn(self.sizes, outcome.prompt_tokens or 0)
        self.progress.update(outcome)
        if failure is None:
            self.given_up = 0
            return
        self.given_up += failure.then is Then.RETRY and last
        if failure.then is Then.STOP:
            self.gate.stop(f"the endpoint refuses every request ({failure.message})")
        elif self.given_up >= _DEAD:
            self.gate.stop(f"the endpoint answered none of {_DEAD} requests in a row ({failure.message})")
        raise AskError(failure)

    def _intent(self, task: Task) -> Intent:
        prompt, completion = task.bounds(self.sizes)
        return Intent(
            request=task.id,
            number=self.attempts.get(task.id, 0) + 1,
            bound_tokens=prompt + completion,
            bound_cost=self.remote.price.cost(prompt, completion),
        )

    async def _send(self, client: Client, task: Task, intent: Intent, last: bool) -> tuple[Outcome, Failure | None]:
        raw = None
        try:
            raw = await client.ask(task.body(), plain=task.plain)
            return task.outcome(intent, raw, self.remote.price), None
        except AskError as error:
            failure = error.failure
        except ValueError as error:
            failure = no_answer(Reason.MALFORMED, self.remote.key.mask(str(error)))
        return failed(intent, failure, raw, last=last), failure

    def _pause(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what the endpoint asks for, else exponential with full jitter."""
        import tenacity

        limits = self.settings.limits
        error = state.outcome.exception() if state.outcome else None
        asked = error.failure.pause if isinstance(error, AskError) else None
        drawn = tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest_pause)(state)
        return drawn if asked is None else min(asked, _LONGEST_WISH) + min(drawn, 0.1 * asked)
